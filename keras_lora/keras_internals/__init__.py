"""All uses of names that Keras does not make public.

`private_names` has a table of them, with the reason for each and a probe that runs at
import. No other package here uses a private name.
"""

import inspect
import warnings

# Packages that a warning does not point to.
NOT_THE_USERS = {"keras_lora", "keras", "keras_hub", "contextlib", "tensorflow"}


def warn_caller(message):
    """Warns at the line of the user's code from which the call came."""
    frame, level = inspect.currentframe().f_back, 2
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in NOT_THE_USERS:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
