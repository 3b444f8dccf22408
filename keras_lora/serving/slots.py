"""The factors of all adapters of one layer, side by side."""

import keras
import numpy as np
from keras import ops

from keras_lora.layers.methods import wide_dtype

BASE = 0  # the slot of the base model: zeros


class Stacks:
    """What a banked layer reads."""

    a = b = bias = gain = None

    def stacks(self) -> dict:
        found = {"a": self.a, "b": self.b, "bias": self.bias, "gain": self.gain}
        return {name: stack for name, stack in found.items() if stack is not None}


class Slots(Stacks, keras.layers.Layer):
    """Stacked variables, of which each adapter has a slot.

        A   (slots, *A's shape)   padded with zeros to the highest rank
        B   (slots, *B's shape)   scaling * B
        bias, gain                as they are combined with outputs; where needed

    The first slot is the base model's: zeros, and 1 for the gain. The last holds NaN
    in B, for ids that name nothing.

    Args:
        count: How many slots.
        rank: The highest rank that there is room for.
        form: The layer's, at that rank.
        bias_shape: Laid out over the outputs; None: no bias is kept.
        gain_shape: Laid out over the outputs; None: no gain is kept.
        dtype: That of the layer's variables, float32 at least.
    """

    def __init__(self, count, rank, form, bias_shape, gain_shape, dtype):
        super().__init__(dtype=wide_dtype(dtype), trainable=False)
        self.count, self.rank = count, rank
        self.a = self._stack("a", form.a_shape)
        self.b = self._stack("b", form.b_shape)
        self.write(count - 1, b=np.nan)
        if bias_shape is not None:
            self.bias = self._stack("bias", bias_shape)
        if gain_shape is not None:
            self.gain = self._stack("gain", gain_shape, "ones")
        self.built = True

    def _stack(self, name, shape, initializer="zeros"):
        return self.add_weight(
            name=name,
            shape=(self.count, *shape),
            initializer=initializer,
            trainable=False,
            autocast=False,
        )

    def rows(self, **values) -> dict:
        """Name -> what one slot holds; what is not named gets the base model's."""
        return {
            name: np.ascontiguousarray(
                np.broadcast_to(values.get(name, base_row(name)), stack.shape[1:]),
                self.variable_dtype,
            )
            for name, stack in self.stacks().items()
        }

    def write(self, slot, **values):
        for name, row in self.rows(**values).items():
            write_slot(self.stacks()[name], slot, row)


class WithTrainees(Stacks):
    """The stacks of a layer, and behind them what each trainee has there."""

    def __init__(self, host, adapters, trainees):
        slots, path = adapters.slots, adapters.name
        self.variable_dtype = slots.variable_dtype
        parts = [trainee.parts.get(path) for trainee in trainees]
        rows = [
            {} if part is None else part.rows(host.form, host.over_outputs)
            for part in parts
        ]
        for name, stack in slots.stacks().items():
            shape = stack.shape[1:]
            more = [
                ops.broadcast_to(row[name], shape)
                if name in row
                else ops.full(shape, base_row(name), stack.dtype)
                for row in rows
            ]
            setattr(self, name, ops.concatenate([stack, ops.stack(more)], axis=0))
        own = [0.0 if part is None else part.dropout for part in parts]
        self.dropout = np.array([0.0] * slots.count + own, "float32")


def base_row(name) -> float:
    """What the base model has in the place of an adapter's."""
    return 1.0 if name == "gain" else 0.0


def write_slot(stack, slot, value):
    """stack[slot] = value; threads that read see the old values or the new ones.

    The whole is written anew: once a TensorFlow variable was written to in place, every
    read copies all of it.
    """
    value = ops.convert_to_tensor(value[None])
    stack.assign(ops.scatter_update(stack, [[slot]], value))
