"""Traced functions of models that change, and refusals to train."""

import contextlib
import gc
import itertools
import threading
import types

import keras

from keras_lora.keras_internals import (
    calls,
    distribution,
    layer_state,
    optimizers,
    warn_caller,
)

WARNED_AT = types.SimpleNamespace(count=0)  # frozen objects at the last warning


def models_sharing_layers(model) -> list:
    """Returns the layers of a model, and all live models that share layers with it.

    Functions that these models have traced use the layers as they were. A layer does
    not know its owners, so they are found among the garbage collector's objects. Layers
    without variables do not count.
    """
    layers = layer_state.flatten_layers(model)
    own = {id(vars(layer)) for layer in layers}  # views share it
    shared = {id(layer) for layer in layers if layer_state.layer_variables(layer)}
    around = [
        found
        for found in live_models()
        if id(vars(found)) not in own
        and "_layers" in vars(found)
        and not shared.isdisjoint(map(id, layer_state.flatten_layers(found)))
    ]
    return layers + around


def live_models() -> list:
    """Returns all models of the process, and warns if `gc.freeze` has hidden some."""
    if gc.get_freeze_count() > WARNED_AT.count:
        WARNED_AT.count = gc.get_freeze_count()
        warn_caller(
            "gc.freeze() was called, which hides the models made before it: if they "
            "share layers with this one, they may still use functions that were "
            "traced before this change. Compile them again."
        )
    # Compares types, without a Python loop, because there are millions of objects.
    every = []  # will hold the list of all objects
    objects, same = map(itertools.chain.from_iterable, [every, every])
    wanted = map(subclasses(keras.Model).__contains__, map(type, same))
    models = itertools.compress(objects, wanted)
    # Python cannot enlarge a tuple that something else refers to, so the list has to go
    # before another thread runs. None does during these three statements, as the
    # interpreter sees no call in them. `same` refers to the list until it has ended.
    every += map(gc.get_objects, [None])
    found, _ = [*models], [*same]
    del every[:]
    return found


def subclasses(cls) -> set:
    """Returns a class and all its subclasses."""
    classes, waiting = set(), [cls]
    while waiting:
        subclass = waiting.pop()
        if subclass not in classes:
            classes.add(subclass)
            waiting += type.__subclasses__(subclass)
    return classes


# Methods that run a model over data. On JAX they take the values out of the variables,
# and put them back.
LOOPS = (
    *("fit", "evaluate", "predict"),
    *("train_on_batch", "test_on_batch", "predict_on_batch"),
)
LOOP_FUNCTIONS = ("train_function", "test_function", "predict_function")
COMPILED_FUNCTIONS = (*LOOP_FUNCTIONS, "generate_function")  # the last: KerasHub


def take_compiled_functions(layers):
    """Removes the traced functions of the models among layers.

    Returns [(model, name, function)].
    """
    functions = []
    for layer in layers:
        for name in COMPILED_FUNCTIONS:
            if getattr(layer, name, None) is not None:
                functions.append((layer, name, getattr(layer, name)))
                setattr(layer, name, None)
    return functions


def renew_compiled_functions(layers):
    """Makes the models among layers trace their functions again.

    `fit`, `evaluate` and `predict` read their function for every batch. If a callback
    changes the model, they continue with the new function.
    """
    for layer, name, _ in take_compiled_functions(layers):
        if name in LOOP_FUNCTIONS:
            getattr(type(layer), f"make_{name}")(layer)


def restore_jax_weights(model):
    """Puts back the weights that Keras's loops on JAX have taken out of a model.

    It does so for all models that share its layers. A loop reads the weights again
    after each callback.
    """
    if keras.backend.backend() == "jax":
        for layer in models_sharing_layers(model):
            calls.synchronize(layer)


def compile_again(model) -> list:
    """Gives compiled models optimizers for the variables that train now.

    They are the model and all that share layers with it. Loss, metrics and all other
    arguments of `compile` are kept. If an optimizer cannot be created again, its model
    is no longer compiled, and the returned notes say so.
    """
    return compile_all_again(models_sharing_layers(model))


def compile_all_again(layers) -> list:
    """Recompiles the models that `models_sharing_layers` found."""
    compiled = [layer for layer in layers if getattr(layer, "compiled", False)]
    renewed, notes = {}, []
    for layer in compiled:
        old = layer.optimizer
        try:
            if id(old) not in renewed:
                with distribution.strategy_scope(layer):
                    renewed[id(old)] = optimizers.renew_optimizer(
                        old, layer.trainable_variables
                    )
        except Exception as error:  # a user's optimizer may raise anything
            renewed[id(old)] = None
            notes.append(
                f"{layer.name!r} is no longer compiled: its {type(old).__name__} "
                f"cannot be created again for other variables ({type(error).__name__}: "
                f"{error}). Call `compile` again."
            )
    # Nothing has changed so far, and nothing can fail from here on.
    for layer in compiled:
        optimizers.replace_optimizer(layer, renewed[id(layer.optimizer)])
    renew_compiled_functions(layers)
    layer_state.refresh_torch_parameters(layers)
    return notes


CHANGING_REFUSALS = threading.Lock()
HOOK = "make_train_function"


class TrainingRefused:
    """Replaces `make_train_function` of a model, which training calls first."""

    def __init__(self):
        self.reasons = []

    def __call__(self, force=False):
        raise ValueError(self.reasons[-1])


@contextlib.contextmanager
def refusing_to_train(model, why):
    """Makes `fit` and `train_on_batch` raise, also for models that share layers.

    why: The text of the error.
    """
    models = [
        layer
        for layer in models_sharing_layers(model)
        if isinstance(layer, keras.Model)
    ]
    with CHANGING_REFUSALS:
        for each in models:
            vars(each).setdefault(HOOK, TrainingRefused()).reasons.append(why)
    try:
        yield
    finally:
        with CHANGING_REFUSALS:  # contexts of several threads may overlap
            for each in models:
                refused = vars(each)[HOOK]
                refused.reasons.remove(why)
                if not refused.reasons:
                    del vars(each)[HOOK]
