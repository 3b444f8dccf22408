"""The layers and sites of a model, by their paths, and adapters at sites."""

import collections
import functools
import re

import keras

from keras_lora.keras_internals import classes, compiled, layer_state, processes
from keras_lora.layers import arguments, kinds, lora_layer, methods
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.lora_layer import LoRALayer


class Paths:
    """The layers and sites of a model, by their paths.

    Attributes:
        model: A Keras model or layer.
        layers: Path -> layer inside it, as in `layers_by_path`.
        sites: Path -> site, for all weights that can have an adapter.
    """

    def __init__(self, model, alone=True):
        self.model, self.layers = model, layers_by_path(model, alone)

    @property
    def with_model(self) -> dict:
        """Path -> layer, with the model itself as "" unless it is among them."""
        alone = any(layer is self.model for layer in self.layers.values())
        return dict(self.layers) if alone else {"": self.model, **self.layers}

    @functools.cached_property
    def sites(self) -> dict:
        return sites_by_path(self.layers)

    @functools.cached_property
    def sites_of(self) -> dict:
        """Path of a layer -> the paths of its sites.

        A layer that wraps another one, such as Bidirectional, has those of what it
        wraps.
        """
        own = collections.defaultdict(list)
        for path, site in self.sites.items():
            own[id(kinds.layer_of(site))].append(path)

        def paths_of(layer):
            inside = kinds.wrapped_layers(layer)
            return [x for part in inside for x in paths_of(part)] or own[id(layer)]

        return {path: paths_of(layer) for path, layer in self.layers.items()}

    @property
    def adapted(self) -> dict:
        """Path -> site, for those that have an adapter."""
        sites = sites_by_path(self.with_model)
        return {p: site for p, site in sites.items() if lora_layer.is_adapted(site)}

    @functools.cached_property
    def path_of(self) -> dict:
        """Id of a layer -> its path."""
        return {id(layer): path for path, layer in self.layers.items()}


def sites_by_path(layers_by_path) -> dict:
    """Path -> site, for all weights that can have an adapter, in the model's order.

    A layer with one kernel is a site under its own path. Other layers have a path for
    each weight, with its name at the end; a cell's weights have the path of the layer
    that runs it.
    """
    sites, of_cells = {}, set()
    for path, layer in layers_by_path.items():
        if id(layer) in of_cells:
            continue
        for weight, site in kinds.sites_of(layer).items():
            if site is layer:
                sites[path] = layer
            else:
                sites[f"{path}/{weight}" if path else weight] = site
                if site.kernel_owner() is not layer:
                    of_cells.add(id(site.kernel_owner()))
    return sites


def adapted_sites(model) -> list:
    """The sites of a model that have an adapter, each once."""
    lora_layers = [
        x for x in layer_state.flatten_layers(model) if isinstance(x, LoRALayer)
    ]
    return [site for layer in lora_layers for site in layer.sites().values()]


def built_sites(model):
    """Returns a model's sites with adapters; raises if there are none, or not built.

    Also puts back weights that a JAX loop has taken out, and waits until all processes
    have called.
    """
    compiled.restore_jax_weights(model)
    processes.barrier(model)
    sites = adapted_sites(model)
    if not sites:
        raise ValueError(
            f"{getattr(model, 'name', model)!r} holds no LoRA layer with an adapter "
            "(rank > 0). Call `apply_lora` or `load_adapter` first. (`merge_lora` and "
            "`remove_lora` remove adapters: save them before.)"
        )
    for site in sites:
        if site.lora.is_bank:
            raise ValueError(
                f"The layer {site.name!r} holds the adapters of an AdapterBank, and "
                f"only the bank may change them. Call {site.lora.removal_hint} first."
            )
        if not site.lora.built:
            raise ValueError(
                f"The LoRA layer {site.name!r} is not built yet. Build the model "
                "first, for example with `model.build(input_shape)`, or call it once."
            )
    return sites


def sites_outside_contexts(model):
    """Returns `built_sites`; raises if one is inside `merged()` or `disabled()`."""
    sites = built_sites(model)
    for site in sites:
        if site.lora.stand_in is not None or not site.lora.is_on:
            raise ValueError(
                f"The adapter of {site.name!r} is inside `merged()` or `disabled()`. "
                "Leave that context first."
            )
    return sites


