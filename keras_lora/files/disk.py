"""The two files of a folder: read, checked and replaced together."""

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path

import numpy as np
import safetensors

from keras_lora.files import patterns
from keras_lora.files.config import CONFIG, reading_settings
from keras_lora.layers import torch_layout
from keras_lora.models import atomic

TENSORS = "adapter_model.safetensors"
INDEX = f"{TENSORS}.index.json"  # if the tensors are split into several files
FLOATS = ("F64", "F32", "F16", "BF16")
# The peft_type of adapter_config.json while both files are being replaced.
INTERRUPTED = "SAVE_INTERRUPTED"


def replace_files(directory, new, tensors, config, sha256):
    """Replaces both files; `new` is a temporary folder on the same disk."""
    atomic.write(new / TENSORS, tensors)
    atomic.write(new / CONFIG, config)
    old = matching_config(directory)
    if old not in (None, config):
        both = {"old": json.loads(old), "new": json.loads(config), "sha256": sha256}
        both["peft_type"] = INTERRUPTED
        atomic.write(new / "both", json.dumps(both).encode())
        atomic.write(new / "old", old)
        os.replace(new / "both", directory / CONFIG)
    try:
        os.replace(new / TENSORS, directory / TENSORS)
    except OSError:
        if (new / "old").exists():
            os.replace(new / "old", directory / CONFIG)
        raise
    os.replace(new / CONFIG, directory / CONFIG)


def matching_config(directory):
    """Returns adapter_config.json in bytes, or None if it does not fit the tensors."""
    try:
        config = read_config(directory)
        if settings_of_tensors(config, {}) is config:
            return (directory / CONFIG).read_bytes()
        _, metadata = read_tensors(directory / TENSORS)
        return json.dumps(settings_of_tensors(config, metadata)).encode()
    except (OSError, ValueError):
        return None


def settings_of_tensors(config, metadata):
    """Returns the settings that belong to the tensors.

    After an interrupted save, these are the old or the new ones.
    """
    if not isinstance(config, dict) or config.get("peft_type") != INTERRUPTED:
        return config
    written = config.get("sha256") == metadata.get("sha256")
    return config.get("new" if written else "old")


