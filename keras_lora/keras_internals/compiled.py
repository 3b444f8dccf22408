"""Traced functions, optimizers and training loops of models that change."""

import contextlib
import gc
import itertools
import threading
import types

import keras

from keras_lora.keras_internals import calls, distribution, warn_caller
from keras_lora.keras_internals.layers import (
    flatten_layers,
    layer_state,
    name_scopes,
    refresh_torch_parameters,
)

WARNED_AT = types.SimpleNamespace(count=0)  # frozen objects at the last warning


def models_sharing_layers(model) -> list:
    """Returns the layers of a model, and all live models that share layers with it.

    A layer does not know its owners, whose traced functions know it as it was. They are
    found among the garbage collector's objects. Layers without variables do not count.
    """
    layers = flatten_layers(model)
    own = {id(vars(layer)) for layer in layers}  # views share it
    shared = {id(layer) for layer in layers if any(layer_state(layer))}
    around = [
        found
        for found in live_models()
        if id(vars(found)) not in own
        and "_layers" in vars(found)
        and not shared.isdisjoint(map(id, flatten_layers(found)))
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
    wanted = subclasses(keras.Model)
    objects = gc.get_objects()
    return list(
        itertools.compress(objects, map(wanted.__contains__, map(type, objects)))
    )


def subclasses(cls) -> set:
    """Returns a class and all its subclasses."""
    found, more = set(), [cls]
    while more:
        own = more.pop()
        if own not in found:
            found.add(own)
            more += type.__subclasses__(own)
    return found


def renewed_optimizer(optimizer, variables):
    """Returns the optimizer itself if it has no state yet, else a copy without state.

    Not through `from_config`, which loses calls on the optimizer such as
    `exclude_from_weight_decay`, and which users' own schedules, callables and
    constructors may not support.
    """
    if optimizer is None or not optimizer.built:
        return optimizer
    if list(map(id, optimizer._trainable_variables)) == list(map(id, variables)):
        return optimizer
    return like_without_state(optimizer, variables)


def like_without_state(optimizer, variables):
    """Returns a copy of an optimizer, built for variables; raises if it cannot be."""
    names, old = set(), {id(variable) for variable in optimizer.variables}
    for _ in range(2):
        renewed = without_state(optimizer, names)
        for part in (renewed, getattr(renewed, "inner_optimizer", None)):
            if isinstance(part, TwoRates) and not any(map(part.is_faster, variables)):
                part.__class__ = part.plain_class
        renewed.build(variables)
        found = attributes_with(renewed, old)
        if not found:
            return renewed
        # Variables that `build` has not replaced come from the constructor.
        names |= found
    raise ValueError(f"it keeps variables of its own in {sorted(found)}")


def unbuilt_copy(optimizer):
    """Returns a copy of an optimizer that is not built; raises if it is built."""
    if optimizer.built:
        raise ValueError(
            f"The optimizer, a {type(optimizer).__name__}, is built already, for other "
            "variables. Give a new one."
        )
    return without_state(optimizer)


def attributes_with(optimizer, ids) -> set:
    """Names of attributes that are, or hold, one of these variables."""
    found = set()
    for name, value in vars(optimizer).items():
        if isinstance(value, keras.optimizers.Optimizer):
            found |= attributes_with(value, ids)
        elif isinstance(value, (list, tuple, dict)):
            values = value.values() if isinstance(value, dict) else value
            found |= {name for held in values if id(held) in ids}
        elif id(value) in ids:
            found.add(name)
    return found


def without_state(optimizer, names=frozenset()):
    """Returns a copy as it was before `build`.

    names: attributes whose variables are new. So are the variables and registers of
    Keras's own constructor; everything else is shared.
    """
    copy = object.__new__(type(optimizer))
    plain = keras.optimizers.Optimizer
    plain.__init__(copy, learning_rate=0.0, name=optimizer.name)
    plain.exclude_from_weight_decay(copy)  # creates another register
    made = dict(vars(copy))
    registers = {name for name, value in made.items() if is_register(value)}
    names = {*names, *(n for n, v in made.items() if isinstance(v, keras.Variable))}
    for value in made.values():
        if isinstance(value, (list, dict)):
            value.clear()
    for name, value in vars(optimizer).items():
        if name not in registers:
            vars(copy)[name] = value
    copy.built = False
    for name, value in vars(optimizer).items():
        if isinstance(value, keras.optimizers.Optimizer):  # inside a loss scale
            setattr(copy, name, without_state(value, names))
        elif name in names and isinstance(value, keras.Variable):
            start = distribution.fetch(value)
            scope, _, own_name = value.path.rpartition("/")
            with name_scopes(scope):
                variable = keras.Variable(
                    0 * start if own_name == "iteration" else start,
                    dtype=value.dtype,
                    trainable=False,
                    aggregation=value.aggregation,
                    name=own_name,
                )
            setattr(copy, name, variable)
    return copy


def is_register(value) -> bool:
    """Whether a value of a new optimizer will hold variables."""
    if isinstance(value, (list, dict)):
        return True
    of_keras = type(value).__module__.startswith("keras.")
    return of_keras and not isinstance(value, keras.Variable)


def replace_optimizer(model, optimizer):
    """Replaces a model's optimizer without Keras's and TensorFlow's tracking."""
    old = model.optimizer
    config = getattr(model, "_compile_config", None)
    if old is not optimizer:
        vars(model)["optimizer"] = optimizer
        if optimizer is None:
            model.compiled = False
        elif config is not None:
            inside = getattr(old, "inner_optimizer", None)  # if compile wrapped it
            wrapped = inside is not None and config.config["optimizer"] is inside
            config.config["optimizer"] = (
                optimizer.inner_optimizer if wrapped else optimizer
            )
    if hasattr(model, "_compiled_trainable_state"):
        model._compiled_trainable_state = {
            layer: layer.trainable for layer in model._flatten_layers()
        }


class TwoRates(keras.optimizers.Optimizer):
    """Mixin for an optimizer with a higher learning rate for some variables.

    Subclasses have `plain_class`, `is_faster(variable)` and `faster(rate)`. Keras has
    no learning rate per variable: `update_step` gets it for one variable at a time, and
    weight decay reads the optimizer's for a list of variables.
    """

    def update_step(self, gradient, variable, learning_rate):
        # By index, because on TensorFlow this is a replica's variable, not Keras's.
        index = self._get_variable_index(variable)
        if self.is_faster(self._trainable_variables[index]):
            learning_rate = self.faster(learning_rate)
        # By position, because Adadelta calls the gradient `grad`.
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables):
        if keras.backend.backend() == "torch":
            # torch's version does not accept an empty list.
            variables = [v for v in variables if self._use_weight_decay(v)]
        slow = [v for v in variables if not self.is_faster(v)]
        fast = [v for v in variables if self.is_faster(v)]
        if slow:
            super()._apply_weight_decay(slow)
        if fast:
            # The rate is not changed for a moment, because the replicas of a strategy
            # are threads that share this object.
            rated = as_plain_optimizer(
                self, _learning_rate=lambda: self.faster(self.learning_rate)
            )
            rated._apply_weight_decay(fast)

    def __reduce__(self):
        # Keras's result names a method of this class, which pickle cannot find.
        load, arguments = super().__reduce__()
        return getattr(TwoRates, load.__name__), arguments


