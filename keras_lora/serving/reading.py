"""Reads what an adapter changes in each layer of a bank's model."""

import copy
import dataclasses
import math

import numpy as np
from keras import ops

from keras_lora.files import matching
from keras_lora.files.names import modules_of, refuse_tied_head
from keras_lora.keras_internals import classes, distribution
from keras_lora.keras_internals.layer_state import layer_variables
from keras_lora.layers import kinds, methods, torch_layout
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.models import choose, sites

UNREAD = object()  # placeholder for the adapter that a host may get


class Part:
    """What an adapter changes in one layer.

    Attributes:
        layer: The model's layer.
        view: A view of it as a LoRA layer, with or without an adapter in `lora`.
        bias, kernel: The adapter's own variables instead of the layer's, or None.
    """

    bias = kernel = None

    def __init__(self, layer, view):
        self.layer, self.view = layer, view

    @property
    def lora(self):
        return None if self.view.lora is UNREAD else self.view.lora

    @property
    def rank(self) -> int:
        """The rank of `factors`, which is the full rank of a kernel that trained."""
        if self.lora is not None:
            return self.lora.product_rank
        return 0 if self.kernel is None else full_rank(self.view)

    @property
    def has_gain(self) -> bool:
        return self.lora is not None and self.lora.has_gain

    @property
    def dropout(self) -> float:
        return 0.0 if self.lora is None else self.lora.dropout

    @property
    def in_full(self) -> bool:
        """Whether A and B represent a kernel that trained in full."""
        return self.lora is None and self.kernel is not None

    @property
    def depends_on_base(self) -> bool:
        """Whether the values in the bank fit only the model's present weights.

        This is so for DoRA's gain, and for differences of trained biases and kernels.
        """
        return self.has_gain or self.bias is not None or self.kernel is not None

    def factors(self):
        """A, scaling * B and gain, as from `LowRankAdapter.for_bank`, or three None."""
        if self.lora is not None:
            return self.lora.for_bank()
        if self.kernel is None:
            return None, None, None
        return (*full_update(self.view, self.kernel), None)

    def slot_values(self, host) -> dict:
        """Name -> value for one slot, as tensors with gradients.

        host: The layer in the bank, whose form has the same rank or a higher one.
        """
        values, (a, b, gain) = {}, self.factors()
        if a is not None:
            narrow = self.view.low_rank_form(self.rank)
            values["a"], values["b"] = narrow.widen(a, b, self.rank, host.form)
        if gain is not None:
            values["gain"] = host.form.over_outputs(gain)
        if self.bias is not None:
            change = ops.subtract(self.bias, self.layer.bias)
            values["bias"] = host.over_outputs(change)
        return values


def full_rank(view):
    sizes = view.kernel_shape
    return view.low_rank_form(1).highest_rank(sizes)


def full_update(view, kernel, checked=False):
    """Returns A and B, one of them the identity, with A @ B = kernel - W.

    checked: Whether to return None if the layer forms its update in another way.
    """
    dtype = methods.wide_dtype(view.variable_dtype)
    update = ops.convert_to_tensor(kernel, dtype) - view.base_kernel(dtype)
    rank = full_rank(view)
    form = view.low_rank_form(rank)
    matrix = ops.transpose(update, form.matrix_axes(len(update.shape)))
    lead = [update.shape[axis] for axis in form.batch_axes]
    eye = ops.broadcast_to(ops.eye(rank, dtype=update.dtype), (*lead, rank, rank))
    inputs = math.prod(update.shape[axis] for axis in form.input_axes)
    a, b = (eye, matrix) if rank == inputs else (matrix, eye)
    sizes = [math.prod(factor.shape) for factor in (a, b)]
    if checked and sizes != [math.prod(form.a_shape), math.prod(form.b_shape)]:
        return None
    a, b = ops.reshape(a, form.a_shape), ops.reshape(b, form.b_shape)
    if checked and not np.allclose(
        torch_layout.to_numpy(form.compose(a, b)), torch_layout.to_numpy(update)
    ):
        return None
    return a, b


@dataclasses.dataclass
class Reading:
    """What an adapter changes in a model, from `read`.

    Attributes:
        parts: Path -> Part, for the layers that the adapter changes.
        adapted: Module -> view, for the layers that have factors.
        modules: The model's `Modules`, with views of its layers.
        trained: [(module, layer, variable, own)] for variables that trained with the
            factors: the layer's, and the part's own, or None if rows share it.
    """

    parts: dict
    adapted: dict
    modules: dict
    trained: list


def lora_class_for(cls):
    """Returns a LoRA class itself, or that of a plain layer's class; None without."""
    return cls if issubclass(cls, LoRALayer) else kinds.lora_class_of(cls)


