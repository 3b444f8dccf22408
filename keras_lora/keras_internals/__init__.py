"""Uses of what Keras does not make public, each with its reason.

`private_names` has the table, and a probe that runs when it is first imported;
nothing private is touched elsewhere.
"""

import inspect
import warnings

# Packages whose lines no warning is about.
NOT_THE_USERS = {"keras_lora", "keras", "keras_hub", "contextlib"}


def warn_caller(message):
    """A warning at the line of the user's that the call came from."""
    frame, level = inspect.currentframe().f_back, 2
    while frame.f_back is not None and package_of(frame) in NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def package_of(frame):
    return frame.f_globals.get("__name__", "").partition(".")[0]
