"""python -m keras_lora: adapter folders from a terminal."""

import argparse
import contextlib
import importlib
import os
import sys
import warnings

import rich.console
import rich.table
from rich.text import Text

from keras_lora.files import analyze, factors, folder
from keras_lora.files.combine import combine_adapters
from keras_lora.files.folder import Adapter
from keras_lora.models import atomic, tables


def main(arguments=None) -> int:
    """Runs the command given by the arguments, by default those of the process."""
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, not for users
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            return options.run(options)
        except (ValueError, OSError, ImportError) as error:
            say(f"error: {error}")
            return 1


def show(options):
    for path in options.folders:
        adapter = Adapter.read(path)
        settings = [
            [k, str(v)] for k, v in sorted(adapter.config.items()) if v is not None
        ]
        write(path, ["setting", "value"], settings)
        write(*folder.parts_of(adapter))
        try:
            write(*analyze.analyze(adapter).parts())
        except ValueError as error:
            write_lines([f"No spectrum: {error}"])
    return 0


def diff(options):
    one, two = map(Adapter.read, options.folders)
    settings = analyze.settings_differences(one, two)
    tensors = analyze.tensor_differences(one, two)
    if settings:
        write("Settings", ["setting", *options.folders], settings)
    if tensors:
        head = ["module", "rank", "|first - second| over the larger"]
        write("Updates and fully trained weights", head, tensors)
    if not settings and not tensors:
        write_lines(["The two adapters are equal."])
    return int(bool(settings or tensors))


def combine(options):
    for path in options.folders:
        if os.path.realpath(path) == os.path.realpath(options.output):
            raise ValueError(
                f"OUT is {path}, one of the adapters to combine, which would be "
                "overwritten. Give another folder."
            )

    combined = combine_adapters(
        options.folders,
        options.weights,
        rank=options.rank,
        energy=options.energy,
        heads=options.heads,
    )
    combined.save(options.output)
    write(*folder.parts_of(combined))
    return 0


def merge(options):
    if not options.output.endswith(".keras"):
        raise ValueError(f"OUT must end with .keras. Received: {options.output!r}.")
    # Only this command needs Keras, which takes seconds to import.
    with without_first_logs():
        import keras

    from keras_lora import load_adapter, merge_lora

    for module in options.imports:
        importlib.import_module(module)
    try:
        model = keras.saving.load_model(options.model)
    except Exception as error:  # the file may hold anything
        raise ValueError(f"{options.model} cannot be loaded: {error}") from error
    report = load_adapter(model, options.folder, names=options.names)
    for row in merge_lora(model, quantized=options.quantized):
        write_lines([f"{row.path}: relative error {row.error:.3g}"])
    with atomic.replacing(options.output) as new:
        model.save(new)
    write_lines(
        [f"Merged {tables.plural(len(report), 'layer')} into {options.output}."]
    )
    return 0


@contextlib.contextmanager
def without_first_logs():
    """Hides TensorFlow's log lines at import, some of which no setting stops."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)


def check(options):
    wrong = 0
    for path in options.folders:
        refused = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                adapter = Adapter.read(path)
                file = factors.factors_of(adapter)
                factors.validate_starts(adapter.starts, file.factors)
                verdict = f"good: {folder.in_words(adapter)}"
                if options.engine:
                    rank = options.max_lora_rank
                    refused = analyze.check_adapter(adapter, options.engine, rank)
                    wrong = wrong or int(bool(refused))
            except (ValueError, OSError) as error:
                wrong, verdict = 1, f"wrong: {error}"
        notes = [f"note: {warning.message}" for warning in caught]
        notes += [f"{options.engine}: {sentence}" for sentence in refused]
        write_lines([f"{path}: {in_one_line(line)}" for line in [verdict, *notes]])
    return wrong


EPILOG = (
    "Exit status: 0 for success, 1 for errors. diff also returns 1 if the adapters "
    "differ, and check if something is wrong. Errors go to standard error."
)


class Parser(argparse.ArgumentParser):
    """Writes errors like those of the commands, with the same exit status."""

    def error(self, message):
        self.exit(1, f"error: {message}. See `{self.prog} --help`.\n")


def parser():
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
        combine, "Writes the weighted sum of adapters, exact or of a lower rank.", "+"
    )
    added.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="its folder"
    )
    added.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="a number for each folder, 1 by default",
    )
    cuts = added.add_mutually_exclusive_group()
    cuts.add_argument("--rank", type=int, help="the highest rank of the result")
    cuts.add_argument(
        "--energy",
        type=float,
        help="in (0, 1]: lowers each rank as far as this share of the squares of the "
        "update's singular values is kept",
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
        help='as in load_adapter: "transformers" for a KerasHub model',
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
        help="a module to import first because it registers classes of the model, "
        "such as keras_hub; can be repeated",
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
        help="also list what this serving engine would refuse, as check_adapter does",
    )
    added.add_argument(
        "--max-lora-rank",
        type=int,
        default=16,
        help="the server's own --max-lora-rank; 16 by default",
    )
    return top


def say(text):
    print(in_one_line(text), file=sys.stderr)


def in_one_line(text):
    return tables.make_printable(" ".join(text.split()))[:2000]


def console():
    terminal = rich.console.Console(highlight=False)
    if not terminal.is_terminal:
        terminal.width = 10_000  # no line breaks in a file or a pipe
    return terminal


def write(title, head, rows, lines=()):
    table = rich.table.Table(
        title=Text(tables.make_printable(title)), title_justify="left"
    )
    for index, name in enumerate(head):
        justify = "left" if index < 2 else "right"
        table.add_column(
            Text(tables.make_printable(name)), justify=justify, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(tables.make_printable(cell)) for cell in row))
    console().print(table)
    write_lines(lines)


def write_lines(lines):
    for line in lines:
        console().print(Text(tables.make_printable(line)), soft_wrap=True)
