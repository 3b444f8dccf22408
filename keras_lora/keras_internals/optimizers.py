"""Optimizers of models whose trainable variables change, or that have two rates."""

import keras

from keras_lora.keras_internals import distribution, layer_state


def renew_optimizer(optimizer, variables):
    """Returns an optimizer for variables: itself if it can stay, else a copy.

    The copy has no state. It is not made through `from_config`, which loses calls such
    as `exclude_from_weight_decay`, and which users' own schedules, callables and
    constructors may not support.
    """
    if optimizer is None or not optimizer.built:
        return optimizer
    if list(map(id, optimizer._trainable_variables)) == list(map(id, variables)):
        return optimizer
    return copy_for_variables(optimizer, variables)


def copy_for_variables(optimizer, variables):
    """Returns a copy of an optimizer that is built for variables, without state.

    Raises:
        ValueError: If the copy would share variables with the optimizer.
    """
    names, old = set(), {id(variable) for variable in optimizer.variables}
    for _ in range(2):
        copy = copy_without_state(optimizer, names)
        for part in (copy, getattr(copy, "inner_optimizer", None)):
            if isinstance(part, TwoRates) and not any(map(part.is_faster, variables)):
                part.__class__ = part.plain_class
        copy.build(variables)
        shared = attributes_holding(copy, old)
        if not shared:
            return copy
        # Variables that `build` has not replaced come from the constructor.
        names |= shared
    raise ValueError(f"it keeps variables of its own in {sorted(shared)}")


def copy_unbuilt(optimizer):
    """Returns a copy of an optimizer that is not built; raises if it is built."""
    if optimizer.built:
        raise ValueError(
            f"The optimizer, a {type(optimizer).__name__}, is built already, for other "
            "variables. Give a new one."
        )
    return copy_without_state(optimizer)


def attributes_holding(optimizer, ids) -> set:
    """Returns the names of attributes that are, or hold, one of some variables."""
    names = set()
    for name, value in vars(optimizer).items():
        if isinstance(value, keras.optimizers.Optimizer):
            names |= attributes_holding(value, ids)
        elif isinstance(value, (list, tuple, dict)):
            values = value.values() if isinstance(value, dict) else value
            names |= {name for held in values if id(held) in ids}
        elif id(value) in ids:
            names.add(name)
    return names


def copy_without_state(optimizer, names=frozenset()):
    """Returns a copy of an optimizer as it was before `build`.

    The variables and registers of Keras's own constructor are new ones; other values
    are shared.

    names: Further attributes whose variables are new ones.
    """
    copy = object.__new__(type(optimizer))
    plain = keras.optimizers.Optimizer
    plain.__init__(copy, learning_rate=0.0, name=optimizer.name)
    plain.exclude_from_weight_decay(copy)  # creates another register
    new = dict(vars(copy))
    registers = {name for name, value in new.items() if is_register(value)}
    names = {*names, *(n for n, v in new.items() if isinstance(v, keras.Variable))}
    for value in new.values():
        if isinstance(value, (list, dict)):
            value.clear()
    for name, value in vars(optimizer).items():
        if name not in registers:
            vars(copy)[name] = value
    copy.built = False
    for name, value in vars(optimizer).items():
        if isinstance(value, keras.optimizers.Optimizer):  # inside a loss scale
            setattr(copy, name, copy_without_state(value, names))
        elif name in names and isinstance(value, keras.Variable):
            start = distribution.fetch(value)
            scope, _, own_name = value.path.rpartition("/")
            with layer_state.name_scopes(scope):
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
    """Whether an attribute of a new optimizer is a container for variables."""
    if isinstance(value, (list, dict)):
        return True
    of_keras = type(value).__module__.startswith("keras.")
    return of_keras and not isinstance(value, keras.Variable)


def replace_optimizer(model, optimizer):
    """Replaces a model's optimizer, which Keras and TensorFlow do not track."""
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
    no learning rate per variable: `update_step` gets the rate for one variable, but
    weight decay reads the optimizer's own for a list of variables.
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
            # A view with the other rate, because the replicas of a strategy are
            # threads that share this object.
            rated = plain_view(
                self, _learning_rate=lambda: self.faster(self.learning_rate)
            )
            rated._apply_weight_decay(fast)

    def __reduce__(self):
        # Keras's result names a method of this class, which pickle cannot find.
        load, arguments = super().__reduce__()
        return getattr(TwoRates, load.__name__), arguments


def plain_view(optimizer, **changed):
    """Returns a view of a `TwoRates` under its plain class, with attributes changed."""
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
