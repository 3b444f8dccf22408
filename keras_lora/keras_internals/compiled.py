"""What is compiled of models: traced functions, optimizers, and loops that run them."""

import contextlib
import threading

import keras

from keras_lora.keras_internals.calls import synchronize
from keras_lora.keras_internals.distribution import own_strategy
from keras_lora.keras_internals.layers import refresh_torch_parameters
from keras_lora.keras_internals.models_around import holders
from keras_lora.keras_internals.optimizers import renewed_optimizer
from keras_lora.keras_internals.optimizers import replace_optimizer

LOOP_FUNCTIONS = ("train_function", "test_function", "predict_function")
COMPILED_FUNCTIONS = (*LOOP_FUNCTIONS, "generate_function")  # of KerasHub's tasks


def take_compiled_functions(layers):
    """Removes the traced functions of those that are models; returns them."""
    taken = []
    for layer in layers:
        for name in COMPILED_FUNCTIONS:
            if getattr(layer, name, None) is not None:
                taken.append((layer, name, getattr(layer, name)))
                setattr(layer, name, None)
    return taken


def renew_compiled_functions(layers):
    """Lets the functions of those that are models be traced anew.

    `fit`, `evaluate` and `predict` read theirs for every batch: where one of them runs
    now, and a callback changes the model, it goes on with the new one.
    """
    for layer, name, _ in take_compiled_functions(layers):
        if name in LOOP_FUNCTIONS:
            getattr(type(layer), f"make_{name}")(layer)


def bring_weights_back(model):
    """Puts the weights back that Keras's loops on JAX have taken out of models.

    Whichever model of those that hold the layers runs, they get them back; a loop
    reads them again after each of its callbacks.
    """
    if keras.backend.backend() == "jax":
        for layer in holders(model):
            synchronize(layer)


def compile_again(model) -> list:
    """The optimizers of a compiled model, for the variables that train now.

    Likewise those of compiled models around it and beside it that share its layers.

    Loss, metrics and all else that `compile` was told stay as they are. An optimizer
    that cannot be had anew leaves its model uncompiled; what is returned says so.
    """
    return compile_all_again(holders(model))


def compile_all_again(layers) -> list:
    """`compile_again` for what `holders` has found: that takes a while."""
    compiled = [layer for layer in layers if getattr(layer, "compiled", False)]
    renewed, notes = {}, []
    for layer in compiled:
        old = layer.optimizer
        try:
            if id(old) not in renewed:
                with own_strategy(layer):
                    renewed[id(old)] = renewed_optimizer(old, layer.trainable_variables)
        except Exception as error:  # whatever a user's optimizer raises
            renewed[id(old)] = None
            notes.append(
                f"{layer.name!r} is no longer compiled: its {type(old).__name__} "
                f"cannot be created again for other variables ({type(error).__name__}: "
                f"{error}). Call `compile` again."
            )
    # Up to here nothing has changed; from here on nothing can fail.
    for layer in compiled:
        replace_optimizer(layer, renewed[id(layer.optimizer)])
    renew_compiled_functions(layers)
    refresh_torch_parameters(layers)
    return notes


CHANGING_REFUSALS = threading.Lock()
HOOK = "make_train_function"


class TrainingRefused:
    """Stands in a model for `make_train_function`, which comes before training."""

    def __init__(self):
        self.reasons = []

    def __call__(self, force=False):
        raise ValueError(self.reasons[-1])


@contextlib.contextmanager
def refusing_to_train(model, why):
    """Refuses `fit` and `train_on_batch` of a model and of live ones around it."""
    models = [layer for layer in holders(model) if isinstance(layer, keras.Model)]
    with CHANGING_REFUSALS:
        for each in models:
            vars(each).setdefault(HOOK, TrainingRefused()).reasons.append(why)
    try:
        yield
    finally:
        with CHANGING_REFUSALS:  # contexts of several threads need not nest
            for each in models:
                refused = vars(each)[HOOK]
                refused.reasons.remove(why)
                if not refused.reasons:
                    del vars(each)[HOOK]
