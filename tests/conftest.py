import gc
import itertools
import os
import types

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_ENABLE_X64", "1")  # for the comparisons in float64

TESTS = itertools.count(1)

# Keras is imported in the functions: the process that hands out tests needs none.


@pytest.fixture(autouse=True, scope="module")
def fresh_module():
    import keras

    from keras_lora.keras_internals import compiled

    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    # What was imported, or is kept by Keras, is not looked through for each variable
    # that Keras deletes: it collects garbage then.
    gc.collect()
    gc.freeze()
    # Each change of a model asks how much is frozen, which Python counts one by one.
    uncounted = types.SimpleNamespace(get_freeze_count=int, get_objects=gc.get_objects)
    compiled.gc = uncounted


@pytest.fixture(autouse=True)
def fresh_state():
    """The same seeds and names for every test; no floatx or policy leaks out."""
    import keras
    from keras.src.utils import naming
    from seeds import set_seed

    set_seed(7)
    naming.reset_uids()
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.config.enable_traceback_filtering()
    # Each change of a model looks through all objects: those that TensorFlow keeps of
    # earlier tests are as many as make it take longer than the rest of a test.
    if next(TESTS) % 5 == 0:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The summary has one line for a failure: with what NumPy says in several."""
    report = yield
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = " ".join(crash.message.split())
    return report
