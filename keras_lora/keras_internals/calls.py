"""The call that runs now, and the calls that made symbolic tensors."""

import contextlib

import keras

from keras_lora.keras_internals import private_names, probes


def was_called(layer):
    """Whether a layer was ever called, symbolically too; `built` does not tell."""
    return layer._called


def in_a_call():
    """Whether this runs inside the call of some layer."""
    return outermost_layer() is not None


def outermost_layer():
    """The layer that was called first, of those that this runs inside of, or None."""
    context = probes.global_state.get_global_attribute("current_call_ctx")
    return None if context is None else context.entry_layer


def in_a_trace(values):
    """Whether a function is being traced, compiled or built of symbolic tensors.

    values: What it is called with, for JAX, which shows it in the values alone.
    """
    if in_stateless_scope() or in_tensorflow_graph():
        return True
    leaves = keras.tree.flatten(values)
    if keras.backend.backend() == "jax":
        import jax

        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return True
    return any(isinstance(leaf, keras.KerasTensor) for leaf in leaves)


def in_tensorflow_graph():
    """Whether this call is being traced, so that what nothing needs is left out."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def is_traced(flag):
    """Whether a function is being traced for a flag that may be true or false."""
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(flag, jax.core.Tracer)
    return keras.ops.is_tensor(flag) and in_tensorflow_graph()


def inside_checkpoint() -> bool:
    """Whether torch saves tensors by hooks, as a function under `keras.remat` does."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    if torch.compiler.is_compiling():
        return False
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("There are some."):
            return False
    except RuntimeError:
        return True


def drawn_in_checkpoint() -> int:
    """A number that is drawn again where a function is computed once more.

    torch sets its generator back for that.
    """
    import torch

    return int(torch.randint(2**31, ()))


def recording_is_stopped(variable) -> bool:
    """Whether TensorFlow's tapes record nothing now.

    So a function under `keras.remat` runs at first, and not when it is computed once
    more.
    """
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(variable.value)
    return not tape.watched_variables()


def tensorflow_graph():
    """The graph that is traced now; one for all that runs eagerly."""
    import tensorflow as tf

    return tf.compat.v1.get_default_graph()


def next_seed(generator):
    """The next seed of a generator.

    JAX traces a function under `keras.remat` by itself: the generator's state may not
    become a value of that trace.
    """
    if keras.backend.backend() != "jax" or not in_stateless_scope():
        return generator.next()
    probes.require(private_names.DROPOUT)
    import jax
    from jax.extend.core import set_current_trace

    state = generator.state.value
    traced = isinstance(state, jax.core.Tracer)
    with set_current_trace(state._trace) if traced else jax.core.eval_context():
        return generator.next()


def innermost_layer():
    """The layer that is being built or called now; None: there is none."""
    scopes = probes.global_state.get_global_attribute("name_scope_stack")
    return scopes[-1].caller if scopes else None


def in_stateless_scope():
    return probes.global_state.get_global_attribute("stateless_scope") is not None


def traced_for_xla():
    """Whether the running code is being compiled with XLA by TensorFlow.

    A variable that is made there cannot start from another's value. (In a stateless
    scope, where Keras builds a model symbolically, it is made later.)
    """
    if in_stateless_scope() or not in_tensorflow_graph():
        return False
    probes.require(private_names.IN_FUNCTIONS)
    graph = tensorflow_graph()
    while graph is not None:
        context = graph._get_control_flow_context()
        if context is not None and context.IsXLAContext():
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def mask_of(tensor):
    """The mask that a layer has put on its outputs; None: it has none."""
    return probes.masking.get_keras_mask(tensor)


def set_mask(tensor, mask):
    probes.masking.set_keras_mask(tensor, mask)


def synchronize(model):
    """Writes the state of a model that JAX is fitting back into its variables."""
    for name in ("state_sync", "jax_state_sync"):  # since Keras 3.16, and before
        if hasattr(model, name):
            getattr(model, name)()
            return


def lies_outside(variable) -> bool:
    """Whether a loop of Keras's on JAX has taken the value out of a variable."""
    try:
        value = variable.value
    except TypeError:  # there is no initializer any more to make another one
        return True
    if is_traced(value):  # and has nothing that could be deleted
        return False
    return value is None or getattr(value, "is_deleted", bool)()


@contextlib.contextmanager
def keeping_weights(model):
    """Keeps the model's weights if one of Keras's loops raises on JAX.

    On JAX they are taken out of the variables meanwhile, and Keras does not bring them
    back after an error: they are the loop's last ones, or the first ones still.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    vars(model).pop("_jax_state", None)  # of a loop that has failed
    values = [(v, v.value) for v in model.variables if not lies_outside(v)]
    try:
        yield
    except BaseException:
        synchronize(model)
        for variable, value in values:
            if lies_outside(variable) and not value.is_deleted():
                type(variable).assign(variable, value)
        raise


def legacy_format():
    """Whether a configuration is asked for by the writer of the old .h5 format."""
    return probes.global_state.get_global_attribute("use_legacy_config", False)


def made_by(tensor):
    """The operation that made a symbolic tensor, and the tensors that it made it of.

    Keras's public `Model.operations` do not say which of them makes the outputs.
    """
    node = node_of(tensor)
    return node.operation, node.input_tensors


def node_of(tensor):
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def computed(outputs, values, run):
    """Computes the values of symbolic tensors, operation by operation.

    Args:
        outputs: A structure of symbolic tensors.
        values: id of a symbolic tensor -> its value, for those that nothing makes.
        run: (operation, args, kwargs) -> the operation's outputs.
    """

    def value(x):
        if not isinstance(x, keras.KerasTensor):
            return x
        if id(x) not in values:
            node = node_of(x)
            given = node.arguments.args, node.arguments.kwargs
            args, kwargs = keras.tree.map_structure(value, given)
            found = keras.tree.flatten(run(node.operation, args, kwargs))
            values.update(zip(map(id, node.outputs), found, strict=True))
        return values[id(x)]

    return keras.tree.map_structure(value, outputs)


def run_operation(operation, args, kwargs):
    """The outputs of an operation, or of a layer, for values."""
    if isinstance(operation, keras.layers.Layer):
        return operation(*args, **kwargs)
    return operation.call(*args, **kwargs)
