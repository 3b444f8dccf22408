"""An adapter from PEFT's files into a model."""

import collections
import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from keras_lora.files.config import remember_file
from keras_lora.files.contents import factors_of
from keras_lora.files.folder import Adapter
from keras_lora.files.names import module_names
from keras_lora.files.names import refuse_tied_head
from keras_lora.files.slices import fused_modules
from keras_lora.files.slices import outputs_axis
from keras_lora.files.slices import slices_of
from keras_lora.files.slices import without_slice
from keras_lora.files.tensors import file_rank
from keras_lora.files.tensors import from_tensors
from keras_lora.files.tensors import kernel_to_tensor
from keras_lora.files.tensors import own_alpha
from keras_lora.files.tensors import suffixes
from keras_lora.files.tensors import torch_name
from keras_lora.files.tensors import weight_from_tensor
from keras_lora.files.tensors import weight_to_tensor
from keras_lora.keras_internals import compile_again
from keras_lora.keras_internals import layer_state
from keras_lora.keras_internals import refuse_while_running
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.kinds import lora_class_of
from keras_lora.layers.kinds import obstacle
from keras_lora.layers.lora_layer import is_adapted
from keras_lora.layers.methods import METHODS
from keras_lora.models.adapt import checked_lora_layers
from keras_lora.models.change import adapted
from keras_lora.models.freezing import freeze_adapters
from keras_lora.models.freezing import freeze_all_but_lora
from keras_lora.models.freezing import train_adapters
from keras_lora.models.paths import layer_paths
from keras_lora.models.record import base_values
from keras_lora.models.record import remember_base
from keras_lora.models.record import state_of
from keras_lora.models.report import Report
from keras_lora.models.trainable_flags import trainable_state


def load_adapter(
    model,
    directory,
    names: str | Mapping | Callable | None = None,
    trainable: bool = True,
) -> Report:
    """Reads an adapter that `save_adapter` or PEFT has written.

    A plain model gets the LoRA layers that the file describes. A model that has
    adapters must have them where the file has them, with the same ranks; its alpha
    becomes the file's. Nothing is traced anew then: a compiled `predict` gives the
    new outputs at its next call. Everything is checked before anything is
    assigned. A thread that predicts meanwhile may see some layers with the old
    factors and some with the new ones.

    Heads and biases that trained beside another adapter, and that this file has not,
    get the values back that they had before.

    Args:
        model: A Keras model that is built.
        directory: Folder with adapter_config.json and adapter_model.safetensors,
            or an `Adapter`.
        names: As in `save_adapter`.
        trainable: Boolean, whether the adapter goes on training.

    Returns:
        The report of `keras_lora.summary`.

    Raises:
        ValueError: If a file is damaged, the two do not belong together, or they do
            not fit the model: a missing, unexpected, wrongly shaped or non-finite
            tensor; or inside `merged` or `disabled`. The model is then as before.
        OSError: If a file cannot be read.
    """
    adapter = directory if isinstance(directory, Adapter) else Adapter.read(directory)
    paths = layer_paths(model)
    file = contents(adapter, module_names(paths, names), names)
    refuse_tied_head(model, names, file.adapted | file.heads)
    layers, notes = {"": model, **paths}, []
    if any(map(is_adapted, layers.values())):
        checked_lora_layers(model)
        refuse_other_modules(file)
        values = checked_values(file)
        if not trainable:  # which compiles again
            refuse_while_running(model)
    else:
        path_of = {id(layer): path for path, layer in layers.items()}
        adapters = {
            path_of[id(layer)]: new_adapter(file, module)
            for module, layer in file.adapted.items()
        }
        with adapted(model, paths, adapters) as change:
            values = checked_values(file)
            freeze_all_but_lora(model, file.bias, list(file.heads.values()))
            notes += change.keep()
    remember_file(model, adapter.config)
    values += unread_base_values(layers, values)
    for variable, value in values:
        variable.assign(value)
    for module, layer in file.adapted.items():
        alpha = own_alpha(layer, file.alphas[module], file.use_rslora)
        layer.lora.set_alpha(alpha, file.use_rslora)
    before = trainable_state(layers)
    (train_adapters if trainable else freeze_adapters)(layers)
    if trainable_state(layers) != before:
        notes += compile_again(model)
    return Report(model, paths, notes=notes)


def unread_base_values(layers, values):
    """The base's own values for what trains beside A and B and the file has not."""
    read = {id(variable) for variable, _ in values}
    unread = []
    for layer in layers.values():
        if not isinstance(layer, LowRankAdapter):
            remember_base(layer, [v for v in state_of(layer) if id(v) in read])
            unread += [(v, x) for v, x in base_values(layer) if id(v) not in read]
    return unread


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds, under the names of a model's modules."""

    modules: dict  # module -> layer, for all of the model
    factors: dict  # module -> {suffix: array}
    others: dict  # key -> array, for what trained in full
    ranks: dict
    alphas: dict
    heads: dict  # module -> layer
    bias: str
    dropout: float
    use_rslora: bool
    method: dict  # the keyword of another method than LoRA
    inputs_first: bool
    unadapted: dict  # slice of an adapted module -> {suffix: array}

    @property
    def adapted(self):
        """Module -> layer, for those that the file has factors for."""
        return {module: self.modules[module] for module in self.factors}


def contents(adapter, modules, names) -> Contents:
    factors, others, ranks, alphas, config, unadapted = factors_of(adapter, modules)
    refuse_unknown_modules(factors, modules)
    refuse_ranks_without_values(factors, ranks, modules)
    file = Contents(
        modules=modules,
        factors=factors,
        others=others,
        ranks=ranks,
        alphas=alphas,
        heads=heads_of(config["modules_to_save"], modules, others),
        bias=config["bias"],
        dropout=config["dropout"],
        use_rslora=config["use_rslora"],
        method=config["method"],
        inputs_first=config["fan_in_fan_out"],
        unadapted=unadapted,
    )
    split_others(file)
    return file