def host_view(layer):
    """Returns a view of a layer under its LoRA class; None if it cannot be adapted."""
    lora_class = lora_class_for(getattr(type(layer), "class_before", type(layer)))
    if lora_class is None or not layer.built:
        return None
    if not isinstance(layer, LoRALayer) and kinds.obstacle(layer) is not None:
        return None
    return classes.view_with(layer, lora_class, {"lora": UNREAD})


def read(paths, adapter, names, max_rank) -> Reading:
    """Reads what an adapter changes in each layer, without changing the model.

    Args:
        paths: The `Paths` of a plain model, or of one in a bank.
        adapter: An `Adapter`.
        names: As in `load_adapter`.
        max_rank: The highest rank that there is room for.

    Raises:
        ValueError: As in load_adapter; or if a rank is higher, or the adapter trains
            weights that all rows share.
    """
    modules = modules_of(paths, names, adapter)
    hosts = copy.copy(modules)  # with all its attributes
    hosts.update((module, host_view(x) or x) for module, x in modules.items())
    hosts.sites = {m: hosts.get(m, site) for m, site in modules.sites.items()}
    file = matching.match(adapter, hosts)
    if file.rows:
        raise ValueError(
            f"The adapter has rows of {sorted(file.rows)} (trainable_token_indices), "
            "which a bank cannot hold. Load it into a model of its own."
        )
    for module, site in file.sites.items():
        refuse_substituted(site, module)
    changed = {module: modules[module] for module in [*file.factors, *file.heads]}
    refuse_tied_head(paths.model, names, changed)
    for module, host in file.sites.items():
        lora = sites.new_adapter(host, file.options_of(module))
        if lora.product_rank > max_rank:
            raise ValueError(
                f"The adapter has rank {lora.product_rank} at {module!r}, but the bank "
                f"has room for {max_rank}. Create the bank with "
                f"max_rank={lora.product_rank}."
            )
        vars(host)["lora"] = lora  # past the tracker, which is the layer's
        host.build_adapter()
    parts = {
        paths.path_of[id(modules[module])]: Part(modules[module], host)
        for module, host in file.sites.items()
    }
    reading = Reading(parts, file.sites, hosts, [])
    module_of = {
        id(variable): module
        for module, host in hosts.items()
        for variable in layer_variables(host)
    }
    for variable, value in matching.values_for(file):
        module = module_of.get(id(variable))
        if module is None:  # a factor
            distribution.assign(variable, value)
        else:
            path = paths.path_of[id(modules[module])]
            add_trained_weight(reading, module, path, modules[module], variable, value)
    return reading


def bankable_sites(paths, target) -> dict:
    """Path -> site, for the sites of a target whose adapters a bank can hold."""
    chosen, _, _ = choose.choose(paths, target, None, [])
    able = {p: x for p, x in chosen.items() if kinds.form_of(x, 1).down is not None}
    if target not in choose.WHOLE_MODEL or not able:
        for path, site in chosen.items():
            refuse_substituted(site, path)
    return able


def refuse_substituted(site, name):
    """Raises for a weight whose layer uses one W + delta for all rows of a batch."""
    if kinds.form_of(site, 1).down is None:
        raise ValueError(
            f"A bank cannot hold adapters of {name!r}, a "
            f"{type(kinds.layer_of(site)).__name__}: its call computes with one "
            "W + delta for all rows of a batch. Load such an adapter into a model of "
            "its own."
        )


def add_trained_weight(reading, module, path, layer, variable, value):
    """Adds a bias, or a weight of a layer that trained in full, to a reading."""
    view, part, own = reading.modules[module], None, None
    if isinstance(view, LoRALayer):
        part = reading.parts.get(path, Part(layer, view))
    if part is not None and variable.name == "bias":
        part.bias = own = copy_variable(variable, value)
    elif part is not None and (own := full_kernel(part, variable, value)) is not None:
        part.kernel = own
    elif not np.array_equal(torch_layout.to_numpy(variable), value):
        raise ValueError(
            f"The adapter has trained {variable.name!r} of {path!r}, a "
            f"{type(layer).__name__}, which all rows of a batch share: a bank keeps "
            "only factors, biases and dense heads for each adapter. Train without it, "
            "or serve this adapter in a model of its own."
        )
    reading.trained.append((module, layer, variable, own))
    if own is not None:
        reading.parts[path] = part


def full_kernel(part, variable, value):
    """Returns the kernel that an adapter has trained in full, or None."""
    if part.lora is not None or variable.name != part.view.kernel_name:
        return None
    kernel = copy_variable(variable, value)
    return None if full_update(part.view, kernel, checked=True) is None else kernel


def copy_variable(like, value):
    copied = distribution.variable_like(
        like,
        value,
        dtype=methods.wide_dtype(like.dtype),
        name=like.name,
        autocast=False,
    )
    copied.regularizer = like.regularizer
    return copied
