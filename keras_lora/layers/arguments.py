"""Constructor arguments and names of LoRA layers."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import keras

P = ParamSpec("P")
R = TypeVar("R")

# Keywords of other libraries -> the keyword here.
FOREIGN_KEYWORDS = {
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "rslora": "use_rslora",
    "dora_rank": "rank` beside `use_dora=True",
    "dora_alpha": "alpha` beside `use_dora=True",
    "lora_a_initializer": "a_initializer",
    "lora_b_initializer": "b_initializer",
    "init_lora_weights": "a_initializer` and `b_initializer",
}

# The same for whole models, where `initialize_lora` sets initial values.
MODEL_KEYWORDS = FOREIGN_KEYWORDS | {
    "lora_a_initializer": "method` of `initialize_lora",
    "lora_b_initializer": "method` of `initialize_lora",
    "init_lora_weights": "method` of `initialize_lora",
    "target_modules": "target",
    "layers_to_transform": "target",
    "exclude_modules": "exclude",
    "modules_to_save": "also_train",
    "task_type": "task_type` of `save_adapter",
    "lr": "learning_rate` of the optimizer, or of a setting in `sweep",
    "learning_rate": "learning_rate` of the optimizer, or of a setting in `sweep",
}

COMMON_ARGUMENTS = """

The LoRA arguments are keyword-only:

Args:
    rank: Whole number >= 0, the rank r of the update. 0 means no adapter: the
        layer is its Keras base class and its kernel trains.
    alpha: Number > 0, default `rank`. The update is scaled by alpha / rank.
    dropout: Number in [0, 1), the dropout on the adapter's inputs in training.
    use_rslora: Boolean, scale by alpha / sqrt(rank) instead.
    use_dora: Boolean, train the magnitudes m of W + delta's columns separately
        (DoRA). They start as those of W. Every call also computes A^T @ W, which for
        an embedding reads the whole table; with dropout, training needs a second
        product with W. Call `layer.lora.start_from_kernel()` if W is assigned after
        the layer was built.
    a_initializer: Initializer of A. None means the initial values given above.
    b_initializer: Initializer of B. None means the initial values given above.
    merge_weights: Boolean. If True, calls with training=False use the merged kernel
        W + delta, formed in float32 and rounded once, so that what is evaluated is
        what is exported. If False, they use the low-rank path of training.

A kernel regularizer applies to A and B, which train instead of the kernel.
`layer.lora` is the adapter (.rank .alpha .scaling .a .b .delta(), and m as
.magnitude), or None with rank=0. The kernel attribute of the Keras layer is the
frozen W.

Raises:
    ValueError: If an argument is out of range, a keyword is another library's name
        for one of the above, or the kernel has a constraint.

Reference:
    [LoRA: Hu et al., 2021](https://arxiv.org/abs/2106.09685);
    [DoRA: Liu et al., 2024](https://arxiv.org/abs/2402.09353)
"""


def refuse_foreign_keywords(name, kwargs, words=FOREIGN_KEYWORDS):
    for keyword, ours in words.items():
        if kwargs.get(keyword) is not None:
            raise ValueError(
                f"{name} has no `{keyword}`; the keyword here is `{ours}`. "
                f"Received: {keyword}={kwargs[keyword]!r}."
            )


def refusing_foreign_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function so that a wrong keyword raises with the right one."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        validate_keywords(function, kwargs)
        return function(*args, **kwargs)

    return call


def closest(name, known, cutoff=0.6) -> str:
    """Returns " The closest are [...]." for a wrong name; "" if none is similar."""
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=cutoff)
    return f" The closest are {close}." if close else ""


def validate_keywords(function, kwargs):
    """Raises for an unknown keyword, with the right or similar ones."""
    refuse_foreign_keywords(function.__name__, kwargs, MODEL_KEYWORDS)
    parameters = inspect.signature(function).parameters
    for keyword in kwargs.keys() - parameters.keys():
        close = difflib.get_close_matches(keyword, parameters, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else ""
        raise TypeError(f"{function.__name__} has no `{keyword}`. {hint}".strip())


def with_defaults(function, *args, **kwargs) -> dict:
    """Returns all arguments of a call by name, with defaults."""
    validate_keywords(function, kwargs)
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def default_name(cls):
    """Returns lora_dense, lora_dense_1, ..., numbered as by Keras."""
    name = snake_case(cls.__name__)
    count = keras.backend.get_uid(name)
    return name if count == 1 else f"{name}_{count - 1}"


def snake_case(class_name):
    """Converts a class name as Keras does, but LoRADense to lora_dense."""
    name = class_name.replace("LoRA", "Lora")
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def full_signature(cls, mixin):
    """Returns the signature for `help()`: Keras's arguments, then those of the mixin.

    A required argument that would come after an optional one is shown as keyword-only.
    """
    constructors = [cls.plain_class.__init__]
    constructors += [
        base.__dict__["__init__"]
        for base in cls.__mro__
        if issubclass(base, mixin) and "__init__" in base.__dict__
    ]
    parameters = {"lora_rank": None, "lora_alpha": None}  # Keras's own, refused here
    for constructor in constructors:
        _, *own_parameters = inspect.signature(constructor).parameters.values()
        for parameter in own_parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                parameters.setdefault(parameter.name, parameter)
    shown, optional = [], False
    for parameter in filter(None, parameters.values()):
        required = parameter.default is parameter.empty
        if required and optional and parameter.kind != parameter.KEYWORD_ONLY:
            parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
        optional |= not required
        shown.append(parameter)
    keywords = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*sorted(shown, key=lambda p: p.kind), keywords])
