"""An adapter that starts at an A and a B whose product is not zero."""

import keras
import numpy as np
from keras import ops

from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.torch_layout import to_numpy


@keras.saving.register_keras_serializable(package="keras_lora")
class StartedAdapter(LowRankAdapter):
    """Factors that start at A0 and B0, with that start subtracted again.

        delta = scaling * (A @ B - A0 @ B0)
              = scaling * [A - A0, A0] @ [B; B - B0]

    The second line is what is computed: it is exactly zero at the start, in every
    dtype, and a small step loses no digits. W stays where it is. The rank of the
    update is up to 2 * rank, and a file holds it as a plain LoRA of that rank.

    `keras_lora.initialize_lora` makes it.
    """

    keyword = "frozen_start"
    in_files = False  # there it is a LoRA of twice the rank
    factor_names = ("a", "b", "a_start", "b_start")

    def build_factors(self, form, regularizer, read_kernel):
        refuse_other_forms(form)
        super().build_factors(form, regularizer, read_kernel)
        self.a_start = self.add_start("a_start", self.a.shape)
        self.b_start = self.add_start("b_start", self.b.shape)

    def add_start(self, name, shape):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            trainable=False,
            autocast=False,
        )

    def factors(self, dtype):
        a, a_start, b_start = map(
            ops.convert_to_tensor, (self.a, self.a_start, self.b_start)
        )
        scaling = self._scaling.variable
        wide_a = ops.concatenate([a - a_start, a_start], axis=-1)
        wide_b = ops.concatenate([self.b, self.b - b_start], axis=self.rank_axis)
        return ops.cast(wide_a, dtype), ops.cast(wide_b * scaling, dtype)

    @property
    def product_rank(self):
        return 2 * self.rank

    @property
    def rank_axis(self):
        """Where B has the rank; A has it last."""
        return len(self.form.batch_axes)

    # In a file: two pairs of factors side by side.

    @property
    def file_rank(self):
        return self.product_rank

    def to_file(self, suffixes):
        a, b, a_start, b_start = map(
            to_numpy, (self.a, self.b, self.a_start, self.b_start)
        )
        pairs = [
            self.form.to_file(a - a_start, b),
            self.form.to_file(a_start, b - b_start),
        ]
        return {
            suffix: np.concatenate(halves, axis)
            for suffix, axis, halves in zip(
                suffixes,
                self.form.rank_axes_in_file,
                zip(*pairs, strict=True),
                strict=True,
            )
        }

    def from_file(self, arrays, suffixes):
        halves = [
            np.split(arrays[suffix], 2, axis)
            for suffix, axis in zip(suffixes, self.form.rank_axes_in_file, strict=True)
        ]
        (a_change, b), (a_start, b_change) = (
            self.form.read_file(*pair) for pair in zip(*halves, strict=True)
        )
        return {
            "a": a_start + a_change,
            "b": b,
            "a_start": a_start,
            "b_start": b - b_change,
        }


def refuse_other_forms(form):
    """A ValueError where two pairs of factors are not one of twice the rank."""
    if form.looks_up or not form.one_rank:
        what = "an embedding" if form.looks_up else "a layer of several low ranks"
        raise ValueError(
            f"A start that is subtracted again is not for {what}: its factors are not "
            "one product. Leave the layer with LoRA's own start, where the product of "
            "A and B is zero."
        )