def layers_by_path(model, alone=True) -> dict:
    """Path -> layer for every layer inside a model, each once, outermost first.

    A part of a path is the layer's name if somebody chose it, else the attribute that
    holds the layer, else its kind. Keras's automatic names (dense_7) are not used, as
    they count instances in the process. If a model puts its own name before those of
    its layers, as many in KerasHub do, it is left out. Equal parts are numbered.

    alone: Whether a single layer that can be adapted is among its own paths.
    """
    layer_state.validate_model(model)
    layer_state.refuse_reloaded_class(model)
    by_path, seen = {}, {id(model)}

    def walk(parent, prefix, owners):
        if isinstance(parent, keras.Model):
            owners = sorted((f"{parent.name}_", *owners), key=len, reverse=True)
        used = collections.Counter()
        attributes = {
            id(layer): name for name, layer in layer_state.attributes_of(parent)
        }
        for layer in layer_state.sublayers(parent):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            layer_state.refuse_reloaded_class(layer)
            part = (
                given_name(layer, owners, parent)
                or attributes.get(id(layer))
                or kind_in_words(type(layer))
            )
            used[part] += 1
            if used[part] > 1:
                part = f"{part}_{used[part] - 1}"
            by_path[prefix + part] = layer
            walk(layer, f"{prefix}{part}/", owners)

    prefix, kind = "", kinds.lora_class_of(type(model))  # type: ignore[arg-type]
    if alone and (kind is not None or isinstance(model, LoRALayer)):
        name = given_name(model, (), None) or kind_in_words(type(model))
        by_path[name], prefix = model, f"{name}/"
    walk(model, prefix, ())
    return by_path


def given_name(layer, owners, parent):
    """The layer's name without those of its owners; None if Keras made it up."""
    name = layer.name
    for owner in owners:
        name = name.removeprefix(owner) or name
    kind = re.sub(r"_\d+$", "", name)
    if isinstance(parent, keras.layers.Bidirectional):
        kind = re.sub("^(forward|backward)_", "", kind)  # Bidirectional adds a prefix
    return None if kind in automatic_names(type(layer)) else name


@functools.cache
def automatic_names(cls):
    """Returns Keras's automatic names for a class, without the number.

    They are the same for a layer with and without an adapter.
    """
    lora = [base for base in cls.__mro__ if getattr(base, "plain_class", None)]
    words = {
        arguments.snake_case(x.__name__)
        for x in (*lora, *class_without_adapter(cls).__mro__)
    }
    return frozenset(words | {f"lora_{kind_in_words(cls)}"})


def kind_in_words(cls):
    """The kind of a layer class in snake case, the same with and without an adapter."""
    return arguments.snake_case(class_without_adapter(cls).__name__)


def class_without_adapter(cls):
    """The class of a layer without its adapter."""
    while issubclass(cls, LoRALayer):
        cls = cls.plain_class
    return cls


def new_adapter(site, options) -> LowRankAdapter:
    """Creates an adapter for a site, without dropout if the site takes none."""
    site = kinds.as_site(site)
    if not site.takes_dropout:
        options = {**options, "dropout": 0.0}
    return methods.make_adapter(options, site.variable_dtype, site.adapter_attribute)


def add_adapter(site, adapter):
    """Gives a site an adapter; the site's layer becomes a LoRA layer."""
    layer = kinds.layer_of(site)
    if not isinstance(layer, LoRALayer):
        classes.change_class(layer, kinds.class_with_adapter(layer))
    site.attach_adapter(adapter)
    with layer_state.name_scope_of(layer):
        site.build_adapter()
        site.freeze_kernel()


def make_plain(layer):
    """Turns a LoRA layer into the Keras layer that it extends, with W as kernel."""
    for site in reversed(layer.sites().values()):
        lora = site.lora
        lora.switch(on=False)  # for functions that still hold the adapter
        site.detach_adapter()
        site.release_kernel(lora.kernel_place)
    for name in class_attributes(type(layer)) & vars(layer).keys():
        delattr(layer, name)
    classes.change_class(layer, layer.plain_class)


@functools.cache
def class_attributes(lora_class) -> set:
    """Returns attributes with a default in a LoRA class but not in its Keras class."""
    return {
        name
        for cls in lora_class.__mro__
        if issubclass(cls, LoRALayer)
        for name, default in vars(cls).items()
        if not (name.startswith("__") or callable(default) or hasattr(default, "fget"))
    }


def refuse_unbuilt(model):
    """Raises ValueError for a model without weights."""
    if not model.built and not model.weights:
        raise ValueError(
            f"The model {model.name!r} is not built yet: its layers have no kernels. "
            "Call it once, or `model.build(input_shape)`, first."
        )


def refuse_adapters(paths):
    """Raises if a layer of a model has an adapter already, or is in a bank."""
    for path, layer in paths.layers.items():
        if lora_layer.has_adapters(layer):
            lora = next(iter(layer.loras.values()))
            raise ValueError(
                f"The layer {path!r} has an adapter. Call {lora.removal_hint} first."
            )
