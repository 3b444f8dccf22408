"""Where variables lie: under `keras.distribution` of JAX, under `tf.distribute`."""

import contextlib
import weakref

import keras
import numpy as np

from keras_lora.keras_internals import private_names, probes, processes, warn_caller

warned = weakref.WeakSet()  # the distributions of which a warning was given


def layout_of(variable):
    """The layout that a model's distribution gives a variable; None without axes."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return None
    probes.require(private_names.LAYOUTS)
    layout = distribution.get_variable_layout(variable)
    return layout if any(getattr(layout, "axes", None) or ()) else None


def lay_out(variable, axes, like):
    """Lays a variable out by axes of a mesh, unless the layout map names it itself.

    `add_weight` takes no layout, and a variable has no public one.
    """
    distribution = keras.distribution.distribution()
    if distribution.get_tensor_layout(variable.path) is None:
        mesh = like.device_mesh
        axes = dividing(variable, axes, mesh, distribution)
        variable._layout = keras.distribution.TensorLayout(axes, mesh)
        variable.assign(variable.value)


def dividing(variable, axes, mesh, distribution):
    """The axes of a mesh, with None for those of which a size is no multiple."""
    parts = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    sizes = zip(axes, variable.shape, strict=True)
    found = [None if axis and size % parts[axis] else axis for axis, size in sizes]
    if found != list(axes) and distribution not in warned:
        warned.add(distribution)
        warn_caller(
            f"{variable.path!r} of shape {tuple(variable.shape)} does not divide over "
            f"the mesh axes {tuple(axes)} of its kernel's layout: it lies whole on "
            "every device there, as do others like it."
        )
    return found


def fetch(value):
    """The whole of a variable or tensor as NumPy.

    Where it is cut over several processes, this is a collective: all of them call.
    """
    value = keras.ops.convert_to_tensor(value)
    if getattr(value, "is_fully_addressable", True) or value.is_fully_replicated:
        return keras.ops.convert_to_numpy(value)
    processes.meet()
    multihost = probes.module("jax.experimental.multihost_utils")
    return multihost.process_allgather(value, tiled=True)


def put(variable, value):
    """Assigns what every process has whole; each cuts out the parts that it holds."""
    sharding = getattr(variable.value, "sharding", None)
    if isinstance(value, np.ndarray) and sharding is not None:
        jax = probes.module("jax")
        if value.shape == tuple(variable.shape) and not sharding.is_fully_addressable:
            value = value.astype(variable.dtype)  # ml_dtypes gives NumPy bfloat16
            value = jax.make_array_from_callback(
                value.shape, sharding, lambda index: value[index]
            )
    variable.assign(value)


@contextlib.contextmanager
def own_strategy(model):
    """Creates variables in the same strategy as the model's.

    Keras trains a model by the strategy of `tf.distribute` that it was built in.

    Raises:
        ValueError: If another strategy's scope is entered than the model's.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    tf = probes.module("tensorflow").distribute
    now = tf.get_strategy() if tf.has_strategy() else None
    values = (variable.value for variable in model.variables)
    own = next(filter(None, map(strategy_of, values)), None)
    mirrored = tf.MirroredStrategy, tf.MultiWorkerMirroredStrategy, tf.TPUStrategy
    if own is not now and isinstance(now, mirrored):
        raise ValueError(
            f"The model {model.name!r} was not built in the scope of this "
            f"{type(now).__name__}: its weights lie elsewhere, and what is made here "
            "would not train with them. Build the model in the scope, or make this "
            "call outside of it. Nothing was changed."
        )
    with contextlib.nullcontext() if own is None else own.scope():
        yield


def strategy_of(value):
    return getattr(value, "distribute_strategy", None)