def heads_of(names, modules, others):
    """{module: layer} that `modules_to_save` means: by a name or the end of one."""
    heads, slices = {}, collections.defaultdict(list)
    for module in modules:
        slices[without_slice(module)].append(module)
    for name in names:
        meant = [m for m in slices if m == name or m.endswith(f".{name}")]
        stored = [m for m in meant if any(key.startswith(f"{m}.") for key in others)]
        for module in stored:
            heads |= {part: modules[part] for part in slices[module]}
    if names and not heads:  # PEFT names those of other models too, its "score"
        raise ValueError(
            f"modules_to_save names {', '.join(map(repr, names))}, which is no layer "
            "that the file has tensors for."
        )
    return heads


def new_adapter(file, module):
    return {
        "rank": file.ranks[module],
        "alpha": file.alphas[module],
        "dropout": file.dropout,
        "use_rslora": file.use_rslora,
        **file.method,
    }


def split_others(file):
    """Biases and weights of a fused module become those of its slices, in place."""
    for module, count in fused_modules(file.modules).items():
        for key in [key for key in file.others if key.startswith(f"{module}.")]:
            value = file.others.pop(key)
            name = key.split(".")[-1]
            if key.endswith(".base_layer.weight"):
                continue  # PEFT repeats a targeted head
            axis = outputs_axis(value, file.inputs_first)
            if value.shape[axis] % count:
                raise ValueError(
                    f"The tensor {key!r} has shape {value.shape}, which does not "
                    f"divide into {count} slices."
                )
            parts = np.split(value, count, axis)
            for part, values in zip(slices_of(module, count), parts, strict=True):
                infix = ".base_layer" if part in file.factors else ""
                file.others[f"{part}{infix}.{name}"] = values


def refuse_unknown_modules(factors, modules):
    for module in factors:
        layer = modules.get(module)
        if layer is None or not can_hold(layer):
            close = difflib.get_close_matches(
                module, [m for m, x in modules.items() if can_hold(x)], n=3, cutoff=0.3
            )
            raise ValueError(
                f"The file has an adapter for {module!r}, which the model has not"
                f"{' in a form that can be adapted' if layer is not None else ''}. "
                f"Close are: {close}. `names` can map paths to modules."
            )


def refuse_ranks_without_values(factors, ranks, modules):
    """So that an adapter made for the file is no larger than the file."""
    for module, pair in factors.items():
        layer = modules[module]
        if is_adapted(layer) or not pair.keys() >= set(suffixes(layer)):
            continue
        a, b = (pair[suffix] for suffix in suffixes(layer))
        kernel = getattr(layer, lora_class_of(type(layer)).kernel_name)
        if a.size * b.size < ranks[module] ** 2 * math.prod(kernel.shape):
            raise ValueError(
                f"The factors of {module!r} have shapes {a.shape} and {b.shape}; they "
                f"do not make rank {ranks[module]} for a kernel of {kernel.shape}."
            )


def can_hold(layer):
    if is_adapted(layer):
        return True
    return lora_class_of(type(layer)) is not None and obstacle(layer) is None


def refuse_other_modules(file):
    """An adapted model takes a file for the same layers only."""
    own = {module for module, layer in file.modules.items() if is_adapted(layer)}
    missing, more = sorted(own - set(file.factors)), sorted(set(file.factors) - own)
    if missing or more:
        raise ValueError(
            "The file and the model adapt other layers. Only in the model: "
            f"{missing}. Only in the file: {more}."
        )
    word = next(iter(file.method), None)
    for module, layer in file.adapted.items():
        if layer.lora.keyword != word:
            raise ValueError(
                f"The adapter of {module!r} has {layer.lora.keyword or 'LoRA'}, and "
                f"the file {word or 'LoRA'}. Call remove_lora(model) first: the file "
                "then brings its own."
            )


def refuse_changed_slices(file):
    """What a file has for a slice without A and B must leave the layer as it is."""
    for module, arrays in file.unadapted.items():
        if module not in file.modules:
            raise ValueError(f"`names` has no layer for {module!r} of the file.")
        method = METHODS[next(iter(file.method), None)]
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
        layer = file.modules[module]
        if file.ranks[module] != file_rank(layer):
            raise ValueError(
                f"The rank of {module!r} is {file.ranks[module]} in the file and "
                f"{file_rank(layer)} in the model."
            )
        values += from_tensors(layer, pair, module)
    refuse_changed_slices(file)
    index = {}
    for module, layer in file.modules.items():
        infix = ".base_layer" if module in file.factors else ""
        for variable in itertools.chain(*layer_state(layer)):
            key = f"{module}{infix}.{torch_name(layer, variable)}"
            index[key] = layer, variable
            if module in file.heads and key not in file.others:
                raise ValueError(f"The file has no tensor {key!r}.")
    for key, value in file.others.items():
        if key.endswith(".base_layer.weight"):
            continue  # PEFT repeats a targeted embedding or head
        if key not in index:
            close = difflib.get_close_matches(key, index, n=3)
            raise ValueError(f"Unexpected tensor {key!r}. Close are: {close}.")
        layer, variable = index[key]
        # Beside transformers' Conv1D there may be a head that is a Linear.
        linear = weight_to_tensor(layer, variable).shape
        is_linear = value.shape == linear and linear != linear[::-1]
        inputs_first = file.inputs_first and not is_linear
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
