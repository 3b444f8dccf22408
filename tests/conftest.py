import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_ENABLE_X64", "1")  # for the comparisons in float64

import keras
import pytest

from keras_lora.keras_internals import models_around


@pytest.fixture(autouse=True, scope="module")
def only_new_garbage():
    """What was imported, or is kept by Keras, is not looked through for each variable
    that Keras deletes: it collects garbage then."""
    gc.collect()
    gc.freeze()
    models_around.WARNED_AT.count = gc.get_freeze_count()


@pytest.fixture(autouse=True)
def fresh_state():
    """The same seeds and names for every test; no floatx or policy leaks out."""
    keras.backend.clear_session(free_memory=False)  # a collection takes seconds
    keras.utils.set_random_seed(7)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.config.enable_traceback_filtering()
