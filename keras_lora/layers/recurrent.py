"""LoRASimpleRNN, LoRALSTM, LoRAGRU, and every layer that runs a cell."""

import inspect

import keras

from keras_lora.keras_internals import layers
from keras_lora.layers import substituted
from keras_lora.layers.substituted import Axes, SeveralWeights

STARTS = """

    A   (inputs, rank)              starts as U(±1/sqrt(inputs)); of the recurrent
                                    kernel (units, rank), as U(±1/sqrt(units))
    B   (rank, gates * units)       starts as 0

W + scaling * A @ B is formed once for a whole sequence, in training too, so that A and
B get their gradients by way of one array of the kernel's size; Keras's own call runs
on it, with cuDNN where the plain layer uses it. `dropout` and `recurrent_dropout` are
Keras's; the adapters have none. At the start B = 0, and the layer equals the Keras
layer, whose arguments it takes. `layer.loras` holds both adapters.
"""


class RecurrentLayer(SeveralWeights):
    """Mixin of a layer that runs a cell, whose weights have the adapters."""

    adapted_weights = linear_weights = ("kernel", "recurrent_kernel")

    @classmethod
    def places_of(cls, layer):
        found = layers.weight_places(layer)

        def walk(cell, keys, prefix):
            if isinstance(cell, keras.layers.Layer):
                for name, own in layers.weight_places(cell).items():
                    found[prefix + name] = (*keys, *own)
            for place, inner in enumerate(getattr(cell, "cells", ())):
                walk(inner, (*keys, "cells", place), f"{prefix}cells/{place}/")

        walk(layer.cell, ("cell",), "")
        return found

    @classmethod
    def axes_of(cls, weight, ndim):
        convolves = (keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D)
        if issubclass(cls.plain_class, (*convolves, keras.layers.ConvLSTM3D)):
            return Axes(tuple(range(ndim - 1)))
        return substituted.usual_axes(ndim)


class GatedLayer(RecurrentLayer):
    """Base class of LoRASimpleRNN, LoRALSTM and LoRAGRU."""

    keras_dropout = True

    def __init_subclass__(cls, **kwargs):
        if cls.__doc__ and STARTS not in cls.__doc__:
            first, *rest = inspect.cleandoc(cls.__doc__).partition("\n\nInput shape")
            cls.__doc__ = first + STARTS + "".join(rest).removeprefix("\n")
        super().__init_subclass__(**kwargs)


class LoRARNN(RecurrentLayer, keras.layers.RNN):
    """A layer that runs a cell of any class, and cells that are stacked."""

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

        z, r, h = x @ (W + scaling * A @ B) and h @ (U + scaling * C @ D), with biases

        W   (inputs, 3 * units)   frozen        U   (units, 3 * units)   frozen

    Input shape: `(batch, steps, inputs)`. Output shape: `(batch, units)`, or
    `(batch, steps, units)` with return_sequences=True.

    Examples:
        >>> layer = LoRAGRU(16, rank=4)
        >>> tuple(layer(keras.ops.ones((2, 10, 8))).shape)
        (2, 16)
    """

    plain_class = keras.layers.GRU
