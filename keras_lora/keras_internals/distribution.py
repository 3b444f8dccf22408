"""Layouts of variables under `keras.distribution` (JAX) and `tf.distribute`."""

import contextlib
import copy
import hashlib
import weakref

import keras
import numpy as np

from keras_lora.keras_internals import probes, processes, warn_caller

warned = weakref.WeakSet()  # distributions that a warning was given for
REPLICATED_BYTES = 2**20  # of a value that may be whole on a device for a moment


def layout_of(variable):
    """Returns the layout of a variable under `keras.distribution`.

    None without a distribution, or if the layout names no axis of the mesh.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return None
    layout = distribution.get_variable_layout(variable)
    if not hasattr(layout, "axes"):  # Keras 3.12 gives that of JAX
        layout = distribution.get_tensor_layout(variable.path)
    return layout if any(getattr(layout, "axes", None) or ()) else None


@contextlib.contextmanager
def laid_out_by(axes_of, like):
    """Context in which new variables get a layout, unless the layout map has one.

    `add_weight` asks the distribution for the layout before a variable has values, so
    no device ever holds it whole.

    Args:
        axes_of: Name of a variable -> the mesh axis for each of its own axes, or None.
        like: A layout over the same mesh. None: the context does nothing.
    """
    if like is None:
        yield
        return
    outer = keras.distribution.distribution()

    def get_variable_layout(variable):
        axes = axes_of.get(variable.name)
        if not axes or not any(axes) or len(axes) != len(variable.shape):
            return outer.get_variable_layout(variable)
        named = outer.get_tensor_layout(variable.path)
        if named is not None:
            return named
        axes = divisible_axes(variable, axes, like.device_mesh, outer)
        return keras.distribution.TensorLayout(axes, like.device_mesh)

    inside = copy.copy(outer)
    inside.get_variable_layout = get_variable_layout
    keras.distribution.set_distribution(inside)
    try:
        yield
    finally:
        keras.distribution.set_distribution(outer)


def divisible_axes(variable, axes, mesh, distribution):
    """Returns the axes, with None where they do not divide a variable's size."""
    parts = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    sizes = zip(axes, variable.shape, strict=True)
    divisible = [None if axis and size % parts[axis] else axis for axis, size in sizes]
    if divisible != list(axes) and distribution not in warned:
        warned.add(distribution)
        warn_caller(
            f"{variable.path!r} of shape {tuple(variable.shape)} does not divide over "
            f"the mesh axes {tuple(axes)} of its kernel's layout: it lies whole on "
            "every device there, as do others like it."
        )
    return divisible


def fetch(value):
    """Returns the whole value of a variable or tensor as a NumPy array.

    If it is sharded over several processes, all of them must call. The hosts get a
    large value part by part, so that no device holds it whole.
    """
    value = keras.ops.convert_to_tensor(value)
    if getattr(value, "is_fully_addressable", True) or value.is_fully_replicated:
        return keras.ops.convert_to_numpy(value)
    processes.exchange(None, processes.BARRIER_SECONDS)
    multihost = probes.module("jax.experimental.multihost_utils")
    if value.nbytes <= REPLICATED_BYTES:
        return multihost.process_allgather(value, tiled=True)
    here = probes.module("jax").process_index()
    own_parts = {str(x.index): x.data for x in value.addressable_shards}
    whole, bits = np.empty(value.shape, value.dtype), f"u{value.dtype.itemsize}"
    places = value.sharding.devices_indices_map(value.shape).items()
    first = {str(index): device for device, index in reversed(places)}
    for place, index in {str(index): index for _, index in places}.items():
        is_source = first[place].process_index == here
        part = own_parts[place] if is_source else np.empty_like(whole[index])
        part = np.ascontiguousarray(part).view(bits)  # which are added to zeros
        part = multihost.broadcast_one_to_all(part, is_source)
        whole[index] = np.asarray(part).view(whole.dtype)
    return whole


def is_sharded(variable) -> bool:
    """Whether a variable is sharded over several devices."""
    sharding = getattr(variable.value, "sharding", None)
    return sharding is not None and not sharding.is_fully_replicated


def assign(variable, value):
    """Assigns a value that every process holds whole; each device gets its shard."""
    if isinstance(value, np.ndarray) and value.shape == tuple(variable.shape):
        value = shard_like(variable, value)
    variable.assign(value)


