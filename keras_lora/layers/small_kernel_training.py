"""W + delta in a training step that TensorFlow compiles."""

import keras


def in_tensorflow_graph():
    """Whether this call is being traced, so that what nothing needs is left out."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def merged_in_training(linear, form, inputs, kernel, a, b):
    """linear(inputs, W + A @ B), with dA and dB by way of rank r.

    The gradient is that of linear(inputs, W) + bypass(inputs, A, B), to any order,
    and forms none of the kernel's size. Only for TensorFlow's graphs: the outputs
    that are written down again for the gradient are needed by nothing there.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def call(inputs, a, b):
        merged = kernel + form.compose(a, b)

        def gradient(upstream):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = linear(inputs, merged)
            of_inputs = tape.gradient(outputs, inputs, upstream)
            with tf.GradientTape() as tape:
                tape.watch([a, b])
                outputs = form.bypass(inputs, a, b)
            return of_inputs, *tape.gradient(outputs, [a, b], upstream)

        return linear(inputs, merged), gradient

    # Read once: a read for the backward pass alone came after the optimizer's update
    # at times, where `fit` ran several steps in one call.
    a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
    return call(inputs, a, b)
