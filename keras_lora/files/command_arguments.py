"""The arguments of the command, and the text of --help."""

import argparse

EPILOG = (
    "Exit status: 0 for success, 1 for errors. diff also returns 1 if the adapters "
    "differ, and check if something is wrong. Errors go to standard error."
)


class Parser(argparse.ArgumentParser):
    """Errors as the other ones are written, with the same exit status."""

    def error(self, message):
        self.exit(1, f"error: {message}. See `{self.prog} --help`.\n")


def parser(show, diff, combine, merge, check):
    """The parser of the command line; each function takes its options."""
    top = Parser(
        prog="python -m keras_lora",
        description="Shows, compares, combines, checks and merges adapters that "
        "save_adapter or PEFT has saved.",
        epilog=EPILOG,
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(run, description, folders=None):
        words = {"help": description, "description": description, "epilog": EPILOG}
        added = commands.add_parser(run.__name__, **words)
        added.set_defaults(run=run)
        if folders is not None:
            added.add_argument(
                "folders", nargs=folders, metavar="FOLDER", help="an adapter's folder"
            )
        return added

    command(
        show,
        "Shows the settings of an adapter, its modules with rank, alpha, shapes, "
        "parameters and size, and the singular values of their updates.",
        "+",
    )
    command(
        diff,
        "Shows which settings of two adapters differ, and how much their updates "
        "differ in the Frobenius norm.",
        2,
    )
    added = command(
        combine, "Writes the weighted sum of adapters, exact or cut to a rank.", "+"
    )
    added.add_argument("-o", "--output", required=True, metavar="OUT", help="folder")
    added.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="a number for each folder, 1 by default",
    )
    cuts = added.add_mutually_exclusive_group()
    cuts.add_argument("--rank", type=int, help="the largest rank of the result")
    cuts.add_argument(
        "--energy",
        type=float,
        help="in (0, 1]: the share of the squares of each update's singular values "
        "that is kept, by the lowest rank that does",
    )
    added.add_argument(
        "--heads",
        help='which heads to use if several adapters trained them: "average", or the '
        "FOLDER whose heads are kept",
    )
    added = command(merge, "Merges an adapter into a saved Keras model.")
    added.add_argument("folder", metavar="FOLDER", help="the adapter's folder")
    added.add_argument("model", metavar="MODEL.keras", help="the base model")
    added.add_argument(
        "-o", "--output", required=True, metavar="OUT.keras", help="the merged model"
    )
    added.add_argument(
        "--names",
        help='where the module names come from, as in load_adapter: "transformers"',
    )
    added.add_argument(
        "--quantized",
        choices=("dequantize", "requantize"),
        help="how to merge into quantized kernels, as in merge_lora",
    )
    added.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module to import first, such as keras_hub, that registers classes of "
        "the model; can be repeated",
    )
    added = command(
        check,
        "Reads adapters as load_adapter does, and reports errors. Only load_adapter "
        "can tell whether an adapter fits a model.",
        "+",
    )
    added.add_argument(
        "--engine",
        choices=("vllm",),
        help="also report what this serving engine would refuse, as check_adapter does",
    )
    added.add_argument(
        "--max-lora-rank",
        type=int,
        default=16,
        help="the server's own --max-lora-rank; 16 by default",
    )
    return top
