"""The two files of a folder: read as a pair, and replaced as one."""

import json
import math
import os
import stat
from pathlib import Path

import safetensors

from keras_lora.files.config import CONFIG
from keras_lora.models.atomic import write

TENSORS = "adapter_model.safetensors"
INDEX = f"{TENSORS}.index.json"  # of a file in parts
FLOATS = ("F64", "F32", "F16", "BF16")
# The peft_type of adapter_config.json while both files are being replaced.
INTERRUPTED = "SAVE_INTERRUPTED"


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
        tensors, metadata = read_all(directory)
        if read_config(directory) == config:
            return belonging(config, metadata), tensors, metadata
    raise OSError(
        f"{directory / CONFIG} keeps changing: another process is writing it."
    )


def has_tensors(directory):
    return any((directory / name).exists() for name in (TENSORS, INDEX))


def read_all(directory):
    """The tensors of the file, or of the parts that an index names."""
    if (directory / TENSORS).exists() or not (directory / INDEX).exists():
        return read_tensors(directory / TENSORS)
    index = read_config(directory, INDEX)
    parts = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(parts, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in parts.values()
    ):
        raise ValueError(f"{INDEX}: weight_map must say a file of the folder for each.")
    tensors = {}
    for name in sorted(set(parts.values())):
        found, _ = read_tensors(directory / name)
        tensors |= {key: found[key] for key in found if parts.get(key) == name}
    missing = sorted(parts.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{INDEX} names tensors that are in no part: {missing[:5]}.")
    return tensors, {}


def read_config(directory, name=CONFIG):
    path = directory / name
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
        raise OSError(f"{path} is not a file but a folder, a pipe or a device.")
    if status.st_size > limit:
        raise ValueError(f"{path} has {status.st_size} bytes; {limit} are read.")


def read_tensors(path):
    assert_readable(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                kind = file.get_slice(key).get_dtype()
                if kind not in FLOATS:
                    raise ValueError(
                        f"the tensor {key!r} is of {kind}. {', '.join(FLOATS)} are "
                        "read: convert it, with torch by tensor.float()"
                    )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # safetensors has its own, and NumPy's pass through
        raise ValueError(f"{path} cannot be read: {error}.") from error
