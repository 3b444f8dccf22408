"""Calls that a backward pass computes once more: keras.RematScope and keras.remat."""

import contextvars
import functools

import keras

from keras_lora.keras_internals.calls import inside_remat
from keras_lora.keras_internals.calls import is_recomputed
from keras_lora.keras_internals.hidden_state import DrawnSeeds
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.private_names import REMAT
from keras_lora.keras_internals.private_names import require

# Inside of a call that is computed twice: {id of an adapter: what its seeds are from}.
_seeds: contextvars.ContextVar[dict] = contextvars.ContextVar("seeds")


class Rematerialized:
    """Mixin of a LoRA layer, and of what holds some: computed twice, a call is one.

    JAX makes a tracer of every argument of such a call, `training` too, and
    TensorFlow's graphs take none by name: those without a gradient are bound to it
    before. The seeds of dropout are drawn before, so that both runs drop the same
    inputs.
    """

    def rematerialized_call(self, call, *args, **kwargs):
        require(REMAT)
        fixed = {name: x for name, x in kwargs.items() if not has_gradient(x)}
        seeds = drawn_seeds(self) if kwargs.get("training") is True else {}

        def bound(*args, **kwargs):
            token = _seeds.set({key: DrawnSeeds(seed) for key, seed in seeds.items()})
            try:
                return call(*args, **{**kwargs, **fixed})
            finally:
                _seeds.reset(token)

        run = super().rematerialized_call(bound, *args, **kwargs)

        @functools.wraps(call)
        def without_fixed(*args, **kwargs):
            return run(*args, **{n: x for n, x in kwargs.items() if n not in fixed})

        return without_fixed


def has_gradient(argument) -> bool:
    return any(
        keras.ops.is_tensor(x) and "float" in keras.backend.standardize_dtype(x.dtype)
        for x in keras.tree.flatten(argument)
    )


def drawn_seeds(layer) -> dict:
    """{id of an adapter that has dropout: a seed for one call of the layer}."""
    adapters = [getattr(part, "lora", None) for part in flatten_layers(layer)]
    dropping = [x for x in adapters if getattr(x, "seed_generator", None) is not None]
    return {id(adapter): generator_of(adapter).next() for adapter in dropping}


def generator_of(adapter):
    """Where the seeds of an adapter's dropout are from, in the call that runs now."""
    generator = _seeds.get({}).get(id(adapter))
    if generator is None and inside_remat():
        raise ValueError(
            "An adapter with dropout is called inside of keras.remat(function), which "
            "would drop different inputs when it runs the function again. Make the "
            "layers in a keras.RematScope, or set dropout=0."
        )
    return generator or adapter.seed_generator


def training_of(adapter, training):
    """Whether a call is one of training; as at first, where it is computed again.

    Keras knows it from the layer around, which is not called again.
    """
    if training is None and adapter.trains_in_call and is_recomputed():
        return True
    vars(adapter)["trains_in_call"] = training is True
    return training