def read_together(directory):
    """Reads both files as they were at one moment, even while one is written."""
    for _ in range(9):
        config = read_config(directory)
        tensors, metadata = read_all(directory)
        if read_config(directory) == config:
            return settings_of_tensors(config, metadata), tensors, metadata
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
        raise ValueError(
            f"{INDEX}: weight_map must name a file of the folder for each tensor."
        )
    tensors = {}
    for name in sorted(set(parts.values())):
        arrays, _ = read_tensors(directory / name)
        tensors |= {key: arrays[key] for key in arrays if parts.get(key) == name}
    missing = sorted(parts.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{INDEX} lists tensors that no part has: {missing[:5]}.")
    return tensors, {}


def read_config(directory, name=CONFIG):
    path = directory / name
    refuse_unreadable_file(path, limit=2**24)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parse(text):
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_unreadable_file(path, limit=math.inf):
    """Raises for pipes and devices, which may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a file but a folder, a pipe or a device.")
    if status.st_size > limit:
        raise ValueError(
            f"{path} has {status.st_size} bytes; at most {limit} are read."
        )


def read_tensors(path):
    refuse_unreadable_file(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                kind = file.get_slice(key).get_dtype()
                if kind not in FLOATS:
                    raise ValueError(
                        f"the tensor {key!r} is of {kind}, and only "
                        f"{', '.join(FLOATS)} can be read. In torch, tensor.float() "
                        "converts it"
                    )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # safetensors' own, and NumPy's
        raise ValueError(f"{path} cannot be read: {error}.") from error


PEFT_PREFIX = "base_model.model."
# Older PEFT, and a whole model's state dict, put the adapter's name into the keys.
NAMED = re.compile(
    r"\.lora_(?:(?:embedding_)?[AB]|magnitude_vector)\.(?!weight$)([^.]+)(?=\.|$)"
)
# If one key matches, none has an adapter's name: a layer may be called "lora_A".
UNNAMED = re.compile(r"\.lora_(?:[AB]\.weight|embedding_[AB])$")


def adapter_name(tensors):
    """The adapter's name in the keys; None if PEFT left it out."""
    if any(map(UNNAMED.search, tensors)):
        return None
    names = {match[1] for key in tensors if (match := NAMED.search(key))}
    if len(names) > 1:
        raise ValueError(
            f"{TENSORS} holds several adapters, {sorted(names)}. Save one of them with "
            "PEFT's `model.save_pretrained(folder, selected_adapters=[name])`."
        )
    return names.pop() if names else None


def standardize_tensors(tensors):
    """Returns the tensors as float32 or float64, under module and suffix.

    Their names are without PEFT's prefix and the adapter's name.
    """
    floats, adapter = {}, adapter_name(tensors)
    suffixes = tuple(torch_layout.more_suffixes())
    for key, value in tensors.items():
        if len(key) > patterns.LONGEST:
            raise ValueError(
                f"The tensor {key[: patterns.LONGEST]!r} has more than "
                f"{patterns.LONGEST} characters."
            )
        if repeats_untrained(key, adapter, tensors):
            continue
        name = key
        if adapter is not None or magnitude_of_factors(key, tensors):
            name = NAMED.sub(lambda match: match[0][: -len(match[1]) - 1], key)
        name = name.replace(f".modules_to_save.{adapter}.", ".")
        name = name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.", ".")
        if name.removesuffix(".weight").endswith(suffixes):  # a parameter or a module
            name = name.removesuffix(".weight")
        value = value if value.dtype == "float64" else value.astype("float32")
        if not np.array_equal(floats.setdefault(name, value), value, equal_nan=True):
            raise ValueError(f"There are two tensors for {name!r}, which differ.")
    return floats


def magnitude_of_factors(key, tensors):
    """Whether a magnitude has an adapter's name in its key where A and B have none."""
    module = key.partition(".lora_magnitude_vector.")[0]
    endings = (".lora_A.weight", ".lora_embedding_A")
    return module != key and any(f"{module}{ending}" in tensors for ending in endings)


def repeats_untrained(key, adapter, tensors):
    """Whether this is the untrained copy of a head that PEFT's bias="all" adds."""
    parts = key.split(".original_module.", 1)
    trained = (".modules_to_save.", f".modules_to_save.{adapter}.", ".")
    return len(parts) == 2 and any(part.join(parts) in tensors for part in trained)


def digest(tensors, metadata):
    """SHA-256 of the tensors and of what the metadata says about them."""
    sha256 = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key]
        sha256.update(f"{key} {value.dtype} {value.shape}\n".encode())
        sha256.update(np.ascontiguousarray(value).tobytes())
    for key in ("settings", "slices", "starts"):
        sha256.update(metadata.get(key, "").encode())
    return sha256.hexdigest()


def validate_metadata(metadata, config, tensors):
    """Checks the metadata that keras_lora writes.

    Returns {module: ranks of its slices}, and the modules with initial values.
    """
    if "settings" not in metadata:
        return {}, []
    sha256 = digest(tensors, metadata)
    if metadata.get("sha256", sha256) != sha256:
        raise ValueError(f"{TENSORS} is damaged: its checksum does not match.")
    stored, slices = (
        read_metadata(metadata, key, {}) for key in ("settings", "slices")
    )
    starts = read_metadata(metadata, "starts", [])
    if not all(isinstance(module, str) for module in starts):
        raise ValueError(
            f"{TENSORS}: starts must be a list of modules. Received: {starts!r}."
        )
    for ranks in slices.values():
        if not isinstance(ranks, list) or not all(
            type(rank) is int and rank >= 0 for rank in ranks
        ):
            raise ValueError(
                f"{TENSORS}: slices must have lists of ranks. Received: {ranks!r}."
            )
    settings = reading_settings(config)
    for key in stored | settings:
        if stored.get(key) != settings.get(key):
            raise ValueError(
                f"{CONFIG} and {TENSORS} do not belong together: {key} is "
                f"{settings.get(key)!r} and {stored.get(key)!r}."
            )
    return slices, starts


def read_metadata(metadata, key, default):
    """Returns a value of the metadata, checked to have the default's type."""
    try:
        value = parse(metadata.get(key, json.dumps(default)))
    except ValueError as error:
        raise ValueError(f"{TENSORS} is damaged: {key}: {error}.") from error
    if type(value) is not type(default):
        kind = "an object" if isinstance(default, dict) else "a list"
        raise ValueError(f"{TENSORS}: {key} must be {kind}. Received: {value!r}.")
    return value
