"""Variables that have another value for a while, as heads do inside `disabled`.

Heads and biases that trained together with A and B have their base values inside, and a
file that is written there has what was trained, as outside. Several contexts may hold
the same variable, and end in any order: the first gives it its other value, and the
last gives back what it had.
"""

import contextlib
import dataclasses
from typing import Any

from keras import ops

from keras_lora.keras_internals.distribution import put

HELD = "_lora_held"


@dataclasses.dataclass
class Held:
    """What a variable had before, and how many contexts hold it now."""

    trained: Any
    contexts: int = 1


@contextlib.contextmanager
def other_values(pairs, lock):
    """pairs: [(variable, its value inside)]. lock: taken at the beginning and end."""
    held = []
    try:
        with lock:
            for variable, value in pairs:
                hold(variable, value)
                held.append(variable)
        yield
    finally:
        with lock:
            for variable in held:
                release(variable)


def hold(variable, value):
    if HELD in vars(variable):
        vars(variable)[HELD].contexts += 1
    else:
        vars(variable)[HELD] = Held(ops.copy(variable))
        put(variable, value)


def release(variable):
    held = vars(variable)[HELD]
    held.contexts -= 1
    if not held.contexts:
        del vars(variable)[HELD]
        variable.assign(held.trained)


def is_held_once(variable) -> bool:
    return vars(variable)[HELD].contexts == 1


def trained_value(variable):
    """The value to save: the trained one, while a context holds another."""
    held = getattr(variable, HELD, None)
    return variable if held is None else held.trained


class TrainedValues:
    """A store of Keras that takes these values in the place of variables."""

    def __init__(self, store):
        self.store = store

    def __setitem__(self, key, value):
        self.store[key] = trained_value(value)

    def __getattr__(self, name):
        return getattr(self.store, name)
