"""Gives a built layer another class, in place or as a second view of its state."""

import contextlib
import functools
import inspect
import types

import keras

from keras_lora.keras_internals import warn_caller


def change_class(layer, new_class):
    """Changes a layer's class, and updates what Keras derived from the old one."""
    rebind_wrapped_methods(layer, new_class)
    # Keras's calibration leaves the method that it replaced here.
    if getattr(vars(layer).get("call"), "__func__", None) is type(layer).call:
        del layer.call
    old = derived_from_class(type(layer))
    layer.__class__ = new_class
    for name, value in derived_from_class(new_class).items():
        if value != old[name]:
            held = vars(layer).get(name)
            # Keep entries that were added to a dict since.
            value = {**held, **value} if isinstance(held, dict) else value
            vars(layer)[name] = value


def rebind_wrapped_methods(layer, new_class):
    """Makes the wrappers that Keras puts on a layer call the methods of a class.

    `Layer.__new__` wraps `build` (and `quantize`, before Keras 3.16) for each layer, in
    a function that holds the method in its closure.
    """
    for name, wrapper in vars(layer).items():
        method = getattr(wrapper, "__wrapped__", None)
        is_bound = getattr(method, "__self__", None) is layer
        # Other functions are not wrappers, such as KerasHub's generate_function.
        if not is_bound or method.__name__ != name:
            continue
        new = getattr(new_class, name).__get__(layer)
        for cell in wrapper.__closure__:
            if cell.cell_contents == method:
                cell.cell_contents = new
        wrapper.__wrapped__ = new


@functools.cache
def derived_from_class(cls) -> dict:
    """Returns the comparable attributes that `Layer.__init__` sets for a class.

    Some of them are derived from the signature of `call`.
    """
    sample = object.__new__(cls)
    keras.layers.Layer.__init__(sample, name="sample")
    comparable = (inspect.Signature, bool, dict, list)
    return {n: v for n, v in vars(sample).items() if isinstance(v, comparable)}


def view_as(layer, cls):
    """Returns a view of a layer under another class, with the same attributes.

    So a method of that class, such as `get_config`, can be called while other threads
    use the layer, which does not change.
    """
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", vars(layer))
    return view


def view_with(layer, cls, changed):
    """Returns a view of a layer under a class, with some attributes changed."""
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", {**vars(layer), **changed})
    return view


def bound_functions(layer) -> list:
    """Names of attributes that hold a function over a method: `keras.remat(self.f)`.

    Keras's own wrappers are left out; they have the names of the methods.
    """
    names = []
    for name, value in vars(layer).items():
        cells = getattr(value, "__closure__", None) or ()
        inside = [value, getattr(value, "__wrapped__", None)]
        with contextlib.suppress(ValueError):  # an empty cell
            inside += [cell.cell_contents for cell in cells]
        methods = [x for x in inside if isinstance(x, types.MethodType)]
        if any(x.__self__ is layer and x.__name__ != name for x in methods):
            names.append(name)
    return names


def calls_remat(layer) -> bool:
    """Whether methods of a user's class call `keras.remat`."""
    classes = [c for c in type(layer).__mro__ if not c.__module__.startswith("keras")]
    functions = [x for c in classes for x in vars(c).values()]
    return any(
        "remat" in x.__code__.co_names
        for x in functions
        if isinstance(x, types.FunctionType)
    )


@functools.cache
def class_that_warns_of_lists(cls):
    """Returns a user's class whose lists of weights warn in a call; Keras's unchanged.

    With an adapter they have other places than in the plain layer.
    """
    if cls.__module__.startswith("keras"):
        return cls

    def watched(name):
        def read(layer):
            warn_caller(
                f"The call of {layer.name!r} reads its list of weights, where W has no "
                "adapter and other places hold other weights than before. Read weights "
                "by attribute, or leave the layer out with exclude=."
            )
            return getattr(super(watching, layer), name)

        return property(read)

    # All of Keras's lists are made of these two.
    attributes = {name: watched(name) for name in ("weights", "variables")}
    watching = type(cls)(
        cls.__name__, (cls,), {**attributes, "__module__": cls.__module__}
    )
    return watching


def call_with(layer, cls, values, args, kwargs):
    """Runs the call of a class on a layer, with other values for some weights.

    The call runs on a view of the layer, in which the weights and the objects that hold
    them are replaced. Attributes that it sets on such a view, as Keras's LSTM sets
    `supports_jit`, are then set on the layer too.

    values: keys -> value, with the keys of `weight_places`. The value for the `call` of
        an inner layer is a function of that layer's view and the call's arguments.
    """
    views = []
    cls = class_that_warns_of_lists(cls)
    outputs = cls.call(view_with_values(layer, values, views, cls), *args, **kwargs)
    for held, view, before in views:
        for name, value in vars(view).items():
            if name not in before or value is not before[name]:
                vars(held)[name] = value
    return outputs


def view_with_values(held, values, views, cls=None):
    """Returns a view of a layer, or a copy of a list or dict, with other values.

    views: A list to which each layer is added, with its view and a copy of the view's
        attributes.
    """
    if () in values:
        return values[()]
    inside: dict = {}
    for (key, *rest), value in values.items():
        inside.setdefault(key, {})[tuple(rest)] = value
    if isinstance(held, keras.layers.Layer):
        changed = {
            key: view_with_values(getattr(held, key), inner_values, views)
            for key, inner_values in inside.items()
        }
        # Rematerialized again inside a rematerialized layer, a cell would have no
        # gradient for values that are not variables (on TensorFlow).
        view = view_with(held, cls or type(held), {**changed, "_remat_mode": None})
        if "call" in changed:
            vars(view)["call"] = changed["call"].__get__(view)
        views.append((held, view, dict(vars(view))))
        return view
    copied = dict(held) if isinstance(held, dict) else list(held)
    for key, inner_values in inside.items():
        copied[key] = view_with_values(held[key], inner_values, views)
    return copied


def value_at(layer, keys):
    """Returns the innermost layer that holds a value, and the value.

    keys: The keys that lead to it, as in `weight_places`.
    """
    owner, value = layer, layer
    for key in keys:
        if isinstance(value, keras.layers.Layer):
            owner, value = value, getattr(value, key)
        else:
            value = value[key]
    return owner, value


def with_signature_of(method, plain):
    """Returns a method with the signature of another one, which Keras reads."""

    @functools.wraps(plain)
    def call(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return call
