"""The current call, and the calls that made symbolic tensors."""

import contextlib

import keras

from keras_lora.keras_internals import private_names, probes


def was_called(layer):
    """Whether a layer was ever called, if only symbolically; `built` does not tell."""
    return layer._called


def in_a_call():
    """Whether the code runs inside a layer's call."""
    return outermost_layer() is not None


def outermost_layer():
    """Returns the outermost layer whose call the code runs in, or None."""
    context = probes.global_state.get_global_attribute("current_call_ctx")
    return None if context is None else context.entry_layer


def in_a_trace(values):
    """Whether a function is being traced, compiled or built from symbolic tensors.

    values: Its arguments, which are the only sign of tracing on JAX.
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
    """Whether TensorFlow is tracing, so that unused operations are left out."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def is_dense_in_graph(inputs):
    """Whether this is a dense tensor in a graph that TensorFlow traces."""
    if not in_tensorflow_graph():
        return False
    import tensorflow as tf

    return isinstance(inputs, tf.Tensor)


def is_traced(flag):
    """Whether a function is being traced for a flag that may be true or false."""
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(flag, jax.core.Tracer)
    return keras.ops.is_tensor(flag) and in_tensorflow_graph()


def inside_checkpoint() -> bool:
    """Whether the code runs inside `keras.remat` on torch, which saves by hooks."""
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


def draw_in_checkpoint() -> int:
    """Draws a number that is the same when torch repeats a function.

    torch resets its generator before it repeats one.
    """
    import torch

    return int(torch.randint(2**31, ()))


def recording_is_stopped(variable) -> bool:
    """Whether no TensorFlow tape records operations on a variable.

    Under `keras.remat`, none does in a function's first run, and one does in its
    second.
    """
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(variable.value)
    return not tape.watched_variables()


def tensorflow_graph():
    """Returns the graph being traced, or a default graph in eager mode."""
    import tensorflow as tf

    return tf.compat.v1.get_default_graph()


def next_seed(generator):
    """Returns the next seed of a generator.

    Under `keras.remat`, JAX traces a function separately. The generator's new state
    must not be a value of that trace, so it is computed outside of it.
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
    """Returns the layer that is being built or called, or None."""
    scopes = probes.global_state.get_global_attribute("name_scope_stack")
    return scopes[-1].caller if scopes else None


def in_stateless_scope():
    return probes.global_state.get_global_attribute("stateless_scope") is not None


def traced_for_xla():
    """Whether TensorFlow is tracing the running code for XLA.

    A variable that is created there cannot start from the value of another one. In a
    stateless scope, where Keras builds a model symbolically, it is created later.
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
    """Returns the mask that a layer has put on its outputs, or None."""
    return probes.masking.get_keras_mask(tensor)


def set_mask(tensor, mask):
    probes.masking.set_keras_mask(tensor, mask)


def synchronize(model):
    """Writes the state of a model that JAX is fitting back into its variables."""
    for name in ("state_sync", "jax_state_sync"):  # since Keras 3.16, and before
        if hasattr(model, name):
            getattr(model, name)()
            return


def is_emptied(variable) -> bool:
    """Whether one of Keras's loops on JAX has taken the value out of a variable."""
    try:
        value = variable.value
    except TypeError:  # no initializer is left to create a value
        return True
    if is_traced(value):  # a tracer cannot be deleted
        return False
    return value is None or getattr(value, "is_deleted", bool)()


@contextlib.contextmanager
def keeping_weights(model):
    """Restores a model's weights if a loop of Keras's raises inside the context.

    On JAX, these loops take the values out of the variables, and Keras does not put
    them back after an error. The variables get the loop's last values, or else those
    from its beginning.

    model: The model, or None to restore nothing.
    """
    if model is None or keras.backend.backend() != "jax":
        yield
        return
    vars(model).pop("_jax_state", None)  # left by a loop that failed
    values = [(v, v.value) for v in model.variables if not is_emptied(v)]
    try:
        yield
    except BaseException:
        synchronize(model)
        for variable, value in values:
            if is_emptied(variable) and not value.is_deleted():
                type(variable).assign(variable, value)
        raise


def legacy_format():
    """Whether a configuration is requested for the old .h5 format."""
    return probes.global_state.get_global_attribute("use_legacy_config", False)


def operation_of(tensor):
    """Returns the operation that made a symbolic tensor, and its input tensors.

    Keras's public `Model.operations` do not show which of them makes the outputs.
    """
    node = node_of(tensor)
    return node.operation, node.input_tensors


def node_of(tensor):
    """Returns Keras's record of the call that made a symbolic tensor."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def compute(outputs, values, run):
    """Computes the values of symbolic tensors, operation by operation.

    Args:
        outputs: A structure of symbolic tensors.
        values: id of a symbolic tensor -> its value, for the inputs.
        run: (operation, args, kwargs) -> the operation's outputs.
    """

    def value(x):
        if not isinstance(x, keras.KerasTensor):
            return x
        if id(x) not in values:
            node = node_of(x)
            arguments = node.arguments.args, node.arguments.kwargs
            args, kwargs = keras.tree.map_structure(value, arguments)
            results = keras.tree.flatten(run(node.operation, args, kwargs))
            values.update(zip(map(id, node.outputs), results, strict=True))
        return values[id(x)]

    return keras.tree.map_structure(value, outputs)


def run_operation(operation, args, kwargs):
    """Returns the outputs of an operation or layer for values."""
    if isinstance(operation, keras.layers.Layer):
        return operation(*args, **kwargs)
    return operation.call(*args, **kwargs)
