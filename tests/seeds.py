"""Seeds of Python, NumPy and Keras."""

import random

import numpy as np
from keras.src.backend.common import global_state


def set_seed(seed):
    """As `keras.utils.set_random_seed`, but TensorFlow keeps the seed that it has.

    With its seed it would throw away the kernels of all operations of eager mode: to
    make them again took half of the tests' time. Keras's initializers and layers draw
    their seeds from Python's generator.
    """
    random.seed(seed)
    np.random.seed(seed)
    global_state.set_global_attribute("global_seed_generator", None)
