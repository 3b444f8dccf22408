"""What each method's adapters are called in files: all that reading one needs.

Without Keras, so that `python -m keras_lora` shows a file at once.
"""


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
    """Of all arrays that some method's files have beside A and B."""
    return [suffix for method in METHODS.values() for suffix in method.more_suffixes]
