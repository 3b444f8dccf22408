"""An adapter apart from any model, and the folder of two files that holds one."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from keras_lora.files.config import CONFIG
from keras_lora.files.config import SETTINGS
from keras_lora.files.config import checked_config
from keras_lora.files.config import warn_of_unknown
from keras_lora.models.atomic import temporary_folder
from keras_lora.models.atomic import write

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The peft_type of adapter_config.json while both files are being replaced.
INTERRUPTED = "SAVE_INTERRUPTED"


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
        if (
            not (directory / TENSORS).exists()
            and (directory / "adapter_model.bin").exists()
        ):
            raise ValueError(
                f"{directory} holds adapter_model.bin, a pickle: loading one can run "
                "any program. Save the adapter as safetensors (PEFT does so by "
                "default)."
            )
        config, tensors, metadata = read_together(directory)
        checked_config(config)
        warn_of_unknown(config)
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
        """Writes the two files: the old adapter or the new one is there, whole.

        Each file is written beside its place and renamed. Where the settings change
        too, both settings stand in adapter_config.json while the tensors are
        replaced, in a form that PEFT refuses and `read` understands: whatever ends
        the process, no reader takes new tensors for old settings.

        Args:
            directory: Folder for them, or a link to one; other files in it stay.

        Raises:
            ValueError: If a tensor holds values that are not finite.
            OSError: If a file cannot be written.
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
        config = json.dumps(self.config, indent=2, sort_keys=True).encode()
        tensors = safetensors.numpy.save(tensors, metadata)
        directory = Path(os.path.realpath(directory))
        is_new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with temporary_folder(directory) as new:
                replace_files(directory, new, tensors, config, metadata["sha256"])
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # something is in it already
                    directory.rmdir()
            raise


def replace_files(directory, new, tensors, config, sha256):
    """Puts both files in place, by way of `new`, a folder on the same disk."""
    write(new / TENSORS, tensors)
    write(new / CONFIG, config)
    old = belonging_config(directory)
    if old not in (None, config):
        both = {"old": json.loads(old), "new": json.loads(config), "sha256": sha256}
        both["peft_type"] = INTERRUPTED
        write(new / "both", json.dumps(both).encode())
        write(new / "old", old)
        os.replace(new / "both", directory / CONFIG)
    try:
        os.replace(new / TENSORS, directory / TENSORS)
    except OSError:
        if (new / "old").exists():
            os.replace(new / "old", directory / CONFIG)
        raise
    os.replace(new / CONFIG, directory / CONFIG)


def belonging_config(directory):
    """What adapter_config.json holds for the tensors there; None if it is no use."""
    try:
        config = read_config(directory)
        if belonging(config, {}) is config:
            return (directory / CONFIG).read_bytes()
        _, metadata = read_tensors(directory / TENSORS)
        return json.dumps(belonging(config, metadata)).encode()
    except (OSError, ValueError):
        return None


def belonging(config, metadata):
    """Of a save that was interrupted, the settings for the tensors that there are."""
    if not isinstance(config, dict) or config.get("peft_type") != INTERRUPTED:
        return config
    written = config.get("sha256") == metadata.get("sha256")
    return config.get("new" if written else "old")


def read_together(directory):
    """Both files as they were at one moment: a writer may be at work."""
    for _ in range(9):
        config = read_config(directory)
        tensors, metadata = read_tensors(directory / TENSORS)
        if read_config(directory) == config:
            return belonging(config, metadata), tensors, metadata
    raise OSError(f"{directory / CONFIG} changes all the time: it is being written.")


def read_config(directory):
    path = directory / CONFIG
    assert_readable(path, limit=2**24)
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parsed(text):
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def assert_readable(path, limit=math.inf):
    """Opening a pipe or a device may wait for ever, or read for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is no file but a folder, a pipe or a device.")
    if status.st_size > limit:
        raise ValueError(f"{path} has {status.st_size} bytes; {limit} are read.")


def read_tensors(path):
    assert_readable(path)
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