def as_plain_optimizer(optimizer, **changed):
    """Returns a view of the optimizer under its plain class."""
    view = object.__new__(optimizer_class(optimizer.plain_class))
    vars(view).update(vars(optimizer), **changed)
    return view


def optimizer_class(cls):
    """Returns the class whose `update_step` makes the update.

    On torch, Keras replaces most optimizers by its own subclasses of the same names,
    which update all variables at once, at one rate, without `update_step`.
    """
    if not cls.__module__.startswith("keras."):
        return cls
    return [c for c in cls.__mro__ if c.__name__ == cls.__name__][-1]


LOOP_FUNCTIONS = ("train_function", "test_function", "predict_function")
COMPILED_FUNCTIONS = (*LOOP_FUNCTIONS, "generate_function")  # the last: KerasHub


def take_compiled_functions(layers):
    """Removes the traced functions of the models among layers, and returns them."""
    taken = []
    for layer in layers:
        for name in COMPILED_FUNCTIONS:
            if getattr(layer, name, None) is not None:
                taken.append((layer, name, getattr(layer, name)))
                setattr(layer, name, None)
    return taken


def renew_compiled_functions(layers):
    """Makes the models among layers trace their functions again.

    `fit`, `evaluate` and `predict` read their function for every batch. If a callback
    changes the model, they continue with the new function.
    """
    for layer, name, _ in take_compiled_functions(layers):
        if name in LOOP_FUNCTIONS:
            getattr(type(layer), f"make_{name}")(layer)


def restore_jax_weights(model):
    """Puts back the weights that Keras's loops on JAX have taken out of models.

    This covers all models that hold the layers. A loop reads the weights again after
    each callback.
    """
    if keras.backend.backend() == "jax":
        for layer in models_sharing_layers(model):
            calls.synchronize(layer)


def compile_again(model) -> list:
    """Gives compiled models optimizers for the variables that train now.

    The models are the given one and all that share layers with it. Loss, metrics and
    all other arguments of `compile` are kept. If an optimizer cannot be created again,
    its model is no longer compiled, and the returned notes say so.
    """
    return compile_all_again(models_sharing_layers(model))


def compile_all_again(layers) -> list:
    """Compiles the models again that `models_sharing_layers` has found."""
    compiled = [layer for layer in layers if getattr(layer, "compiled", False)]
    renewed, notes = {}, []
    for layer in compiled:
        old = layer.optimizer
        try:
            if id(old) not in renewed:
                with distribution.own_strategy(layer):
                    renewed[id(old)] = renewed_optimizer(old, layer.trainable_variables)
        except Exception as error:  # a user's optimizer may raise anything
            renewed[id(old)] = None
            notes.append(
                f"{layer.name!r} is no longer compiled: its {type(old).__name__} "
                f"cannot be created again for other variables ({type(error).__name__}: "
                f"{error}). Call `compile` again."
            )
    # Nothing has changed so far, and nothing can fail from here on.
    for layer in compiled:
        replace_optimizer(layer, renewed[id(layer.optimizer)])
    renew_compiled_functions(layers)
    refresh_torch_parameters(layers)
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
    """Refuses `fit` and `train_on_batch` of a model and of live ones around it."""
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
