"""LoRASimpleRNN, LoRALSTM, LoRAGRU, and every layer that runs a cell."""

import inspect
import types

import keras

from keras_lora.keras_internals import calls, classes, layer_state
from keras_lora.layers import merged_training, products
from keras_lora.layers.form import Axes, usual_axes
from keras_lora.layers.substituted import SeveralWeights

CELLS = (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell)

STARTS = """

    A   (inputs, rank)          starts as U(±1/sqrt(inputs))
    B   (rank, gates * units)   starts as 0
    C   (units, rank)           starts as U(±1/sqrt(units))
    D   (rank, gates * units)   starts as 0

W + scaling * A @ B and U + scaling * C @ D are formed once for a whole sequence, in
training too. Keras's own call runs on them, with cuDNN where the plain layer uses it.
The gradients of the factors go through arrays of the kernels' sizes, except in float32
loops that TensorFlow compiles, where each product has a low-rank gradient. `dropout`
and `recurrent_dropout` are Keras's; the adapters have none. At the start B and D are 0,
and the layer equals the Keras layer, whose arguments it takes. `layer.loras` holds both
adapters.
"""


class RecurrentLayer(SeveralWeights):
    """Mixin of a layer that runs a cell; the cell's weights have the adapters."""

    adapted_weights = linear_weights = ("kernel", "recurrent_kernel")

    @classmethod
    def weights_held(cls, layer):
        found = super().weights_held(layer)

        def walk(cell, keys, prefix):
            if isinstance(cell, keras.layers.Layer):
                found.extend(layer_state.weights_held(cell, prefix, keys))
            for place, inner in enumerate(getattr(cell, "cells", ())):
                walk(inner, (*keys, "cells", place), f"{prefix}cells/{place}/")

        walk(layer.cell, ("cell",), "")
        return found

    def calls_inside(self, kernels, training):
        """Calls of cells whose products have gradients of rank r.

        Otherwise a TensorFlow loop adds up a kernel-sized gradient at every step.
        """
        if training is not True or not calls.in_tensorflow_graph():
            return {}
        weights_of: dict = {}
        for site in self.sites().values():
            *keys, name = site.kernel_keys
            if computes_symbolically(classes.value_at(self, keys)[1]):
                weight = CellWeight(site, kernels[site.kernel_keys])
                weights_of.setdefault((*keys, "call"), {})[(name,)] = weight
        return {keys: call_of_cell(weights) for keys, weights in weights_of.items()}

    @classmethod
    def axes_of(cls, weight, ndim):
        convolves = (keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D)
        if issubclass(cls.plain_class, (*convolves, keras.layers.ConvLSTM3D)):
            return Axes(tuple(range(ndim - 1)))
        return usual_axes(ndim)


class CellWeight(products.AdaptedWeight):
    """A kernel of a cell: W + delta, formed outside of the loop over the steps."""

    factors = None

    def __init__(self, site, kernel):
        super().__init__(site, site.dtype_in_call)
        self.kernel = kernel
        # Not in half precision, where rounding would lose small updates.
        exact = self.dtype == site.lora.variable_dtype
        if exact and self.is_low_rank and site.form.input_axes == (0,):
            self.factors = site.lora.factors(self.dtype)

    def whole(self):
        return self.kernel

    def outputs(self, operation, args):
        multiplies = type(operation).__name__ == "Matmul" and args[1] is self
        if not multiplies or self.factors is None:
            return None
        return merged_training.product_with_update(args[0], self.kernel, *self.factors)


def computes_symbolically(cell):
    """Whether a cell is Keras's own, without functions that need real tensors."""
    names = ("activation", "recurrent_activation")
    functions = [getattr(cell, name, None) for name in names]
    return type(cell) in CELLS and all(
        isinstance(x, types.FunctionType) and x.__module__.startswith("keras.")
        for x in functions
        if x is not None
    )


def call_of_cell(weights):
    def call(cell, *args, **kwargs):
        return products.call_with_products(cell, type(cell), weights, args, kwargs)

    return call


class GatedLayer(RecurrentLayer):
    """Base class of LoRASimpleRNN, LoRALSTM and LoRAGRU."""

    keras_dropout = True

    def __init_subclass__(cls, **kwargs):
        if cls.__doc__ and STARTS not in cls.__doc__:
            first, *rest = inspect.cleandoc(cls.__doc__).partition("\n\nInput shape")
            cls.__doc__ = first + STARTS + "".join(rest).removeprefix("\n")
        super().__init_subclass__(**kwargs)


class LoRARNN(RecurrentLayer, keras.layers.RNN):
    """A layer that runs a cell of any class, or stacked cells."""

    plain_class = keras.layers.RNN


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRASimpleRNN(GatedLayer, keras.layers.SimpleRNN):
    """SimpleRNN layer with frozen kernels and a low-rank update of each.

        h' = activation(x @ (W + scaling * A @ B) + h @ (U + scaling * C @ D) + bias)

        W   (inputs, units)   frozen        U   (units, units)   frozen

    Input shape: `(batch, steps, inputs)`. Output shape: `(batch, units)`, or
    `(batch, steps, units)` with return_sequences=True.

    Examples:
        >>> layer = LoRASimpleRNN(16, rank=4)
        >>> tuple(layer(keras.ops.ones((2, 10, 8))).shape)
        (2, 16)
    """

    plain_class = keras.layers.SimpleRNN


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRALSTM(GatedLayer, keras.layers.LSTM):
    """LSTM layer with frozen kernels and a low-rank update of each.

        i, f, c, o = x @ (W + scaling * A @ B) + h @ (U + scaling * C @ D) + bias

        W   (inputs, 4 * units)   frozen        U   (units, 4 * units)   frozen

    Input shape: `(batch, steps, inputs)`. Output shape: `(batch, units)`, or
    `(batch, steps, units)` with return_sequences=True.

    Examples:
        >>> layer = LoRALSTM(16, return_sequences=True, rank=4)
        >>> tuple(layer(keras.ops.ones((2, 10, 8))).shape)
        (2, 10, 16)
        >>> sorted(layer.loras)
        ['kernel', 'recurrent_kernel']
    """

    plain_class = keras.layers.LSTM


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAGRU(GatedLayer, keras.layers.GRU):
    """GRU layer with frozen kernels and a low-rank update of each.

        z, r, c = x @ (W + scaling * A @ B) and h @ (U + scaling * C @ D), with biases

        W   (inputs, 3 * units)   frozen        U   (units, 3 * units)   frozen

    Input shape: `(batch, steps, inputs)`. Output shape: `(batch, units)`, or
    `(batch, steps, units)` with return_sequences=True.

    Examples:
        >>> layer = LoRAGRU(16, rank=4)
        >>> tuple(layer(keras.ops.ones((2, 10, 8))).shape)
        (2, 16)
    """

    plain_class = keras.layers.GRU
