"""Calls that the backward pass repeats: keras.RematScope and keras.remat."""

import collections
import contextvars
import functools
from weakref import WeakKeyDictionary

import keras

from keras_lora.keras_internals import calls, layer_state, private_names, probes
from keras_lora.keras_internals.variable_state import DrawnSeeds

# Inside a call that is computed twice: {id of an adapter: the source of its seeds}.
_seeds: contextvars.ContextVar[dict] = contextvars.ContextVar("seeds")

# Calls with training=True that may be repeated: {adapter: its calls}.
_first_runs: WeakKeyDictionary = WeakKeyDictionary()
MOST_RUNS = 256  # that are remembered for an adapter

BACKEND = keras.backend.backend()


class Rematerialized:
    """Mixin for LoRA layers and their owners, whose calls may be computed twice.

    JAX traces every argument of such a call, `training` too, and TensorFlow's graphs
    take none by name, so arguments without a gradient are bound in advance. Dropout's
    seeds are drawn in advance too, so that both runs drop the same inputs.
    """

    def rematerialized_call(self, call, *args, **kwargs):
        probes.require(private_names.REMAT)
        fixed = {name: x for name, x in kwargs.items() if not has_gradient(x)}
        seeds = draw_seeds(self) if kwargs.get("training") is True else {}

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


def draw_seeds(layer) -> dict:
    """{id of an adapter that has dropout: a seed for one call of the layer}."""
    adapters: list = [
        getattr(x, "lora", None) for x in layer_state.flatten_layers(layer)
    ]
    dropping = [x for x in adapters if getattr(x, "seed_generator", None) is not None]
    return {
        id(adapter): calls.next_seed(adapter.seed_generator) for adapter in dropping
    }


def seed_of(adapter):
    """Returns the source of seeds for an adapter's dropout in the current call."""
    if id(adapter) in _seeds.get({}):
        return _seeds.get()[id(adapter)]
    if calls.inside_checkpoint():
        return calls.draw_in_checkpoint()
    if BACKEND == "tensorflow" and calls.recording_is_stopped(adapter.variables[0]):
        raise ValueError(
            "An adapter with dropout is called with training=True while TensorFlow "
            "records no gradients, as inside keras.remat(function), which would "
            "drop different inputs when it runs the function again. Make the "
            "layers in a keras.RematScope, or set dropout=0."
        )
    if BACKEND == "jax":
        return DrawnSeeds(calls.next_seed(adapter.seed_generator))
    return adapter.seed_generator


def training_of(adapter, training):
    """Whether a call is in training; a repeated call has the value of the first.

    Keras takes it from the layer around, which is not called again.
    """
    again = {"tensorflow": runs_again, "torch": runs_again_on_torch}.get(BACKEND)
    if again is not None and (training is None or training is True):
        return again(adapter, training) or training
    return training


def runs_again(adapter, training) -> bool:
    """Whether a call is the second run of one with training=True, on TensorFlow.

    In the first run no tape records. A call counts as its repetition only once, and
    only in the same graph.
    """
    if training is None and adapter not in _first_runs:
        return False
    graph = calls.tensorflow_graph()
    runs = _first_runs.setdefault(adapter, WeakKeyDictionary())
    if calls.recording_is_stopped(adapter.variables[0]):
        runs[graph] = runs.get(graph, 0) + (training is True)
        return False
    count = runs.pop(graph, 0)
    if count > 1:
        runs[graph] = count - 1
    return count > 0


def runs_again_on_torch(adapter, training) -> bool:
    """Whether a call is a second run on torch, where both draw the same number."""
    if not calls.inside_checkpoint():
        return False
    number = calls.draw_in_checkpoint()
    runs = _first_runs.setdefault(adapter, collections.deque(maxlen=MOST_RUNS))
    if training is True:
        runs.append(number)
    return number in runs
