"""An adapter apart from any model, and the folder of two files that holds one."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from keras_lora.files.config import CONFIG
from keras_lora.files.config import SETTINGS
from keras_lora.files.config import checked_config
from keras_lora.files.config import warn_of_unknown
from keras_lora.models.atomic import copy_others
from keras_lora.models.atomic import replacing

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter apart from any model: what its two files hold.

    Attributes:
        tensors: Name -> array: `<module>.lora_A.weight` (r, in) and
            `<module>.lora_B.weight` (out, r), and what trained in full, in the
            layout of PEFT.
        config: The settings in PEFT's words: r, lora_alpha, rank_pattern, ...
        slices: Module -> ranks of its slices, where layers here are one module
            there.
        errors: Module -> relative error of an update that was cut to a lower rank,
            in the Frobenius norm.
    """

    tensors: dict
    config: dict
    slices: dict = dataclasses.field(default_factory=dict)
    errors: dict = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, directory) -> "Adapter":
        """Reads a folder that `save_adapter` or PEFT has written, and checks it.

        Raises:
            ValueError: If a file is damaged, or the two do not belong together.
            OSError: If a file cannot be read.
        """
        directory = Path(directory)
        config = read_config(directory)
        if (
            not (directory / TENSORS).exists()
            and (directory / "adapter_model.bin").exists()
        ):
            raise ValueError(
                f"{directory} holds adapter_model.bin, a pickle: loading one can run "
                "any program. Save the adapter as safetensors (PEFT does so by "
                "default)."
            )
        checked_config(config)
        warn_of_unknown(config)
        tensors, metadata = read_tensors(directory / TENSORS)
        slices = checked_metadata(metadata, config, tensors)
        floats = {}
        for key, value in tensors.items():
            if not key.startswith(PREFIX):
                raise ValueError(f"The tensor {key!r} does not begin with {PREFIX!r}.")
            if value.dtype.kind in "iubc":
                raise ValueError(f"The tensor {key!r} is not of floats: {value.dtype}.")
            value = value if value.dtype == "float64" else value.astype("float32")
            floats[key.removeprefix(PREFIX)] = value
        return cls(floats, config, slices)

    def save(self, directory):
        """Writes the two files, in one step: the old adapter or the new one is there.

        Args:
            directory: Folder for them; other files in it stay.

        Raises:
            ValueError: If a tensor holds values that are not finite.
        """
        for key, value in self.tensors.items():
            assert_finite(key, value)
        tensors = {
            PREFIX + key: np.ascontiguousarray(value)
            for key, value in self.tensors.items()
        }
        metadata = {
            "format": "pt",
            "settings": json.dumps({key: self.config.get(key) for key in SETTINGS}),
        }
        if self.slices:
            metadata["slices"] = json.dumps(self.slices)
        metadata["sha256"] = digest(tensors, metadata)
        directory = Path(directory).absolute()
        with replacing(directory) as new:
            new.mkdir()
            copy_others(directory, new, [CONFIG, TENSORS])
            safetensors.numpy.save_file(tensors, new / TENSORS, metadata)
            config = json.dumps(self.config, indent=2, sort_keys=True)
            (new / CONFIG).write_text(config)


def read_config(directory):
    try:
        return json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{directory / CONFIG} is damaged: {error}") from error


def read_tensors(path):
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # safetensors has its own, and NumPy's pass through
        raise ValueError(f"{path} is damaged: {error}") from error


def digest(tensors, metadata):
    """SHA-256 of the tensors and of what the metadata says about them."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key]
        found.update(f"{key} {value.dtype} {value.shape}\n".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    for key in ("settings", "slices"):
        found.update(metadata.get(key, "").encode())
    return found.hexdigest()


def checked_metadata(metadata, config, tensors):
    """What the file says of itself, if it is one of ours: the ranks of slices."""
    if "settings" not in metadata:
        return {}
    found = digest(tensors, metadata)
    if metadata.get("sha256", found) != found:
        raise ValueError(f"{TENSORS} is damaged: its checksum does not fit.")
    stored = json.loads(metadata["settings"])
    for key in SETTINGS:
        if stored.get(key) != config.get(key):
            raise ValueError(
                f"{CONFIG} and {TENSORS} do not belong together: {key} is "
                f"{config.get(key)!r} and {stored.get(key)!r}."
            )
    return json.loads(metadata.get("slices", "{}"))


def assert_finite(name, values):
    if not np.isfinite(values).all():
        raise ValueError(f"The tensor {name!r} holds values that are not finite.")