def shard_like(variable, value):
    """Returns a NumPy value on devices, sharded like a variable of its shape."""
    sharding = getattr(variable.value, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return value
    value = value.astype(variable.dtype)  # ml_dtypes gives NumPy bfloat16
    return probes.module("jax").make_array_from_callback(
        value.shape, sharding, lambda index: value[index]
    )


def variable_like(variable, values, **options):
    """Creates a variable with the layout of another one of the same shape."""
    distribution = keras.distribution.distribution()
    if keras.backend.backend() == "jax" and distribution:
        options["layout"] = distribution.get_variable_layout(variable)
        if isinstance(values, np.ndarray):
            values = shard_like(variable, values)
    with scope_of_variables([variable], variable.path):
        return keras.Variable(values, **options)


@contextlib.contextmanager
def whole_on_host(model):
    """Context in which a model's variables have whole values in host memory.

    Yields whether this process is the one that writes files; only there are the values
    kept.
    """
    is_writer, pairs = processes.is_writer(model), []
    if processes.worker_strategy(model) or not processes.is_shared(model):
        yield is_writer
        return
    with on_host():
        for variable in model.variables:
            value = fetch(variable)
            if is_writer:
                pairs.append((variable, keras.ops.convert_to_tensor(value)))
        scope = keras.StatelessScope(state_mapping=pairs)
    with scope:
        yield is_writer


@contextlib.contextmanager
def on_host():
    """Context in which JAX creates arrays whole, in the host's memory."""
    jax, distribution = probes.module("jax"), keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            yield
    finally:
        keras.distribution.set_distribution(distribution)


def lay_out_batch(batch):
    """Lays out a batch as `fit` does: each process passes its own rows.

    Processes that hold the same rows must pass equal ones: see `digests_of_rows`.
    """
    jax, distribution = probes.module("jax"), keras.distribution.distribution()

    def place(x):
        x = keras.ops.convert_to_numpy(x)
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
        layout = distribution.get_data_layout(x.shape).backend_layout
        return jax.make_array_from_process_local_data(layout, x)

    return keras.tree.map_structure(place, batch)


def digests_of_rows(batch) -> dict:
    """Returns {rows: digest} of a batch from `lay_out_batch`, for other processes."""
    digests = {}
    for number, x in enumerate(keras.tree.flatten(batch)):
        digests[f"shape {number}"] = str(x.shape)
        for part in x.addressable_shards:
            digest = hashlib.sha256(np.asarray(part.data).tobytes()).hexdigest()
            digests[f"{number} {part.index}"] = digest
    return digests


def strategy_scope(model):
    """Context in which variables are created under a model's strategy.

    Keras trains a model under the strategy of `tf.distribute` that it was built in.

    Raises:
        ValueError: If another strategy's scope is entered than the model's.
    """
    return scope_of_variables(model.variables, model.name)


@contextlib.contextmanager
def scope_of_variables(variables, name):
    """The same for the strategy under which variables were made; name: for errors."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    tf = probes.module("tensorflow").distribute
    now = tf.get_strategy() if tf.has_strategy() else None
    strategy = processes.strategy_of(variables)
    mirrored = tf.MirroredStrategy, tf.MultiWorkerMirroredStrategy, tf.TPUStrategy
    if strategy is not now and isinstance(now, mirrored):
        raise ValueError(
            f"{name!r} was not built in the scope of this "
            f"{type(now).__name__}: its weights lie elsewhere, and what is made here "
            "would not train with them. Build the model in the scope, or make this "
            "call outside of it. Nothing was changed."
        )
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        yield


def replica_context():
    """Returns the replica's context of `tf.distribute`; None without other replicas."""
    if keras.backend.backend() != "tensorflow":
        return None
    context = probes.module("tensorflow").distribute.get_replica_context()
    return context if context and context.num_replicas_in_sync > 1 else None


def in_cross_replica_context() -> bool:
    """Whether the code runs under a strategy of `tf.distribute`, but in no replica."""
    if keras.backend.backend() != "tensorflow":
        return False
    tf = probes.module("tensorflow").distribute
    return tf.has_strategy() and tf.in_cross_replica_context()


def gather_over_replicas(rows):
    """Returns the rows of all replicas of `tf.distribute`, one after the other."""
    context = replica_context()
    if context is None:
        return rows
    # A copy, because one object that all replicas share would be gathered once.
    return context.all_gather(keras.ops.copy(rows), axis=0)


def assign_unless(condition, variables, values):
    """Assigns values unless a condition holds, which all replicas must agree on."""

    def assign(variable, value, kept):
        now = keras.ops.convert_to_tensor(variable)
        variable.assign(keras.ops.where(kept, now, value))

    def on_each(strategy, condition, values):
        for variable, value in zip(variables, values, strict=True):
            update = strategy.extended.update
            update(variable.value, assign, args=(value, condition), group=False)

    context = replica_context()
    if context is not None:
        context.merge_call(on_each, args=(condition, values))
        return
    for variable, value in zip(variables, values, strict=True):
        assign(variable, value, condition)
