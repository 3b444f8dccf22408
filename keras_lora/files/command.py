"""python -m keras_lora: adapter folders from a terminal."""

import argparse
import importlib
import sys
import warnings

import keras
import rich.console
import rich.table
from rich.text import Text

from keras_lora.files.analyze import analyze
from keras_lora.files.combine import combine_adapters
from keras_lora.files.contents import factors_of
from keras_lora.files.contents import slots_of
from keras_lora.files.difference import settings_apart
from keras_lora.files.difference import tensors_apart
from keras_lora.files.folder import Adapter
from keras_lora.files.for_model import checked_starts
from keras_lora.files.load import load_adapter
from keras_lora.files.shown import in_words
from keras_lora.files.shown import parts_of
from keras_lora.models.atomic import replacing
from keras_lora.models.merge import merge_lora
from keras_lora.models.tables import printable

EPILOG = (
    "Exit status: 0 if all went well (diff: and the two say the same; check: and "
    "nothing is wrong), else 1. Errors stand on standard error."
)


def main(arguments=None) -> int:
    """Runs the command that the arguments, or those of the process, say."""
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not for users of the command
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            return options.run(options)
        except (ValueError, OSError, ImportError) as error:
            say(f"error: {error}")
            return 1


def say(text):
    print(in_one_line(text), file=sys.stderr)


def in_one_line(text):
    return printable(" ".join(text.split()))[:2000]


# What the commands do.


def show(options):
    for folder in options.folders:
        adapter = Adapter.read(folder)
        said = [[k, str(v)] for k, v in sorted(adapter.config.items()) if v is not None]
        write(folder, ["setting", "value"], said)
        write(*parts_of(adapter))
        try:
            write(*analyze(adapter).parts())
        except ValueError as error:
            write_lines([f"No spectrum: {error}"])
    return 0


def diff(options):
    one, two = map(Adapter.read, options.folders)
    settings, tensors = settings_apart(one, two), tensors_apart(one, two)
    if settings:
        write("Settings", ["setting", *options.folders], settings)
    if tensors:
        head = ["module", "rank", "|first - second| over the larger"]
        write("Updates, and what trained in full", head, tensors)
    if not settings and not tensors:
        write_lines(["The two say the same."])
    return int(bool(settings or tensors))


def combine(options):
    combined = combine_adapters(
        options.folders,
        options.weights,
        rank=options.rank,
        energy=options.energy,
        heads=options.heads,
    )
    combined.save(options.output)
    write(*parts_of(combined))
    return 0


def merge(options):
    if not options.output.endswith(".keras"):
        raise ValueError(f"OUT must end with .keras. Received: {options.output!r}.")
    for module in options.imports:
        importlib.import_module(module)
    try:
        model = keras.saving.load_model(options.model)
    except Exception as error:  # of whatever the file holds
        raise ValueError(f"{options.model} cannot be loaded: {error}") from error
    report = load_adapter(model, options.folder, names=options.names)
    for row in merge_lora(model, quantized=options.quantized):
        write_lines([f"{row.path}: relative error {row.error:.3g}"])
    with replacing(options.output) as new:
        model.save(new)
    write_lines([f"Merged {len(report)} layers into {options.output}."])
    return 0


def check(options):
    wrong = 0
    for folder in options.folders:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                adapter = Adapter.read(folder)
                file = factors_of(adapter, slots_of([adapter]))
                checked_starts(adapter.starts, file.factors, file.ranks)
                said = f"good: {in_words(adapter)}"
            except (ValueError, OSError) as error:
                wrong, said = 1, f"wrong: {error}"
        notes = [f"note: {warning.message}" for warning in caught]
        write_lines([f"{folder}: {in_one_line(line)}" for line in [said, *notes]])
    return wrong


# How they are asked for.


class Parser(argparse.ArgumentParser):
    """Errors as the other ones are written, with the same exit status."""

    def error(self, message):
        self.exit(1, f"error: {message}. `{self.prog} --help` says all.\n")


def parser():
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
        "--names", help='table of module names, as in load_adapter: "bert", "gpt2", ...'
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
    command(
        check,
        "Reads adapters as load_adapter does, and says what is wrong. Whether one "
        "fits a model only load_adapter can tell.",
        "+",
    )
    return top


# How they write.


def console():
    found = rich.console.Console(highlight=False)
    if not found.is_terminal:
        found.width = 10_000  # in a file or a pipe nothing is folded
    return found


def write(title, head, rows, lines=()):
    table = rich.table.Table(title=Text(printable(title)), title_justify="left")
    for place, name in enumerate(head):
        justify = "left" if place < 2 else "right"
        table.add_column(Text(printable(name)), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)
    write_lines(lines)


def write_lines(lines):
    for line in lines:
        console().print(Text(printable(line)), soft_wrap=True)
