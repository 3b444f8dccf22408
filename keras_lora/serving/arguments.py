"""What a bank asks of what it is given."""

import numbers
from collections.abc import Mapping


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


def named(name, function, *arguments):
    """function(*arguments), whose errors say which adapter they are about."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"The adapter {name!r}: {error}") from error
