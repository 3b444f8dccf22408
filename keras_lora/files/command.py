"""python -m keras_lora: adapter folders from a terminal."""

import importlib
import os
import warnings

from keras_lora.files.analyze import analyze
from keras_lora.files.combine import combine_adapters
from keras_lora.files.command_arguments import parser
from keras_lora.files.difference import settings_apart
from keras_lora.files.difference import tensors_apart
from keras_lora.files.engines import check_adapter
from keras_lora.files.factors import checked_starts
from keras_lora.files.factors import factors_of
from keras_lora.files.factors import slots_of
from keras_lora.files.folder import Adapter
from keras_lora.files.shown import in_words
from keras_lora.files.shown import parts_of
from keras_lora.files.terminal import in_one_line
from keras_lora.files.terminal import say
from keras_lora.files.terminal import write
from keras_lora.files.terminal import write_lines
from keras_lora.models.atomic import replacing


def main(arguments=None) -> int:
    """Runs the command that the arguments, or those of the process, say."""
    options = parser(show, diff, combine, merge, check).parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not for users of the command
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            return options.run(options)
        except (ValueError, OSError, ImportError) as error:
            say(f"error: {error}")
            return 1


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
    for folder in options.folders:
        if os.path.realpath(folder) == os.path.realpath(options.output):
            raise ValueError(
                f"OUT is {folder}, one of the adapters that are combined, which would "
                "be lost. Give another folder."
            )

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
    # Here: no other command needs Keras, which takes seconds to load.
    import keras

    from keras_lora import load_adapter
    from keras_lora import merge_lora

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
        refused = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                adapter = Adapter.read(folder)
                file = factors_of(adapter, slots_of([adapter]))
                checked_starts(adapter.starts, file.factors, file.ranks)
                said = f"good: {in_words(adapter)}"
                if options.engine:
                    rank = options.max_lora_rank
                    refused = check_adapter(adapter, options.engine, rank)
                    wrong = wrong or int(bool(refused))
            except (ValueError, OSError) as error:
                wrong, said = 1, f"wrong: {error}"
        notes = [f"note: {warning.message}" for warning in caught]
        notes += [f"{options.engine}: {sentence}" for sentence in refused]
        write_lines([f"{folder}: {in_one_line(line)}" for line in [said, *notes]])
    return wrong
