"""Registry of methods (LoRA, DoRA, ...), each chosen by its keyword."""

from keras_lora.layers import torch_layout
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.dora import DoRAAdapter
from keras_lora.layers.token_rows import TokenRows


def register_method(adapter_class):
    """Registers a method for all kinds, chosen by its `keyword`; a decorator."""
    torch_layout.METHODS[adapter_class.keyword] = adapter_class
    return adapter_class


register_method(LowRankAdapter)
register_method(DoRAAdapter)
register_method(TokenRows)


def take_method(keywords) -> dict:
    """Removes the keywords of methods; returns the chosen one as {keyword: value}."""
    values = {word: keywords.pop(word, False) for word in torch_layout.METHODS if word}
    chosen = {word: value for word, value in values.items() if value}
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} cannot be used together.")
    return chosen


def make_adapter(options, dtype, name="lora"):
    """Creates an adapter from a host's options.

    dtype: the dtype of the host's variables.
    """
    options = dict(options)
    chosen = take_method(options)
    method = torch_layout.method_in(chosen)
    options |= chosen if method.takes_value else {}
    return method(**options, dtype=wide_dtype(dtype), name=name)


def wide_dtype(dtype):
    """Returns the dtype of A and B: float32, or float64 for float64 kernels.

    dtype: the dtype of the host's variables.
    """
    return "float64" if dtype == "float64" else "float32"
