"""What an adapter's files say about the layers of a bank, without touching them."""

import copy
import dataclasses
import math

import numpy as np
from keras import ops

from keras_lora.files.fitting import checked_values
from keras_lora.files.folder import Adapter
from keras_lora.files.for_model import contents
from keras_lora.files.load import new_adapter as options_of
from keras_lora.files.names import module_names
from keras_lora.files.names import refuse_tied_head
from keras_lora.files.tensors import own_alpha
from keras_lora.keras_internals.layers import layer_state
from keras_lora.keras_internals.layers import twin
from keras_lora.layers.kinds import lora_class_of
from keras_lora.layers.kinds import obstacle
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.torch_layout import to_numpy
from keras_lora.models.adapt import new_adapter

UNREAD = object()  # in the place of the adapter that a host may get


@dataclasses.dataclass
class Values:
    """What an adapter makes of one layer, as NumPy arrays; None: nothing.

    Attributes:
        rank: Of A and B, the layer's for these shapes.
        a, b: A and scaling * B.
        bias: What is added to the layer's own.
        gain: As in `LowRankAdapter.for_bank`.
        in_full: Whether A and B are a kernel that trained in full.
    """

    rank: int = 0
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    bias: np.ndarray | None = None
    gain: np.ndarray | None = None
    in_full: bool = False


def as_host(layer):
    """The layer seen as the LoRA layer that it would be; None where it can be none."""
    if isinstance(layer, LoRALayer):
        own = getattr(type(layer), "class_before", type(layer))
        own = own if issubclass(own, LoRALayer) else lora_class_of(own)
    else:
        own = lora_class_of(type(layer))
        if own is None or obstacle(layer) is not None:
            return None
    return twin(layer, own, {"lora": UNREAD}) if layer.built else None


def read(model, paths, adapter, names, most=math.inf) -> dict:
    """{path: Values} of the layers that an adapter changes.

    Args:
        model: A plain model, or one in a bank.
        paths: Path -> layer, of all its layers.
        adapter: A folder or an `Adapter`.
        names: As in `load_adapter`.
        most: The highest rank that there is room for.

    Raises:
        ValueError: Where load_adapter has one, a rank is higher, or the adapter trains
            what cannot be one row's own.
    """
    if not isinstance(adapter, Adapter):
        adapter = Adapter.read(adapter)
    modules = module_names(paths, names, model, adapter)
    path_of = {id(layer): path for path, layer in paths.items()}
    hosts = copy.copy(modules)  # with all that is known of the modules
    hosts.update((module, as_host(x) or x) for module, x in modules.items())
    for module, layer in modules.items():
        path_of[id(hosts[module])] = path_of[id(layer)]
    file = contents(adapter, hosts, names)
    changed = {module: modules[module] for module in [*file.factors, *file.heads]}
    refuse_tied_head(model, names, changed)
    for module, host in file.adapted.items():
        rank = own_rank(host, file.ranks[module], module)
        if rank > most:
            raise ValueError(
                f"The adapter has rank {rank} at {module!r}, and the bank has room for "
                f"{most}. Make the bank with max_rank={rank}."
            )
        refuse_rank_without_values(host, rank, file.factors[module], module)
        options = {**options_of(file, module), "rank": rank, "alpha": None}
        lora = new_adapter(host, options)
        vars(host)["lora"] = lora  # not its tracker, which is the layer's
        lora.build(host.low_rank_form(rank), None, host.base_kernel)
    pairs = checked_values(file)
    for variable, value in pairs:
        if any(
            variable is factor
            for host in file.adapted.values()
            for factor in host.lora.named_factors().values()
        ):
            variable.assign(value)
    found = {}
    for module, host in file.adapted.items():
        alpha = own_alpha(host, file.alphas[module], file.use_rslora)
        host.lora.set_alpha(alpha, file.use_rslora)
        a, b, gain = (None if x is None else to_numpy(x) for x in host.lora.for_bank())
        found[path_of[id(host)]] = Values(host.lora.rank, a, b, gain=gain)
    add_others(found, pairs, hosts.values(), path_of)
    return found


def own_rank(host, rank, module):
    """The layer's rank for the rank that a file says of a module."""
    parts = host.low_rank_form(1).file_rank or 1  # updates side by side
    if rank % parts:
        raise ValueError(
            f"The rank of {module!r} is {rank} in the file, which does not divide into "
            f"the {parts} updates of the layer."
        )
    return rank // parts


def refuse_rank_without_values(host, rank, arrays, module):
    """So that what is made for a file is no larger than the file."""
    form = host.low_rank_form(rank)
    size = sum(value.size for value in arrays.values())
    if max(math.prod(form.a_shape), math.prod(form.b_shape)) > size:
        shapes = [value.shape for value in arrays.values()]
        raise ValueError(
            f"The factors of {module!r} have shapes {shapes}; they do not make rank "
            f"{rank} for a kernel of {host.kernel_shape}."
        )


def add_others(found, pairs, layers, path_of):
    """What trained beside the factors: biases, and layers in full."""
    owners = {
        id(variable): layer
        for layer in layers
        for variables in layer_state(layer)
        for variable in variables
    }
    for variable, value in pairs:
        layer = owners.get(id(variable))
        if layer is None or np.array_equal(to_numpy(variable), value):
            continue  # a factor, or as in the base model
        path = path_of[id(layer)]
        values = found.setdefault(path, Values())
        if not isinstance(layer, LoRALayer):
            raise ValueError(unable(path, layer, variable))
        if variable.name == "bias":
            values.bias = value - to_numpy(variable)
        elif variable.name == layer.kernel_name and values.a is None:
            update = full_update(layer, value)
            if update is None:
                raise ValueError(unable(path, layer, variable))
            values.rank, values.a, values.b = update
            values.in_full = True
        else:
            raise ValueError(unable(path, layer, variable))


def unable(path, layer, variable):
    return (
        f"The adapter has trained {variable.name!r} of {path!r}, a "
        f"{type(layer).__name__}, which rows of one batch share: a bank keeps factors, "
        "biases and dense heads for each adapter. Train without it, or serve this "
        "adapter as a model of its own."
    )


def full_update(layer, value):
    """(rank, A, B) with A @ B = value - W, one of them the identity, or None."""
    update = value - to_numpy(layer.base_kernel(layer.variable_dtype))
    matrix, _ = layer.low_rank_form(1).as_matrix(update)
    rank = min(matrix.shape[-2:])
    form = layer.low_rank_form(rank)
    eye = np.eye(rank, dtype=matrix.dtype)
    eye = np.broadcast_to(eye, (*matrix.shape[:-2], rank, rank))
    a, b = (matrix, eye) if rank == matrix.shape[-1] else (eye, matrix)
    if (a.size, b.size) != (math.prod(form.a_shape), math.prod(form.b_shape)):
        return None  # the layer's update is another product
    a, b = a.reshape(form.a_shape), b.reshape(form.b_shape)
    if not np.allclose(
        to_numpy(form.compose(*map(ops.convert_to_tensor, (a, b)))), update
    ):
        return None
    return rank, a, b
