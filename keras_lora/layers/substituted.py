"""Adapters for layers that run their own call with W + delta instead of W."""

import itertools
from collections.abc import Mapping

import keras
from keras import ops

from keras_lora.keras_internals import classes, layer_state, variable_state
from keras_lora.layers import methods
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.form import Axes, usual_axes, weight_form
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.site import (
    Site,
    refuse_bound_functions,
    refuse_constraint,
    refuse_keras_adapter,
)


class SubstitutedSite(Site):
    """A weight that the layer's own Keras call reads, with W + delta instead.

        y = call(x) of the Keras layer in which W is W + scaling * A @ B

    in training and at inference. The gradients of A and B go through one array of the
    kernel's size, and in half precision W + delta is rounded in training too.
    """

    takes_dropout = False
    kernel_is_matrix = True

    def low_rank_form(self, rank):
        ndim = len(self.kernel_shape)
        axes = usual_axes(ndim)
        if issubclass(self.lora_class, SubstitutedLayer):
            axes = self.lora_class.axes_of(self.weight_name, ndim)
        return weight_form(self.kernel_shape, axes, rank)

    def freeze_kernel(self):
        """Also watches W, which other code than this layer's call may read."""
        super().freeze_kernel()
        variable_state.watch_reads(self.frozen_kernel, f"kernel of {self.name!r}")

    @property
    def dtype_in_call(self):
        """The dtype in which the call reads W."""
        place = self.lora.kernel_place
        casts = place is None or place.autocast
        return self.kernel_owner().compute_dtype if casts else self.kernel_dtype

    def kernel_in_call(self):
        """Returns W + delta, which the call uses instead of W."""
        lora = self.lora
        kernel = ops.stop_gradient(self.base_kernel(lora.variable_dtype))
        kernel = (lora.stand_in or lora).effective_kernel(kernel)
        return ops.cast(kernel, self.dtype_in_call)


class WeightSite(SubstitutedSite):
    """One weight of a layer that has several, adapted or not.

    It is created on each access; all state is on the layer and its adapters.

    Attributes:
        kernel_keys: The keys from the layer to W, as in `weight_places`.
    """

    # Plain attributes instead of Site's properties.
    lora_class = weight_name = kernel_keys = None

    def __init__(self, layer, weight, keys, lora_class):
        self.layer, self.lora_class = layer, lora_class
        self.weight_name, self.kernel_keys = weight, keys

    def lora_layer(self):
        return self.layer

    def refuse_unadaptable(self):
        """Raises ValueError if an adapter would not work here."""
        refuse_keras_adapter(self.layer)
        refuse_bound_functions(self.layer)
        constraint = self.frozen_kernel.constraint
        refuse_constraint(self.layer, f"{self.weight_name}_constraint", constraint)

    @property
    def name(self):
        return f"{self.lora_layer().name}/{self.weight_name}"

    def kernel_owner(self):
        return classes.value_at(self.lora_layer(), self.kernel_keys)[0]

    @property
    def frozen_kernel(self):
        return classes.value_at(self.lora_layer(), self.kernel_keys)[1]

    @property
    def kernel(self):
        return self.frozen_kernel

    @property
    def lora(self):
        return vars(self.layer).get(self.adapter_attribute)

    @property
    def built(self):
        return self.lora_layer().built

    @property
    def kernel_shape(self):
        return tuple(self.frozen_kernel.shape)

    @property
    def kernel_dtype(self):
        return self.frozen_kernel.dtype

    @property
    def variable_dtype(self):
        return self.kernel_owner().variable_dtype

    @property
    def compute_dtype(self):
        return self.kernel_owner().compute_dtype

    @property
    def in_all_linear(self):
        names = getattr(self.lora_class, "linear_weights", ())
        return self.weight_name.rpartition("/")[2] in names

    @property
    def adapter_attribute(self):
        return attribute(self.weight_name)

    def __eq__(self, other):
        if not isinstance(other, WeightSite):
            return NotImplemented
        return self.layer is other.layer and self.weight_name == other.weight_name

    def __hash__(self):
        return hash((id(self.layer), self.weight_name))


def variable_ids(layer, places):
    """Returns the ids of a layer's variables at some places; None if one is gone."""
    try:
        every = itertools.chain(*places.values())
        return [id(classes.value_at(layer, keys)[1]) for keys in every]
    except (AttributeError, LookupError):
        return None


KEPT = "_kept_places"


def attribute(weight):
    """Returns the attribute that holds the adapter of one of several weights."""
    return f"lora_{weight.replace('/', '_')}"


