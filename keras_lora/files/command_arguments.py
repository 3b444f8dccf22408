"""What the command takes, and how --help says it."""

import argparse

EPILOG = (
    "Exit status: 0 if all went well (diff: and the two say the same; check: and "
    "nothing is wrong), else 1. Errors stand on standard error."
)


class Parser(argparse.ArgumentParser):
    """Errors as the other ones are written, with the same exit status."""

    def error(self, message):
        self.exit(1, f"error: {message}. `{self.prog} --help` says all.\n")


def parser(show, diff, combine, merge, check):
    """The parser of the command line; each function takes its options."""
    top = Parser(
        prog="python -m keras_lora",
        description="Looks into adapter folders, which save_adapter or PEFT have "
        "written, compares, combines, checks and merges them.",
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
        "Shows settings, modules with rank, alpha, shapes, parameters and size, and "
        "the singular values of their updates.",
        "+",
    )
    command(
        diff,
        "Shows the settings in which two adapters differ, and by how much their "
        "updates do, in the Frobenius norm.",
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
        help='what to make of heads that several adapters trained: "average", or the '
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
        help='whose module names the adapter has, as in load_adapter: "transformers"',
    )
    added.add_argument(
        "--quantized",
        choices=("dequantize", "requantize"),
        help="what to make of quantized kernels, as in merge_lora",
    )
    added.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module to import first, such as keras_hub, which registers classes of "
        "the model; can be given again",
    )
    added = command(
        check,
        "Reads adapters as load_adapter does, and says what is wrong. Whether one "
        "fits a model only load_adapter can tell.",
        "+",
    )
    added.add_argument(
        "--engine",
        choices=("vllm",),
        help="also say what this serving engine would refuse, as check_adapter does",
    )
    added.add_argument(
        "--max-lora-rank",
        type=int,
        default=16,
        help="what the server is started with; 16 by default",
    )
    return top
