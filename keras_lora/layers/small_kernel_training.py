"""W + delta in a training step whose kernel is small.

On a CPU a convolution to few channels takes far longer than its arithmetic says, and
W + delta is no more memory than one more copy of the inputs.
"""

import math

from keras import ops

from keras_lora.keras_internals import calls


def merging_pays(host, adapter, inputs):
    """Whether a step is compiled by TensorFlow, exact, and the host's kernel small."""
    form = host.form
    if not (
        form.merges_in_training and host.merges_in_call and calls.in_tensorflow_graph()
    ):
        return False
    sizes = [size or 16 for size in inputs.shape]  # 16 where it is not known
    return (
        adapter.dropout == 0  # it drops inputs of the adapter alone
        # Rounding to half precision would swallow updates.
        and host.compute_dtype == adapter.variable_dtype
        and math.prod(host.kernel_shape) <= math.prod(sizes)
    )


def linear_with_update(host, inputs, a, b):
    """linear(inputs, W + A @ B), with dA and dB by way of rank r.

    The gradient is that of linear(inputs, W) + bypass(inputs, A, B), to any order,
    and forms none of the kernel's size. Only for TensorFlow's graphs: the outputs
    that are written down again for the gradient are needed by nothing there.
    """
    import tensorflow as tf

    form = host.form
    kernel = host.base_kernel(host.compute_dtype)

    @tf.custom_gradient
    def call(inputs, a, b):
        merged = ops.add(kernel, form.compose(a, b))

        def gradient(upstream):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = host.linear(inputs, merged)
            of_inputs = tape.gradient(outputs, inputs, upstream)
            with tf.GradientTape() as tape:
                tape.watch([a, b])
                outputs = form.bypass(inputs, a, b)
            return of_inputs, *tape.gradient(outputs, [a, b], upstream)

        return host.linear(inputs, merged), gradient

    # Read once: a read for the backward pass alone came after the optimizer's update
    # at times, where `fit` ran several steps in one call.
    a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
    return call(inputs, a, b)
