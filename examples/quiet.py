"""Imports Keras without the log lines that TensorFlow prints while it is loaded.

`TF_CPP_MIN_LOG_LEVEL` covers most of them, but not the first, which TensorFlow writes
to standard error before it reads any setting.
"""

import os
import sys


def import_keras():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        import keras  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)