class SubstitutedLayer(SubstitutedSite, LoRALayer):
    """Mixin of a layer that runs its Keras class's call with W + delta for W.

    Attributes:
        adapted_weights: The weights that its constructor gives adapters.
        weight_axes: Name of a weight -> its `Axes`, if they are not the usual ones.
        linear_weights: The weights in the target "all-linear".
        constructs: Whether it can be constructed; else only `apply_lora` makes it.
    """

    replaces = ()
    is_leaf = False
    adapted_weights: tuple[str, ...] = ("kernel",)
    weight_axes: Mapping[str, Axes] = {}
    linear_weights: tuple[str, ...] = ()
    constructs = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "plain_class" in cls.__dict__:  # Keras reads both signatures
            cls.call = classes.with_signature_of(cls.call, cls.plain_class.call)
            if cls.constructs:
                cls.build = classes.with_signature_of(
                    SubstitutedLayer.build, cls.plain_class.build
                )

    @classmethod
    def weights_held(cls, layer) -> list:
        """(prefix of its name, keys, weight) for each place of a weight."""
        return layer_state.weights_held(layer)

    @classmethod
    def places_of(cls, layer) -> dict:
        """Name of a weight -> the keys to each of its places."""
        return layer_state.named_places(cls.weights_held(layer))

    @classmethod
    def axes_of(cls, weight, ndim) -> Axes:
        return cls.weight_axes.get(weight) or usual_axes(ndim)

    @classmethod
    def check_host(cls, layer):
        refuse_keras_adapter(layer)
        refuse_bound_functions(layer)
        if not layer.built:  # called by its constructor
            words = {weight.removesuffix("_kernel") for weight in cls.adapted_weights}
            names = {f"{word}_constraint" for word in words} | vars(layer).keys()
            for name in sorted(names):
                if name.endswith("_constraint") and name != "bias_constraint":
                    refuse_constraint(layer, name, getattr(layer, name, None))
        if layer.built and cls.kernel_name is not None:
            keys, *_ = cls.places_of(layer)[cls.kernel_name]
            _, kernel = classes.value_at(layer, keys)
            refuse_constraint(layer, f"{kernel.name}_constraint", kernel.constraint)

    @property
    def in_all_linear(self):
        return self.weight_name in self.linear_weights

    def kept_places(self) -> dict:
        """Returns `places_of`, cached while adapters and weights are the same."""
        adapters = [n for n, x in vars(self).items() if isinstance(x, LowRankAdapter)]
        places, *kept_for = vars(self).get(KEPT, ({}, [], []))
        if not places or kept_for != [adapters, variable_ids(self, places)]:
            places = self.places_of(self)
            # Not an attribute that Keras and torch track.
            vars(self)[KEPT] = places, adapters, variable_ids(self, places)
        return places

    @property
    def kernel_keys(self):
        return self.kept_places()[self.kernel_name][0]

    @property
    def frozen_kernel(self):
        return classes.value_at(self, self.kernel_keys)[1]

    @property
    def factor_regularizer(self):
        return self.frozen_kernel.regularizer

    def build(self, *args, **kwargs):
        super(LoRALayer, self).build(*args, **kwargs)
        self.after_build()

    def call(self, *args, **kwargs):
        sites = self.sites().values()
        if not sites:
            return self.plain_class.call(self, *args, **kwargs)
        places, kernels = self.kept_places(), {}
        for site in sites:
            kernels |= dict.fromkeys(places[site.weight_name], site.kernel_in_call())
        kernels |= self.calls_inside(kernels, kwargs.get("training"))
        try:
            return classes.call_with(self, self.plain_class, kernels, args, kwargs)
        except AttributeError as error:
            self.refuse_attribute(error, kernels)
            raise

    def refuse_attribute(self, error, kernels):
        """Raises if a call has read from W + delta what only variables have."""
        for keys, kernel in kernels.items():
            if error.obj is kernel:
                raise ValueError(
                    f"The call of {self.name!r} reads `.{error.name}` of its weight "
                    f"{'/'.join(map(str, keys))!r}, which is a tensor in the call, "
                    "W + delta, because it has an adapter. Use the weight itself, or "
                    "leave the layer out with exclude=."
                ) from error

    def calls_inside(self, kernels, training) -> dict:
        """Calls of inner layers that compute their products in another way."""
        return {}

    def quantize(self, *args, **kwargs):
        if self.loras and self.plain_class.quantize is not keras.layers.Layer.quantize:
            raise ValueError(
                f"The layer {self.name!r} has an adapter that replaces its float "
                "kernel in calls. Merge or remove it before the layer is quantized."
            )
        return self.plain_class.quantize(self, *args, **kwargs)


class SeveralWeights(SubstitutedLayer):
    """Mixin of a layer with several weights, each of which can have an adapter."""

    kernel_name = None

    def sites(self) -> dict:
        places = self.kept_places() or dict.fromkeys(self.adapted_weights, (None,))
        sites = {
            name: WeightSite(self, name, keys, type(self))
            for name, (keys, *_) in places.items()
        }
        return {name: site for name, site in sites.items() if site.lora is not None}

    @property
    def lora(self):
        loras = self.loras
        if len(loras) > 1:
            raise AttributeError
        return next(iter(loras.values()), None)

    def __getattr__(self, name):
        if name == "lora":  # torch's error would have no reason
            raise AttributeError(
                f"{self.name!r} has an adapter for each of {', '.join(self.loras)}: "
                "take them from `layer.loras`."
            )
        if hasattr(super(), "__getattr__"):  # of torch
            return super().__getattr__(name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}.")

    def attach_adapters(self, options):
        self.refuse_dropout(options)
        own_options = options.pop("adapters")
        for weight in self.adapted_weights:
            chosen = own_options.get(weight, options)
            if chosen is not None:
                name = attribute(weight)
                layer_state.attach(
                    self, name, methods.make_adapter(chosen, self.variable_dtype, name)
                )

    def adapter_config(self):
        adapters = {weight: lora.options() for weight, lora in self.loras.items()}
        first = next(iter(adapters.values()), {"rank": 0})
        others = {
            w: adapters.get(w) for w in self.adapted_weights if adapters.get(w) != first
        }
        config = {**first, "adapters": others} if adapters and others else dict(first)
        if self.keras_dropout:
            config.pop("dropout", None)
        return config
