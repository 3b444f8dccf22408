"""Whether what a file holds fits a model: values for its variables."""

import difflib
import itertools

import ml_dtypes
import numpy as np

from keras_lora.files.tensors import from_tensors
from keras_lora.files.tensors import kernel_to_tensor
from keras_lora.files.tensors import torch_name
from keras_lora.files.tensors import weight_from_tensor
from keras_lora.files.tensors import weight_to_tensor
from keras_lora.keras_internals.layers import layer_state
from keras_lora.layers.lora_layer import is_adapted
from keras_lora.layers.method_files import method_in
from keras_lora.layers.token_rows import KEYWORD


def refuse_other_modules(file):
    """An adapted model takes a file for the same layers only."""
    sites = {m: s for m, s in file.modules.sites.items() if is_adapted(s)}
    refuse_other_rows(sites, file)
    own = {m for m, site in sites.items() if site.lora.keyword != KEYWORD}
    missing, more = sorted(own - set(file.factors)), sorted(set(file.factors) - own)
    if missing or more:
        raise ValueError(
            "The file and the model adapt different layers. Only in the model: "
            f"{missing}. Only in the file: {more}. Call remove_lora(model) first: the "
            "file then brings its own."
        )
    for module, layer in file.adapted.items():
        found = {word for word, on in file.method_of(module).items() if on}
        own = {layer.lora.keyword} - {None}
        own |= {"frozen_start"} if layer.lora.has_start else set()
        if own != found:
            said, read = (" and ".join(sorted(x)) or "LoRA" for x in (own, found))
            raise ValueError(
                f"The adapter of {module!r} has {said}, and the file {read}. Call "
                "remove_lora(model) first: the file then brings its own."
            )


def refuse_other_rows(sites, file):
    """An adapted model takes a file for the same rows of the same tables only."""
    own = {m: s.lora.indices for m, s in sites.items() if s.lora.keyword == KEYWORD}
    found = {module: ids for module, (ids, _) in file.rows.items()}
    if own != found:
        raise ValueError(
            f"The model has {KEYWORD}={own}, and the file {found}. Call "
            "remove_lora(model) first: the file then brings its own."
        )


def refuse_changed_slices(file):
    """What a file has for a slice without A and B must leave the layer as it is."""
    for module, arrays in file.unadapted.items():
        if module not in file.modules:
            raise ValueError(f"`names` has no layer for {module!r} of the file.")
        method = method_in(file.method)
        expected = method.of_plain_layer(kernel_to_tensor(file.modules[module]))
        for suffix, value in arrays.items():
            if value.shape != expected[suffix].shape or not np.allclose(
                value, expected[suffix], rtol=1e-4, atol=0
            ):
                raise ValueError(
                    f"{suffix[1:]} of {module!r}, which has no A and B, does not leave "
                    "the model's kernel as it is: the file is of another base model."
                )


def checked_values(file):
    """[(variable, value)] for the whole file, of which every shape fits."""
    values = []
    for module, pair in file.factors.items():
        layer = file.adapted[module]
        rank, own = file.ranks[module], layer.lora.file_rank
        if rank != own:
            cut = (
                f" Or cut the file: combine_adapters([adapter], rank={own}) is the "
                "nearest of the model's rank."
            )
            raise ValueError(
                f"The rank of {module!r} is {rank} in the file and {own} in the model. "
                "Call remove_lora(model) first: the file then brings its own."
                f"{cut if rank > own else ''}"
            )
        values += from_tensors(layer, pair, module)
    for module, site in file.tables.items():
        _, rows = file.rows[module]
        expected = tuple(site.lora.rows.shape)
        if rows.shape != expected:
            raise ValueError(
                f"The file has rows of shape {rows.shape} for {module!r}; the model "
                f"needs {expected}."
            )
        values.append((site.lora.rows, rows))
    refuse_changed_slices(file)
    index = {}
    for module, layer in file.modules.items():
        infix = ".base_layer" if module in file.factors else ""
        for variable in itertools.chain(*layer_state(layer)):
            key = f"{module}{infix}.{torch_name(layer, variable)}"
            index[key] = layer, variable
            if module in file.heads and key not in file.others:
                hint = ""
                if layer.quantization_mode is not None:
                    hint = (
                        " The layer is quantized, and the file has it as it trained, "
                        "in float: leave it out with `filters` of `Model.quantize`."
                    )
                raise ValueError(f"The file has no tensor {key!r}.{hint}")
    for key, value in file.others.items():
        if key.endswith(".base_layer.weight"):
            continue  # PEFT repeats a targeted embedding or head
        if key not in index:
            close = difflib.get_close_matches(key, index, n=3)
            hint = f" Close are: {close}." if close else ""
            raise ValueError(f"Unexpected tensor {key!r}.{hint}")
        layer, variable = index[key]
        # Beside transformers' Conv1D there may be a head that is a Linear.
        linear = weight_to_tensor(layer, variable).shape
        is_linear = value.shape == linear and linear != linear[::-1]
        inputs_first = file.config["fan_in_fan_out"] and not is_linear
        value = weight_from_tensor(layer, variable, value, key, inputs_first)
        values.append((variable, value))
    for variable, value in values:
        limit = float(ml_dtypes.finfo(variable.dtype).max)
        if np.max(np.abs(value), initial=0) > limit:
            raise ValueError(
                f"A value for {variable.path!r} is finite in the file and infinite in "
                f"{variable.dtype}: it is above {limit:.3g}."
            )
    return values
