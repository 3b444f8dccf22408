"""What keras_lora needs of Keras that Keras does not make public, in one place.

There is no public way to add state to a built layer (keras issue 18601), to take
it away again, or to freeze one variable of a layer for good.
"""

import contextlib
import inspect
from typing import NamedTuple

import keras
from keras.src.backend.common import global_state


class HiddenVariable:
    """A variable that a layer reads, and that is none of its weights.

    Keras tracks what attributes hold; it does not look into this object.
    """

    def __init__(self):
        self.variable = None

    def make(self, initializer, dtype, name):
        self.variable = keras.Variable(
            initializer,
            shape=(),
            dtype=dtype,
            trainable=False,
            autocast=False,
            name=name,
        )

    def seen_by_jax(self):
        """JAX passes state by hand, and what is not passed becomes a constant."""
        on_jax = keras.backend.backend() == "jax"
        return [self.variable] if on_jax and self.variable is not None else []


class Place(NamedTuple):
    """Where a variable stood before it was frozen."""

    index: int
    autocast: bool


@contextlib.contextmanager
def unlocked(layer):
    """A built layer refuses new state; inside this context it does not."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def freeze(layer, variable):
    """Moves a variable among the layer's non-trainable ones.

    `layer.trainable = True` does not reach it there. It is not created with
    trainable=False, because a TensorFlow variable born so never trains later.
    Autocast ends too: merging adds to the stored value, not to a rounded copy.
    """
    index = [id(v) for v in layer._trainable_variables].index(id(variable))
    place = Place(index, variable._autocast)
    layer._untrack_variable(variable)
    variable.trainable = False
    variable._autocast = False
    with unlocked(layer):
        layer._track_variable(variable)
    return place


def unfreeze(layer, variable, place):
    """The inverse of `freeze`: same order of weights, same flags."""
    layer._untrack_variable(variable)
    variable.trainable = True
    if getattr(variable._value, "_trainable", None) is False:
        # The TensorFlow variable was made after Keras's was frozen, as happens when
        # a subclassed model is built by its first call.
        variable._value._trainable = True
    variable._autocast = place.autocast
    with unlocked(layer):
        layer._track_variable(variable)  # not trainable in a frozen layer
    tracked = layer._trainable_variables
    tracked.insert(place.index, tracked.pop())


def was_called(layer):
    """Whether a layer was ever called, symbolically too."""
    return layer._called


def in_a_call():
    """Whether this runs inside the call of some layer."""
    return global_state.get_global_attribute("current_call_ctx") is not None


def flatten_layers(model):
    """The model itself and every layer inside it, each once."""
    return model._flatten_layers(include_self=True, recursive=True)


def attach(layer, name, sublayer):
    with unlocked(layer):
        setattr(layer, name, sublayer)


def detach(layer, name):
    with unlocked(layer):
        layer._tracker.untrack(getattr(layer, name))
        delattr(layer, name)


def seen_as(layer, cls):
    """The same state under another class, as a second object; nothing is changed."""
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", vars(layer))
    return view


def replace_kernel(layer, kernel_name, variable):
    """Puts another variable in the place of the layer's kernel, list and all."""
    old = getattr(layer, kernel_name)
    # Keras's own layers hold it in `_kernel`, behind a property.
    attribute = next(
        name
        for name in (kernel_name, f"_{kernel_name}")
        if vars(layer).get(name) is old
    )
    for tracked in (layer._trainable_variables, layer._non_trainable_variables):
        place = [index for index, v in enumerate(tracked) if v is old]
        if place:
            layer._untrack_variable(old)
            with unlocked(layer):
                setattr(layer, attribute, variable)
            tracked.insert(place[0], tracked.pop())
            return old
    raise AssertionError("a kernel is tracked by its layer")


