"""An adapter without a model, and the folder of two files that holds it."""

import contextlib
import dataclasses
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import safetensors.numpy

from keras_lora.files import disk, experts, factors, other_formats, validation
from keras_lora.files.config import CONFIG, reading_settings
from keras_lora.models import atomic, tables
from keras_lora.models.tables import Table

CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file(torch.load('
    "'{}', weights_only=True), '{}.safetensors')\""
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter(Table):
    """An adapter without a model: the contents of its two files.

    It prints as a table. Two adapters are equal if their files would be equal;
    `errors` is not compared. An adapter has no hash, as its contents can change.

    Attributes:
        tensors: Name -> array: `<module>.lora_A.weight` (r, in) and
            `<module>.lora_B.weight` (out, r), and weights that trained in full, in
            PEFT's layout. For a parameter that stacks the matrices of experts, the
            shapes are (r, experts, in) and (out, r, experts).
        config: The settings under PEFT's names: r, lora_alpha, rank_pattern, ...
        slices: Module -> ranks of its slices, where several layers here are one
            module in the file.
        errors: Module -> relative error of an update whose rank was lowered, in the
            Frobenius norm.
        starts: Modules whose factors have a second, frozen half: the initial values
            of `initialize_lora`.

    Examples:
        >>> keras_lora.save_adapter(model, "adapter")
        >>> adapter = keras_lora.Adapter.read("adapter")
        >>> adapter.config["r"]
        8
        >>> adapter.save("a copy")
    """

    tensors: dict
    config: dict
    slices: dict = dataclasses.field(default_factory=dict)
    errors: dict = dataclasses.field(default_factory=dict)
    starts: list = dataclasses.field(default_factory=list)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other):
        if not isinstance(other, Adapter):
            return NotImplemented
        settings, other_settings = (
            (x.config, x.slices, sorted(x.starts), x.tensors.keys())
            for x in (self, other)
        )
        return settings == other_settings and all(
            value.dtype == other.tensors[key].dtype
            and np.array_equal(value, other.tensors[key], equal_nan=True)
            for key, value in self.tensors.items()
        )

    def __repr__(self):
        return f"<Adapter: {in_words(self)}>"

    def parts(self):
        return parts_of(self, most=20)

    @classmethod
    def read(cls, directory: str | os.PathLike) -> "Adapter":
        """Reads and checks a folder that `save_adapter` or PEFT has written.

        Two other formats are read too: a .safetensors file of kohya (lora_down,
        lora_up, alpha), and a folder of mlx (lora_a, lora_b, scale).

        Raises:
            ValueError: If a file is damaged, the two files do not belong together, or
                they have another format; the error names it and says what to do.
            OSError: If a file cannot be read.
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise ValueError(
                f"Give the path of an adapter's folder. Received: {directory!r}."
            )
        if other := other_formats.read_other_format(directory):
            file_config, tensors = other
            validation.validate_config(file_config)
            return cls(disk.standardize_tensors(tensors), file_config)
        folder = adapter_folder(Path(directory))
        if not disk.has_tensors(folder):
            refuse_pickles(folder, sorted(folder.iterdir()))
        file_config, tensors, metadata = disk.read_together(folder)
        other_formats.refuse_other_format(tensors)
        settings = validation.validate_config(file_config)
        validation.warn_of_unknown(file_config)
        slices, starts = disk.validate_metadata(metadata, file_config, tensors)
        tensors = experts.unwrap(disk.standardize_tensors(tensors), settings)
        return cls(tensors, file_config, slices, starts=starts)

    def save(self, directory: str | os.PathLike):
        """Writes the two files. If it is interrupted, the old or new adapter is intact.

        Each file is written under another name and then renamed. If the settings
        change too, adapter_config.json holds both versions while the tensors are
        replaced, in a form that PEFT refuses and `read` understands. So no reader
        combines new tensors with old settings.

        Args:
            directory: The folder, or a link to it; other files in it are kept.

        Raises:
            ValueError: If a tensor holds values that are not finite.
            OSError: If a file cannot be written.
        """
        atomic.refuse_file_name(directory, "an adapter")
        for key, value in self.tensors.items():
            factors.refuse_not_finite(key, value)
        wrapped = experts.wrap(self.tensors, self.config.get("target_parameters") or ())
        tensors = {
            disk.PEFT_PREFIX + key: np.ascontiguousarray(value)
            for key, value in wrapped.items()
        }
        metadata = {
            "format": "pt",
            "settings": json.dumps(reading_settings(self.config)),
        }
        if self.slices:
            metadata["slices"] = json.dumps(self.slices)
        if self.starts:
            metadata["starts"] = json.dumps(self.starts)
        metadata["sha256"] = disk.digest(tensors, metadata)
        config = json.dumps(self.config, indent=2, sort_keys=True).encode()
        data = safetensors.numpy.save(tensors, metadata)
        directory = Path(os.path.realpath(directory))
        is_new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with atomic.temporary_folder(directory) as new:
                disk.replace_files(directory, new, data, config, metadata["sha256"])
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # it is not empty
                    directory.rmdir()
            raise


def refuse_pickles(folder, paths):
    for path in paths:
        if path.suffix in PICKLES:
            raise ValueError(
                f"{folder} holds {path.name}, a pickle: loading one can run any "
                "program. Convert it with torch, in that folder: "
                f"{CONVERT.format(path.name, path.stem)}"
            )


def adapter_folder(directory):
    """Returns the folder itself, or the one folder in it that holds an adapter."""
    if (directory / CONFIG).exists():
        return directory
    if directory.is_file():
        refuse_pickles(directory.parent, [directory])
        raise NotADirectoryError(
            f"{directory} is a file, and an adapter is a folder with {CONFIG} and "
            f"{disk.TENSORS}. A .keras file is for keras.models.load_model, a "
            ".weights.h5 file for model.load_weights once the model has the same "
            "adapters."
        )
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG}"))
    if len(inside) > 1:
        raise ValueError(
            f"{directory} holds several adapters: {[path.name for path in inside]}. "
            "Give the folder of one."
        )
    if not inside:
        exists = "has no" if directory.exists() else "does not exist, so it has no"
        raise FileNotFoundError(
            f"The folder {directory} {exists} {CONFIG}. `save_adapter` and PEFT write "
            "one; nothing is downloaded here."
        )
    return inside[0]


def quiet_factors(adapter):
    """`factors_of` without its warnings, which were given when the file was read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return factors.factors_of(adapter)


def parts_of(adapter, most=math.inf):
    """Title, head, rows and lines below, as a `Table` has them.

    most: the largest number of rows.
    """
    try:
        file = quiet_factors(adapter)
    except ValueError as error:  # printing must not raise
        return "Adapter", ["module"], [], [f"It cannot be loaded: {error}"]
    head = ["module", "A, B", "rank", "alpha", "parameters", "size"]
    head += ["error"] if adapter.errors else []
    rows = []
    for module in tables.sort_by_number(file.factors)[: min(most, len(file.factors))]:
        factors = file.factors[module]
        shapes = [
            factors.tensors[x].shape
            for x in (*factors.low_rank, *factors.other_suffixes)
        ]
        row = [
            module,
            " ".join(map(str, shapes)),
            f"{factors.settings.rank}",
            f"{factors.settings.alpha:g}",
            f"{factors.size:,}",
            size(factors.tensors.values()),
        ]
        if adapter.errors:
            row.append(f"{adapter.errors.get(module, 0):.2g}")
        rows.append(row)
    left_out = len(file.factors) - len(rows)
    lines = [f"and {tables.plural(left_out, 'module')} more"] if left_out else []
    return "Adapter", head, rows, [*lines, *totals(adapter, file)]


def totals(adapter, file):
    """The lines below the rows."""
    method = ", ".join(["LoRA", *file.config["method"]])
    lines = [f"{method}: {in_words(adapter)}"]
    if file.weights:
        sizes = sum(value.size for value in file.weights.values())
        names = ", ".join(tables.sort_by_number(file.weights))
        lines.append(f"In full, {tables.plural(sizes, 'parameter')}: {names}")
    if file.rows:
        count = sum(len(ids) for ids, _ in file.rows.values())
        names = ", ".join(tables.sort_by_number(file.rows))
        lines.append(f"{tables.plural(count, 'row')} of {names}")
    return lines


def in_words(adapter):
    """1 module, rank 8, alpha 16, 1,234 parameters, 4.9 kB."""
    try:
        file = quiet_factors(adapter)
    except ValueError:
        return (
            f"{tables.plural(len(adapter.tensors), 'tensor')}, which cannot be loaded"
        )
    parameters = sum(value.size for value in adapter.tensors.values())
    errors = adapter.errors.values()
    return ", ".join(
        [
            tables.plural(len(file.factors), "module"),
            f"rank {reach([x.settings.rank for x in file.factors.values()])}",
            f"alpha {reach([x.settings.alpha for x in file.factors.values()])}",
            tables.plural(parameters, "parameter"),
            size(adapter.tensors.values()),
            *([f"errors up to {max(errors):.2g}"] if errors else []),
        ]
    )


def reach(values):
    low, high = (f"{bound(values):g}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def size(arrays):
    return tables.format_bytes(sum(value.nbytes for value in arrays))
