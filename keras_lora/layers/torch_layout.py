"""How a layer's kernel and factors look in files of torch, PEFT and microsoft/LoRA."""

import numpy as np

# What A and B are called in a file of PEFT, after the module's name.
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
GROUPS_NOTE = (
    " The convolution has groups: PEFT's form for it cannot be merged, and is not read."
)


class TorchLayout:
    """What a kind answers about files; here, the layers whose kernel ends (in, out).

    Also for plain layers, whose kernel may have trained in full.
    """

    file_suffixes = LINEAR

    @classmethod
    def weight_to_file(cls, layer, kernel, inputs_first=False):
        """The kernel of a layer, plain or not, as its torch module has it.

        inputs_first: a linear module there keeps (in, out), as here.
        """
        if kernel.ndim < 2 or (inputs_first and kernel.ndim == 2):
            return kernel
        return np.moveaxis(kernel, (-1, -2), (0, 1))

    @classmethod
    def weight_from_file(cls, layer, value, inputs_first=False):
        """The inverse of `weight_to_file`."""
        if value.ndim < 2 or (inputs_first and value.ndim == 2):
            return value
        return np.moveaxis(value, (0, 1), (-1, -2))

    @classmethod
    def read_loralib(cls, layer, a, b, rank, mask, module):
        """microsoft/LoRA's factors, as a file of PEFT has them for this layer.

        mask: which slices of a MergedLinear are adapted, None where nothing says so.
        """
        return a, b


def to_numpy(value):
    """A whole copy, of which half precision comes as float32."""
    # Here: what reads files alone needs no Keras.
    from keras import ops

    from keras_lora.keras_internals.distribution import fetch

    value = ops.convert_to_tensor(value)
    if "float" in str(value.dtype) and "64" not in str(value.dtype):
        value = ops.cast(value, "float32")
    return np.array(fetch(value))


def convolutions_to_file(a, b):
    """As torch's two convolutions: (r, in, *k) and (out, r, 1, ...)."""
    a = np.moveaxis(a, (-1, -2), (0, 1))
    return a, b.T.reshape(*b.T.shape, *[1] * (a.ndim - 2))


def convolutions_from_file(a, b):
    return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T


def convolutions_in_file(groups, ndim):
    """What a convolution's form says about files; ndim: of its kernel."""
    files = {
        "to_file": convolutions_to_file,
        "from_file": convolutions_from_file,
        "vector_to_file": lambda vector: vector.reshape(1, -1, *[1] * (ndim - 2)),
    }
    return files | ({"file_note": GROUPS_NOTE} if groups > 1 else {})
