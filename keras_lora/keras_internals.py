"""What keras_lora needs of Keras that Keras does not make public, in one place.

There is no public way to add state to a built layer (keras issue 18601), to take
it away again, or to freeze one variable of a layer for good.
"""

import contextlib
import functools
import gc
import inspect
import json
from typing import NamedTuple

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope


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
    variable.assign = functools.partial(assign_outside_calls, variable)
    with unlocked(layer):
        layer._track_variable(variable)
    return place


def assign_outside_calls(variable, value):
    """In the place of a frozen kernel's `assign`, for wrappers that would move W."""
    if in_a_call():
        raise ValueError(
            f"A layer assigns to {variable.path!r} in its call, which is the frozen "
            "kernel of a LoRA layer. Leave that layer out with exclude=."
        )
    return type(variable).assign(variable, value)


def unfreeze(layer, variable, place):
    """The inverse of `freeze`: same order of weights, same flags."""
    layer._untrack_variable(variable)
    vars(variable).pop("assign", None)
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


def traced_for_xla():
    """Whether TensorFlow compiles what runs now with XLA.

    A variable that is made there cannot start from another's value. (In a stateless
    scope, where Keras builds a model symbolically, it is made later.)
    """
    if keras.backend.backend() != "tensorflow" or in_stateless_scope():
        return False
    import tensorflow as tf

    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        context = graph._get_control_flow_context()
        if context is not None and context.IsXLAContext():
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def flatten_layers(model):
    """The model itself and every layer inside it, each once."""
    return model._flatten_layers(include_self=True, recursive=True)


def attach(layer, name, sublayer):
    with unlocked(layer):
        setattr(layer, name, sublayer)
        # torch keeps modules where the default of a class hides them.
        vars(layer)[name] = sublayer


def detach(layer, name):
    with unlocked(layer):
        layer._tracker.untrack(getattr(layer, name))
        delattr(layer, name)
        vars(layer).pop(name, None)


def seen_as(layer, cls):
    """The same layer under another class: a second object over the same attributes.

    Its methods can be asked, for a configuration say, while other threads use the
    layer itself, of which nothing changes.
    """
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", vars(layer))
    return view


def twin(layer, cls, changed):
    """A view of a layer under a class, of which some attributes are others."""
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", {**vars(layer), **changed})
    return view


def kernel_variables(layer) -> dict:
    """Attribute -> variable of a layer itself, all but its bias.

    Those of a layer that is quantized: its integers, scales, zeros and groups.
    """
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, keras.Variable) and name != "bias"
    }


class QuantizedWhole:
    """A mixin before a layer's class: `Model.quantize` does not pass the layer by.

    It asks every layer for what is inside, and quantizes those with nothing in them;
    `filters` are asked for these alone. An adapter is inside its layer.
    """

    def _flatten_layers(self, include_self=True, recursive=True):
        caller = inspect.currentframe().f_back
        asked_by = caller.f_locals.get("self")
        if caller.f_code.co_name == "quantize" and isinstance(asked_by, keras.Model):
            return [self]
        return super()._flatten_layers(include_self, recursive)


def exchange_variables(layer, other):
    """Gives a quantized layer the kernels of a float one like it."""
    with unlocked(layer):
        for name in kernel_variables(layer):
            delattr(layer, name)
        for name, variable in kernel_variables(other).items():
            setattr(layer, name, variable)
    order = [variable.name for variable in other._trainable_variables]
    layer._trainable_variables.sort(key=lambda variable: order.index(variable.name))
    layer._is_quantized = False
    layer.quantization_config = None


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


def holders(model) -> list:
    """The layers of a model, and every live model that shares one which has variables.

    A layer does not know its owners, and their traced functions know it as it was. So
    they are looked for among the garbage collector's objects.
    """
    layers = flatten_layers(model)
    own = {id(vars(layer)) for layer in layers}  # a second view has the same
    shared = {id(x) for x in layers if own_variables(x) or x._non_trainable_variables}
    around = [
        found
        for found in gc.get_objects()
        if issubclass(type(found), keras.Model)
        and id(vars(found)) not in own
        and "_layers" in vars(found)
        and not shared.isdisjoint(map(id, flatten_layers(found)))
    ]
    return layers + around


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
    layers = holders(model)
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


