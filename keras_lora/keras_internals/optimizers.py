"""Creates optimizers like a given one for other variables."""

import keras

from keras_lora.keras_internals.distribution import fetch
from keras_lora.keras_internals.layers import name_scopes


def renewed_optimizer(optimizer, variables):
    """Returns the optimizer itself if it has no state yet, else a copy without state.

    Not by way of `from_config`: the configuration of an optimizer leaves out what was
    called on it (`exclude_from_weight_decay`), and schedules, callables and
    constructors of a user's own need not have any.
    """
    if optimizer is None or not optimizer.built:
        return optimizer
    if list(map(id, optimizer._trainable_variables)) == list(map(id, variables)):
        return optimizer
    return like_without_state(optimizer, variables)


def like_without_state(optimizer, variables):
    """An optimizer like this one, built for variables; a ValueError where it cannot."""
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
        # What `build` has not replaced was made in the constructor.
        names |= found
    raise ValueError(f"it keeps variables of its own in {sorted(found)}")


def unbuilt_copy(optimizer):
    """One like an optimizer that is not built; a ValueError for one that is."""
    if optimizer.built:
        raise ValueError(
            f"The optimizer, a {type(optimizer).__name__}, is built: it belongs to "
            "other variables. Give a new one."
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
    """A copy before `build`.

    names: attributes of which the variables are new. So are those of Keras's own
    constructor, and the registers that it makes; all else is shared.
    """
    copy = object.__new__(type(optimizer))
    plain = keras.optimizers.Optimizer
    plain.__init__(copy, learning_rate=0.0, name=optimizer.name)
    plain.exclude_from_weight_decay(copy)  # makes one more register, of what it found
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
        if isinstance(value, keras.optimizers.Optimizer):  # that of a loss scale
            setattr(copy, name, without_state(value, names))
        elif name in names and isinstance(value, keras.Variable):
            start = fetch(value)
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
    """Whether a value of a new optimizer is for variables that are yet to come."""
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
            inside = getattr(old, "inner_optimizer", None)  # compile wrapped a user's
            wrapped = inside is not None and config.config["optimizer"] is inside
            config.config["optimizer"] = (
                optimizer.inner_optimizer if wrapped else optimizer
            )
    if hasattr(model, "_compiled_trainable_state"):
        model._compiled_trainable_state = {
            layer: layer.trainable for layer in model._flatten_layers()
        }


class TwoRates(keras.optimizers.Optimizer):
    """A mixin before an optimizer's own class: some variables learn faster.

    Subclasses have `plain_class`, and say `is_faster(variable)` and `faster(rate)`.
    The learning rate is no variable's own in Keras: `update_step` gets it for one
    variable at a time, weight decay reads the optimizer's for a list of them.
    """

    def update_step(self, gradient, variable, learning_rate):
        # By the index: on TensorFlow this is not Keras's variable but one replica's.
        index = self._get_variable_index(variable)
        if self.is_faster(self._trainable_variables[index]):
            learning_rate = self.faster(learning_rate)
        # By position: Adadelta calls the gradient `grad`.
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables):
        if keras.backend.backend() == "torch":
            # Leaves out those without decay only later, and refuses an empty list.
            variables = [v for v in variables if self._use_weight_decay(v)]
        slow = [v for v in variables if not self.is_faster(v)]
        fast = [v for v in variables if self.is_faster(v)]
        if slow:
            super()._apply_weight_decay(slow)
        if fast:
            # Not a rate that changes meanwhile: the replicas of a distribution
            # strategy are threads that share this object.
            rated = as_plain_optimizer(
                self, _learning_rate=lambda: self.faster(self.learning_rate)
            )
            rated._apply_weight_decay(fast)

    def __reduce__(self):
        # Keras names a method of the object's class, which pickle cannot find.
        load, arguments = super().__reduce__()
        return getattr(TwoRates, load.__name__), arguments


def as_plain_optimizer(optimizer, **changed):
    """The optimizer as its plain class has it: a second view of the same state."""
    view = object.__new__(optimizer_class(optimizer.plain_class))
    vars(view).update(vars(optimizer), **changed)
    return view


def optimizer_class(cls):
    """The class whose `update_step` makes the update.

    On torch Keras puts subclasses of its own in the place of most optimizers, under
    the same names. They update all variables in one call, at one rate, and skip
    `update_step`.
    """
    if not cls.__module__.startswith("keras."):
        return cls
    return [c for c in cls.__mro__ if c.__name__ == cls.__name__][-1]
