"""Where variables lie under `keras.distribution`: Keras has it on JAX."""

import keras


def layout_of(variable):
    """The layout that a model's distribution gives a variable; None without axes."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return None
    layout = distribution.get_variable_layout(variable)
    return layout if any(getattr(layout, "axes", None) or ()) else None


def lay_out(variable, axes, like):
    """Lays a variable out by axes of a mesh, unless the layout map names it itself.

    `add_weight` takes no layout, and a variable has no public one.
    """
    distribution = keras.distribution.distribution()
    if distribution.get_tensor_layout(variable.path) is None:
        layout = keras.distribution.TensorLayout(axes, like.device_mesh)
        variable._layout = layout
        variable.assign(variable.value)
