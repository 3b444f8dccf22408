"""What a bank asks of what it is given."""

import numbers
from collections.abc import Mapping

import numpy as np


def checked_adapters(adapters, target) -> dict:
    adapters = {} if adapters is None or adapters == () else adapters
    if not isinstance(adapters, Mapping):
        raise ValueError(
            "`adapters` must be a dict from names to folders or `Adapter`s. Received: "
            f"{adapters!r}."
        )
    for name in adapters:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"The name of an adapter is a string, and not empty. Received: {name!r}"
            )
    if not adapters and target is None:
        raise ValueError(
            "A bank needs `adapters`, or a `target` that says at which layers there is "
            'room, such as "all-linear".'
        )
    return dict(adapters)


def checked_capacity(capacity, adapters):
    capacity = max(len(adapters), 1) if capacity is None else capacity
    if (
        isinstance(capacity, bool)
        or not isinstance(capacity, numbers.Integral)
        or capacity < max(len(adapters), 1)
    ):
        raise ValueError(
            f"`capacity` must be a whole number >= {max(len(adapters), 1)}, as many as "
            f"there are adapters. Received: capacity={capacity!r}."
        )
    return int(capacity)


def refuse_names(x):
    """Raises if names were given instead of ids; Keras's own error is obscure."""
    given = x.get("adapter") if isinstance(x, Mapping) else None
    if isinstance(given, np.ndarray) and given.dtype.kind not in "OUS":
        return
    values = given if isinstance(given, (list, tuple, np.ndarray)) else ()
    if any(value is None or isinstance(value, (str, bytes)) for value in values):
        raise ValueError(
            '"adapter" must hold ids, and not names: `bank.ids(names)` gives them. '
            f"Received: {given!r}"[:300]
        )


def named(name, function, *arguments):
    """function(*arguments), whose errors say which adapter they are about."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"The adapter {name!r}: {error}") from error
