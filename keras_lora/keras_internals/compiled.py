"""What is compiled of models: traced functions, optimizers, and loops that run them."""

import contextlib
import inspect
import threading

import keras

from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import refresh_torch_parameters
from keras_lora.keras_internals.models_around import holders
from keras_lora.keras_internals.optimizers import renewed_optimizer
from keras_lora.keras_internals.optimizers import replace_optimizer

COMPILED_FUNCTIONS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",  # of KerasHub's tasks
)


def take_compiled_functions(layers):
    """Removes the traced functions of those that are models; returns them."""
    taken = []
    for layer in layers:
        for name in COMPILED_FUNCTIONS:
            if getattr(layer, name, None) is not None:
                taken.append((layer, name, getattr(layer, name)))
                setattr(layer, name, None)
    return taken


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
                renewed[id(old)] = renewed_optimizer(old, layer.trainable_variables)
        except Exception as error:  # whatever a user's optimizer raises
            renewed[id(old)] = None
            notes.append(
                f"{layer.name!r} is not compiled any more: its "
                f"{type(old).__name__} cannot be made anew for other variables "
                f"({type(error).__name__}: {error}). Call `compile` again."
            )
    # Up to here nothing has changed; from here on nothing can fail.
    for layer in compiled:
        replace_optimizer(layer, renewed[id(layer.optimizer)])
    take_compiled_functions(layers)
    refresh_torch_parameters(layers)
    return notes


REFUSALS = []  # (the layers that do not train now, by id, and why)
CHANGING_REFUSALS = threading.Lock()


@contextlib.contextmanager
def refusing_to_train(layers, why):
    """`fit` and `train_on_batch` of every model that holds one of these are refused.

    A layer does not know its owners. So the models ask, in what Keras calls first in
    both.
    """
    refusal = (set(map(id, layers)), why)
    with CHANGING_REFUSALS:
        REFUSALS.append(refusal)
        keras.Model.make_train_function = checked_train_function
    try:
        yield
    finally:
        with CHANGING_REFUSALS:  # contexts of several threads need not nest
            REFUSALS.remove(refusal)
            if not REFUSALS:
                del keras.Model.make_train_function


def checked_train_function(model, force=False):
    """Stands in `keras.Model` while there are refusals."""
    own = set(map(id, flatten_layers(model)))
    for layers, why in tuple(reversed(REFUSALS)):
        if not own.isdisjoint(layers):
            raise ValueError(why)
    return super(keras.Model, model).make_train_function(force)


# What runs a model in a loop, during which its layers cannot become others.
LOOPS = ("fit", "evaluate", "predict")


def refuse_while_running(model):
    """An error where the call comes from inside `fit`: from a callback, say.

    Keras has no word for it, and its loops go on with the traced step that they have.
    """
    frame, changed = inspect.currentframe(), None
    while frame is not None:
        runs = frame.f_locals.get("self") if frame.f_code.co_name in LOOPS else None
        if isinstance(runs, keras.Model):
            changed = changed or set(map(id, flatten_layers(model)))
            if changed & set(map(id, flatten_layers(runs))):
                raise ValueError(
                    f"Layers of {runs.name!r} cannot change while its "
                    f"`{frame.f_code.co_name}()` runs. Nothing was changed. Do it "
                    "before or after that call."
                )
        frame = frame.f_back
