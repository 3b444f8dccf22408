"""How files hold factors: in torch's layout, with the suffixes of each method."""

import numpy as np

# What A and B are called in a file of PEFT, after the module's name.
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
GROUPS_NOTE = (
    " The convolution has groups: PEFT's form for it cannot be merged, and is not read."
)


class TorchLayout:
    """Layout of factors in files, for layers whose kernel ends with (in, out).

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

    from keras_lora.keras_internals import distribution

    value = ops.convert_to_tensor(value)
    if "float" in str(value.dtype) and "64" not in str(value.dtype):
        value = ops.cast(value, "float32")
    return np.array(distribution.fetch(value))


def convolutions_to_file(a, b):
    """Returns A and B as torch's two convolutions: (r, in, *k), (out, r, 1, ...)."""
    a = np.moveaxis(a, (-1, -2), (0, 1))
    return a, b.T.reshape(*b.T.shape, *[1] * (a.ndim - 2))


def convolutions_from_file(a, b):
    return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T


def convolutions_in_file(groups, ndim):
    """Returns the arguments of a convolution's form that are about files.

    ndim: of the kernel.
    """
    files = {
        "to_file": convolutions_to_file,
        "from_file": convolutions_from_file,
        "vector_to_file": lambda vector: vector.reshape(1, -1, *[1] * (ndim - 2)),
    }
    return files | ({"file_note": GROUPS_NOTE} if groups > 1 else {})


class MethodFiles:
    """Base of what a method says about files; here, that of LoRA.

    Attributes:
        keyword: The argument that chooses the method, and its setting in a file.
        takes_value: Whether the keyword says more than that the method is chosen.
        more_suffixes: Those of arrays in a file beside A's and B's.
        beside_update: What the method trains that A @ B does not show, in words.
    """

    keyword: str | None = None
    takes_value = False
    more_suffixes: tuple[str, ...] = ()
    beside_update = ""

    @classmethod
    def suffixes_for(cls, suffixes) -> tuple:
        """All that a file has for an adapter; suffixes: its host's for A and B."""
        return (*suffixes, *cls.more_suffixes)


class DoRAFiles(MethodFiles):
    """DoRA, with its lengths m."""

    keyword = "use_dora"
    more_suffixes = (".lora_magnitude_vector",)
    beside_update = "the lengths m, which change the kernel too"


class TokenRowsFiles(MethodFiles):
    """Rows of a table that train in the place of A and B."""

    keyword = "trainable_token_indices"
    takes_value = True
    beside_update = "rows of the table"


# Keyword -> method; the adapter's class takes its place where Keras is loaded.
METHODS: dict[str | None, type[MethodFiles]] = {
    method.keyword: method for method in (MethodFiles, DoRAFiles, TokenRowsFiles)
}


def method_in(options) -> type[MethodFiles]:
    """The method whose keyword is in options; LoRA without one."""
    return METHODS[next(iter(options), None)]


def more_suffixes() -> list:
    """Returns the suffixes of all arrays that methods store beside A and B."""
    return [suffix for method in METHODS.values() for suffix in method.more_suffixes]
