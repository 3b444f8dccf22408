"""What files hold of variables that have another value while `disabled` holds.

Heads and biases that trained beside A and B have their base values inside, and a file
that is written there has what was trained, as outside.
"""

import contextlib

TRAINED = "_lora_trained"


@contextlib.contextmanager
def written_as(pairs):
    """pairs: [(variable, the value that files have inside)]."""
    own = [pair for pair in pairs if TRAINED not in vars(pair[0])]  # the outermost's
    for variable, value in own:
        vars(variable)[TRAINED] = value
    try:
        yield
    finally:
        for variable, _ in own:
            vars(variable).pop(TRAINED, None)


def trained_value(variable):
    """A variable's value for a file; what is no variable is its own."""
    return getattr(variable, TRAINED, variable)


class TrainedValues:
    """A store of Keras that takes these values in the place of variables."""

    def __init__(self, store):
        self.store = store

    def __setitem__(self, key, value):
        self.store[key] = trained_value(value)

    def __getattr__(self, name):
        return getattr(self.store, name)
