"""The operations that make symbolic tensors, and what the tensors stand for."""

import keras


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
    """What symbolic tensors stand for, computed operation by operation.

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
