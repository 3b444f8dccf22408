"""Runs a layer's own Keras call with other products instead of those with W."""

import keras
from keras import ops

from keras_lora.keras_internals import calls, classes
from keras_lora.layers.adapter import LowRankAdapter


class AdaptedWeight:
    """W with its adapter in a call, and the results of operations on it.

    Args:
        site: A `SubstitutedSite`.
        dtype: The dtype of the symbolic tensor that replaces W.
    """

    def __init__(self, site, dtype):
        self.site, self.dtype = site, dtype

    @property
    def is_low_rank(self):
        """Whether the adapter is plain LoRA: W + scaling * A @ B."""
        lora = self.site.lora
        return lora.stand_in is None and all(
            getattr(type(lora), name) is getattr(LowRankAdapter, name)
            for name in ("delta", "effective_kernel", "low_rank_outputs")
        )

    def whole(self):
        """Returns W + delta, for all other operations."""
        return ops.cast(self.site.kernel_in_call(), self.dtype)

    def outputs(self, operation, args):
        """Returns the outputs of a product with W, or None for other operations."""
        raise NotImplementedError


def call_with_products(layer, cls, weights, args, kwargs):
    """Runs a layer's call under a class, with products computed by adapted weights.

    The call runs on symbolic weights, and its operations are computed one by one after
    it. Values that depend on no weight are computed by the call itself.

    weights: keys -> `AdaptedWeight`, with the keys of `weight_places`.
    """
    symbols = {
        keys: keras.KerasTensor(weight.site.kernel_shape, weight.dtype)
        for keys, weight in weights.items()
    }
    outputs = classes.call_with(layer, cls, symbols, args, kwargs)
    values = {id(symbols[keys]): weight for keys, weight in weights.items()}
    return calls.compute(outputs, values, run)


def run(operation, args, kwargs):
    """Returns the outputs of an operation, whose arguments may be `AdaptedWeight`s."""
    for weight in args:
        if isinstance(weight, AdaptedWeight):
            outputs = weight.outputs(operation, args)
            if outputs is not None:
                return outputs
    args, kwargs = keras.tree.map_structure(
        lambda x: x.whole() if isinstance(x, AdaptedWeight) else x, (args, kwargs)
    )
    return calls.run_operation(operation, args, kwargs)