def renewed_optimizer(optimizer, variables):
    """The optimizer itself where it has no state yet, else one like it without.

    Not by way of `from_config`: the configuration of an optimizer leaves out what was
    called on it (`exclude_from_weight_decay`), and schedules, callables and
    constructors of a user's own need not have any.
    """
    if optimizer is None or not optimizer.built:
        return optimizer
    if list(map(id, optimizer._trainable_variables)) == list(map(id, variables)):
        return optimizer
    names = {"_iterations", "_learning_rate"}
    old = {id(variable) for variable in optimizer.variables}
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


def attributes_with(optimizer, ids) -> set:
    """Names of attributes that are, or hold, one of these variables."""
    found = set()
    for name, value in vars(optimizer).items():
        if name.startswith("_self_"):
            continue
        if isinstance(value, keras.optimizers.Optimizer):
            found |= attributes_with(value, ids)
        elif isinstance(value, (list, tuple, dict)):
            values = value.values() if isinstance(value, dict) else value
            found |= {name for held in values if id(held) in ids}
        elif id(value) in ids:
            found.add(name)
    return found


def without_state(optimizer, names):
    """A copy before `build`: the variables of these names are new, all else shared."""
    copy = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if not name.startswith("_self_"):  # TensorFlow's register of the original
            vars(copy)[name] = value
    del vars(copy)["_tracker"]
    copy.built = False
    copy._variables, copy._trainable_variables = [], []
    is_variable, _ = optimizer._tracker.config["variables"]
    copy._tracker = type(optimizer._tracker)(
        {"variables": (is_variable, copy._variables)}
    )
    copy._trainable_variables_indices = {}
    if hasattr(optimizer, "_exclude_from_weight_decay_cache"):
        copy._exclude_from_weight_decay_cache = {}
    for name, value in vars(optimizer).items():
        if isinstance(value, keras.optimizers.Optimizer):  # that of a loss scale
            setattr(copy, name, without_state(value, names))
        elif name in names and isinstance(value, keras.Variable):
            start = keras.ops.convert_to_numpy(value)
            variable = keras.Variable(
                0 * start if name == "_iterations" else start,
                dtype=value.dtype,
                trainable=False,
                aggregation=value.aggregation,
                name=value.name,
            )
            variable._path = value.path
            setattr(copy, name, variable)
    return copy


def replace_optimizer(model, optimizer):
    """Past Keras's and TensorFlow's tracking, as `compile` itself does it."""
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


def refresh_torch_parameters(layers):
    """The torch backend keeps a second register of parameters in every layer."""
    for layer in layers:
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


def legacy_format():
    """Whether a configuration is asked for by the writer of the old .h5 format."""
    return keras.src.backend.common.global_state.get_global_attribute(
        "use_legacy_config", False
    )


# What unpickles any layer: pickle finds it by the name of a class that is importable.
UNPICKLE = keras.layers.Layer._unpickle_model


def hold_resource(layer, name, variable):
    """Lets TensorFlow find a variable that Keras does not track.

    tf.saved_model.save refuses functions that read one that no object holds.
    """
    if keras.backend.backend() == "tensorflow":
        layer._track_trackable(variable.value, name, overwrite=True)


def release_resource(layer, name):
    if keras.backend.backend() == "tensorflow":
        layer._delete_tracking(name)


def hold_state(layer, name, variable, get, put):
    """The same for a variable that may get its value later, when a call has ended.

    TensorFlow's own checkpoints take for it what `get` gives, any JSON value, and hand
    it to `put`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        class State(tf.train.experimental.PythonState):
            def serialize(self):
                return json.dumps(get())

            def deserialize(self, string):
                put(json.loads(string))

            def _trackable_children(self, save_type="checkpoint", **kwargs):
                return {"value": variable.value} if save_type == "savedmodel" else {}

        layer._track_trackable(State(), name, overwrite=True)