def change_class(layer, new_class):
    """Gives a layer another class, and renews what Keras cached of the old one."""
    for name in ("build", "quantize"):
        # `Layer.__new__` hides the method in a closure of the instance.
        wrapper = vars(layer)[name]
        held = [
            c for c in wrapper.__closure__ if c.cell_contents == wrapper.__wrapped__
        ]
        if len(held) != 1:
            raise RuntimeError(
                f"Keras {keras.__version__} wraps `{name}` of a layer in another way "
                "than keras_lora knows. Please report it, and use an earlier Keras."
            )
        method = getattr(new_class, name).__get__(layer)
        held[0].cell_contents = wrapper.__wrapped__ = method
    layer.__class__ = new_class
    layer._call_signature = inspect.signature(layer.call)
    parameters = list(layer._call_signature.parameters)
    layer.call_signature_parameters = parameters
    layer._call_has_training_arg = "training" in parameters
    layer._call_has_mask_arg = "mask" in parameters
    if hasattr(layer, "_call_has_context_arg"):
        layer._call_has_context_arg = {
            name: name in parameters for name in layer._call_has_context_arg
        }


COMPILED_FUNCTIONS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",  # of KerasHub's tasks
)


def take_compiled_functions(model):
    """Removes the traced functions of a model and of models in it; returns them."""
    taken = []
    for layer in flatten_layers(model):
        for name in COMPILED_FUNCTIONS:
            if getattr(layer, name, None) is not None:
                taken.append((layer, name, getattr(layer, name)))
                setattr(layer, name, None)
    return taken


def compile_again(model):
    """Compiles a compiled model anew, same settings: its variables have changed."""
    for layer in flatten_layers(model):
        if getattr(layer, "compiled", False):
            settings = dict(layer._compile_config.config)
            optimizer = settings["optimizer"]
            settings["optimizer"] = type(optimizer).from_config(optimizer.get_config())
            # Not the layer's own `compile`: what a subclass adds to it, such as a
            # sampler, is no part of the settings and stays as it is.
            keras.Model.compile(layer, **settings)
            if layer.built:
                build_optimizer(layer.optimizer, layer.trainable_variables)
    take_compiled_functions(model)
    refresh_torch_parameters(model)


def build_optimizer(optimizer, variables):
    """Builds it for other variables: faster ones may be among them no more.

    The optimizer is then the one it was made of, also inside a LossScaleOptimizer.
    """
    for part in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if isinstance(part, TwoRates) and not any(map(part.is_faster, variables)):
            part.__class__ = part.plain_class
    optimizer.build(variables)


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

    On torch Keras puts subclasses of its own in the place of most optimizers. They
    update all variables in one call, at one rate, and skip `update_step`.
    """
    return next(c for c in cls.__mro__ if not c.__module__.startswith(BACKENDS))


BACKENDS = "keras.src.backend."


def refresh_torch_parameters(model):
    """The torch backend keeps a second register of parameters in every layer."""
    for layer in flatten_layers(model):
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


def sublayers(layer):
    """The layers that a layer holds itself, in the order in which it got them."""
    wrapped = getattr(layer, "_functional", None)  # a Sequential's second view
    return [sublayer for sublayer in layer._layers if sublayer is not wrapped]


def own_variables(layer):
    """The variables of a layer itself that `layer.trainable = True` would train."""
    return layer._trainable_variables


def set_mask(tensor, mask):
    keras.src.backend.set_keras_mask(tensor, mask)


@contextlib.contextmanager
def name_scope_of(layer):
    """Variables made inside are called as if the layer had made them in `build`."""
    with contextlib.ExitStack() as scopes:
        for part in (layer.path or layer.name).split("/"):
            scopes.enter_context(keras.name_scope(part))
        yield


def layer_state(layer):
    """The layer's own variables: (those that can train, those that never do)."""
    frozen = getattr(layer, "frozen_kernel", None) if hasattr(layer, "lora") else None
    others = [v for v in layer._non_trainable_variables if v is not frozen]
    return list(layer._trainable_variables), others


def synchronize(model):
    """On JAX the state of a model that is being fitted lies outside of it."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
