"""The tensors of a folder: their names as they are here, and whether they are whole."""

import hashlib
import json
import re

import numpy as np

from keras_lora.files.config import CONFIG
from keras_lora.files.config import stated
from keras_lora.files.pair import TENSORS
from keras_lora.files.pair import parsed
from keras_lora.files.patterns import LONGEST
from keras_lora.layers.method_files import more_suffixes

PREFIX = "base_model.model."
# Older PEFT, and a whole model's state dict, put the adapter's name into the keys.
NAMED = re.compile(
    r"\.lora_(?:(?:embedding_)?[AB]|magnitude_vector)\.(?!weight$)([^.]+)(?=\.|$)"
)
# Layers may be called as these are: where there is one, no key has an adapter's name.
UNNAMED = re.compile(r"\.lora_(?:[AB]\.weight|embedding_[AB])$")


def adapter_name(tensors):
    """What an adapter is called in the keys; None where PEFT left it out."""
    if any(map(UNNAMED.search, tensors)):
        return None
    names = {match[1] for key in tensors if (match := NAMED.search(key))}
    if len(names) > 1:
        raise ValueError(
            f"{TENSORS} holds several adapters, {sorted(names)}. Save one of them with "
            "PEFT's `model.save_pretrained(folder, selected_adapters=[name])`."
        )
    return names.pop() if names else None


def checked_tensors(tensors):
    """Module and suffix -> float32 or float64."""
    floats, more, adapter = {}, tuple(more_suffixes()), adapter_name(tensors)
    for key, value in tensors.items():
        if len(key) > LONGEST:
            raise ValueError(
                f"The tensor {key[:LONGEST]!r} has more than {LONGEST} characters."
            )
        if repeats_untrained(key, adapter, tensors):
            continue
        name = key
        if adapter is not None or magnitude_of_factors(key, tensors):
            name = NAMED.sub(lambda match: match[0][: -len(match[1]) - 1], key)
        name = name.replace(f".modules_to_save.{adapter}.", ".")
        name = name.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        if name.removesuffix(".weight").endswith(more):  # as parameters or as modules
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
    """Whether it is what PEFT's bias="all" repeats of a head: it was not trained."""
    parts = key.split(".original_module.", 1)
    trained = (".modules_to_save.", f".modules_to_save.{adapter}.", ".")
    return len(parts) == 2 and any(part.join(parts) in tensors for part in trained)


def digest(tensors, metadata):
    """SHA-256 of the tensors and of what the metadata says about them."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key]
        found.update(f"{key} {value.dtype} {value.shape}\n".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    for key in ("settings", "slices", "starts"):
        found.update(metadata.get(key, "").encode())
    return found.hexdigest()


def checked_metadata(metadata, config, tensors):
    """What a file of ours says of itself: the ranks of slices, and the starts."""
    if "settings" not in metadata:
        return {}, []
    found = digest(tensors, metadata)
    if metadata.get("sha256", found) != found:
        raise ValueError(f"{TENSORS} is damaged: its checksum does not fit.")
    stored, slices = (stated_in(metadata, key, {}) for key in ("settings", "slices"))
    starts = stated_in(metadata, "starts", [])
    if not all(isinstance(module, str) for module in starts):
        raise ValueError(f"{TENSORS}: starts are modules. Received: {starts!r}.")
    for ranks in slices.values():
        if not isinstance(ranks, list) or not all(
            type(rank) is int and rank >= 0 for rank in ranks
        ):
            raise ValueError(f"{TENSORS}: slices have ranks. Received: {ranks!r}.")
    said = stated(config)
    for key in stored | said:
        if stored.get(key) != said.get(key):
            raise ValueError(
                f"{CONFIG} and {TENSORS} do not belong together: {key} is "
                f"{said.get(key)!r} and {stored.get(key)!r}."
            )
    return slices, starts


def stated_in(metadata, key, default):
    """A value of the default's type."""
    try:
        value = parsed(metadata.get(key, json.dumps(default)))
    except ValueError as error:
        raise ValueError(f"{TENSORS} is damaged: {key}: {error}.") from error
    if type(value) is not type(default):
        kind = "an object" if isinstance(default, dict) else "a list"
        raise ValueError(f"{TENSORS}: {key} must be {kind}. Received: {value!r}.")
    return value
