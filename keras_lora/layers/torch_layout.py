"""How files hold factors: in torch's layout, with the suffixes of each method."""

import numpy as np

# The names of A and B in PEFT's files, after the module's name.
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


class TorchLayout:
    """Layout of factors in files, for layers whose kernel ends with (in, out).

    Also for plain layers, whose kernel may have trained in full.
    """

    file_suffixes = LINEAR

    @classmethod
    def weight_to_file(cls, layer, kernel, inputs_first=False):
        """Returns a kernel in the layout of its torch module.

        inputs_first: whether a linear module keeps (in, out), as in Keras.
        """
        if kernel.ndim < 2 or (inputs_first and kernel.ndim == 2):
            return kernel
        return np.moveaxis(kernel, (-1, -2), (0, 1))

    @classmethod
    def weight_from_file(cls, layer, value, inputs_first=False):
        """Returns a kernel in the layout of Keras, from that of its torch module."""
        if value.ndim < 2 or (inputs_first and value.ndim == 2):
            return value
        return np.moveaxis(value, (0, 1), (-1, -2))

    @classmethod
    def read_loralib(cls, layer, a, b, rank, mask, module):
        """Converts microsoft/LoRA's factors of this layer to PEFT's.

        mask: which slices of a MergedLinear are adapted, or None.
        """
        return a, b


def to_numpy(value):
    """Returns a whole copy as NumPy; half precision becomes float32."""
    # Imported here, because reading files needs no Keras.
    from keras import ops

    from keras_lora.keras_internals import distribution

    value = ops.convert_to_tensor(value)
    if "float" in str(value.dtype) and "64" not in str(value.dtype):
        value = ops.cast(value, "float32")
    return np.array(distribution.fetch(value))


class MethodFiles:
    """How files store a method; the base class is LoRA itself.

    Attributes:
        keyword: The argument that chooses the method, and its setting in a file.
        takes_value: Whether the keyword has a value, other than a Boolean.
        more_suffixes: Suffixes of arrays in a file other than A and B.
        also_trains: What else the method trains, besides A @ B, in words.
        trains_rows: Whether it trains rows of W instead of A and B.
    """

    keyword: str | None = None
    takes_value = False
    more_suffixes: tuple[str, ...] = ()
    also_trains = ""
    trains_rows = False

    @classmethod
    def suffixes_for(cls, suffixes) -> tuple:
        """The suffixes of all arrays of an adapter; suffixes: those of A and B."""
        return (*suffixes, *cls.more_suffixes)


class DoRAFiles(MethodFiles):
    """DoRA, with its magnitudes m."""

    keyword = "use_dora"
    more_suffixes = (".lora_magnitude_vector",)
    also_trains = "the magnitudes m, which change the kernel too"


class TokenRowsFiles(MethodFiles):
    """Trainable rows of a table, instead of A and B."""

    keyword = "trainable_token_indices"
    takes_value = trains_rows = True
    also_trains = "rows of the table"


# Keyword -> method, replaced by the adapter's class once Keras is loaded.
METHODS: dict[str | None, type[MethodFiles]] = {
    method.keyword: method for method in (MethodFiles, DoRAFiles, TokenRowsFiles)
}


def method_in(options) -> type[MethodFiles]:
    """Returns the method whose keyword is in options, by default LoRA."""
    return METHODS[next(iter(options), None)]


def more_suffixes() -> list:
    """Returns the suffixes of all arrays that methods store beside A and B."""
    return [suffix for method in METHODS.values() for suffix in method.more_suffixes]
