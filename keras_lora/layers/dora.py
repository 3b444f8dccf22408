"""DoRA: LoRA's update, with a trained magnitude for each column of the kernel."""

import string

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import calls
from keras_lora.layers import torch_layout
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.form import last_axes
from keras_lora.layers.torch_layout import DoRAFiles

[MAGNITUDE] = DoRAFiles.more_suffixes


@keras.saving.register_keras_serializable(package="keras_lora")
class DoRAAdapter(DoRAFiles, LowRankAdapter):
    """Trainable factors A and B, and a trainable magnitude m of each column.

        V  = W + scaling * A @ B
        n  = ||V|| over the axes that are summed over; no gradient goes through n
        W' = V * m / n

    Neither W' nor V is formed in training: n comes from products with A and B.

        y   = (m / n) * (linear(x, W) + linear(x, A) @ (scaling * B))
        n^2 = ||W||^2 + sum over r of scaling * B * (2 A^T W + A^T A @ (scaling * B))

    A^T W reads W once more in every call, and ||W||^2 stores the squares of W unless a
    compiler fuses it. For an embedding, this reads the whole table, at inference too.
    With dropout there is a second full product:

        y = linear(x, W) + (m / n - 1) * linear(drop(x), W)
            + (m / n) * linear(drop(x), A) @ (scaling * B)

    m starts as n, so that nothing changes. A column of zeros stays zero until B moves
    it. `start_from_kernel` resets m if W was assigned later. `delta()` is
    scaling * A @ B, without m.

    Reference:
        [DoRA: Liu et al., 2024](https://arxiv.org/abs/2402.09353)
    """

    has_gain = takes_start = True
    factor_names = ("a", "b", "magnitude")

    def build_factors(self, form, regularizer):
        super().build_factors(form, regularizer)
        if calls.traced_for_xla():
            raise ValueError(
                "With `use_dora` a layer cannot be built inside a function that XLA "
                "compiles: m starts from W. Build the model first, with "
                "`model.build(input_shape)` or by one call."
            )
        sizes = tuple(self.read_kernel().shape)
        refuse_other_products(form, sizes)
        shape = [n for axis, n in enumerate(sizes) if axis not in form.input_axes]
        if form.adapted_outputs is not None:
            shape = [int(np.sum(form.adapted_outputs))]
        # An initializer, because W may have no value yet if the layer is built inside a
        # compiled function.
        self.magnitude = self.add_factor(
            "magnitude", shape, lambda shape, dtype: self.starting_magnitude()
        )

    def starting_magnitude(self):
        a, b = self.unscaled_factors()
        norm = self.norm(self.read_kernel(), a, ops.multiply(b, self.scaling))
        return self.select_adapted(norm)

    def start_from_kernel(self):
        self.magnitude.assign(self.starting_magnitude())

    def norm(self, kernel, a, scaled_b):
        """n, in the shape of the kernel's axes that are not summed over."""
        form = self.form
        a, b = ops.convert_to_tensor(a), form.spread(scaled_b)
        a, b, kernel = (ops.stop_gradient(value) for value in (a, b, kernel))
        axes = string.ascii_lowercase[: len(kernel.shape)]
        inputs, batch = (
            "".join(axes[axis] for axis in own)
            for own in (form.input_axes, form.batch_axes)
        )
        others = "".join(axis for axis in axes if axis not in inputs)
        new = "".join(axis for axis in others if axis not in batch)
        of_a, of_b = f"{batch}{inputs}", f"{batch}Y{new}"
        with_a = ops.einsum(f"{of_a}X,{of_a}Y->{batch}XY", a, a)
        with_a = ops.einsum(f"{batch}XY,{of_b}->{batch}X{new}", with_a, b)
        with_kernel = ops.einsum(f"{of_a}Y,{axes}->{of_b}", a, kernel)
        update = ops.sum(b * (2 * with_kernel + with_a), axis=len(batch))
        update = ops.transpose(update, [(batch + new).index(axis) for axis in others])
        squares = ops.sum(ops.square(kernel), axis=form.input_axes)
        return ops.sqrt(ops.maximum(squares + update, 0))

    def gain(self, kernel):
        """m / n for each output; 1 where W + delta is 0, and in `disabled()`."""
        norm = self.norm(kernel, *self.factors(self.variable_dtype))
        norm = self.select_adapted(norm)
        there = norm > 0
        gain = ops.divide(self.magnitude, ops.where(there, norm, 1))
        acts = ops.logical_and(there, self.switched > 0)
        return self.expand_to_outputs(ops.where(acts, gain, 1))

    def select_adapted(self, values):
        """Returns the values of those outputs that the update reaches."""
        adapted = self.form.adapted_outputs
        if adapted is None:
            return values
        return ops.take(values, np.flatnonzero(adapted))

    def expand_to_outputs(self, gain):
        """Returns a gain for every output: 1 for those without an update."""
        adapted = self.form.adapted_outputs
        if adapted is None:
            return gain
        places = np.where(adapted, np.cumsum(adapted) - 1, np.sum(adapted))
        return ops.take(ops.append(gain, ops.ones((1,), gain.dtype)), places)

    def effective_kernel(self, kernel):
        """V * m / n."""
        kernel = ops.cast(kernel, self.variable_dtype)
        gain = self.form.over_kernel(self.gain(kernel))
        return ops.multiply(super().effective_kernel(kernel), gain)

    def low_rank_outputs(self, host, inputs, training):
        gain = self.gain(host.base_kernel(self.variable_dtype))
        gain = self.form.over_outputs(gain)
        if host.form.input_axes != self.form.input_axes:  # it works backwards
            inputs = ops.convert_to_tensor(inputs)
            inputs = ops.cast(self.times(inputs, gain), inputs.dtype)
            return super().low_rank_outputs(host, inputs, training)
        if not training or self.dropout == 0:
            outputs = super().low_rank_outputs(host, inputs, training)
            return ops.cast(self.times(outputs, gain), outputs.dtype)
        dropped = self.apply_dropout(inputs)  # once: one mask for both terms
        bypass = host.form.bypass(dropped, *self.factors(host.compute_dtype))
        update = self.times(host.frozen_linear(dropped), gain - 1)
        update = ops.add(update, self.times(bypass, gain))
        return ops.add(host.frozen_linear(inputs), ops.cast(update, bypass.dtype))

    def for_bank(self):
        return (*self.factors(self.variable_dtype), self.gain(self.read_kernel()))

    def times(self, values, gain):
        """Multiplies in float32 at least: half precision would move whole columns."""
        return ops.multiply(ops.cast(values, self.variable_dtype), gain)

    def to_file(self, suffixes):
        magnitude = torch_layout.to_numpy(self.magnitude)
        adapted = self.form.adapted_outputs
        if adapted is not None:
            norm = self.own_norm()
            norm[adapted] = magnitude
            magnitude = norm
        magnitude = self.form.vector_to_file(magnitude)
        return {**super().to_file(suffixes), MAGNITUDE: magnitude}

    def from_file(self, arrays, suffixes):
        magnitude, adapted = arrays[MAGNITUDE], self.form.adapted_outputs
        if adapted is None:
            magnitude = magnitude.reshape(self.magnitude.shape)
        else:
            others = magnitude[~adapted], self.own_norm()[~adapted]
            if not np.allclose(*others, rtol=1e-4, atol=0):
                raise ValueError(
                    "the file has trained the magnitude of outputs that the layer does "
                    "not adapt. Adapt them too."
                )
            magnitude = magnitude[adapted]
        return {**super().from_file(arrays, suffixes), "magnitude": magnitude}

    @classmethod
    def of_plain_layer(cls, weight):
        norm = np.linalg.norm(weight.astype("float64"), axis=1)
        return {MAGNITUDE: norm.astype(weight.dtype)}

    def own_norm(self):
        """||W||."""
        b = ops.zeros(self.b.shape, self.variable_dtype)
        return torch_layout.to_numpy(self.norm(self.read_kernel(), self.a, b))


def refuse_other_products(form, sizes):
    """Raises if the factors alone do not give the norm or the outputs."""
    if not form.is_product(sizes):
        raise ValueError(
            f"`use_dora` needs a kernel that is the product of A and B. The factors "
            f"have shapes {form.a_shape} and {form.b_shape}, and the kernel {sizes}. "
            'For a convolution use factorization="standard".'
        )
    if form.over_outputs is last_axes and len(sizes) - len(form.input_axes) > 1:
        raise ValueError(
            "`use_dora` needs to know how a value for each of the kernel's outputs is "
            "multiplied with the layer's outputs: give its LowRankForm `over_outputs`."
        )
