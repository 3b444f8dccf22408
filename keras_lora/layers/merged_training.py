"""W + delta in a training step, where that is cheaper than the low-rank path.

The low-rank path reads and writes whole activations four times more: two products
from rank r and two additions. W + delta costs one more array of the kernel's size,
which is little where the activations are larger. A convolution to few channels takes
far longer on a CPU than its arithmetic says: with few filters dA and dB come from the
gradient of W + delta, which is smaller than the activations too.
"""

import math

from keras import ops

from keras_lora.keras_internals import calls


def merging_pays(host, adapter, inputs):
    """Whether TensorFlow compiles the step, W + delta is exact, and inputs are large.

    An unknown size, such as the batch's in `fit`, counts as 8: choosing at run time
    (`tf.cond`) made tracing at least one and a half times as slow.
    """
    if host.form.merges_from is None or not calls.is_dense_in_graph(inputs):
        return False
    return (
        host.merges_in_call
        and adapter.dropout == 0  # dropout applies only to the adapter's inputs
        # Rounding to half precision would lose small updates.
        and host.compute_dtype == adapter.variable_dtype
        and inputs.dtype == host.compute_dtype
        and inputs.shape.rank is not None
        and math.prod(size or 8 for size in inputs.shape) >= host.form.merges_from
    )


def linear_with_update(host, inputs, a, b):
    """linear(inputs, W + A @ B), with low-rank gradients of A and B.

    The gradient is that of linear(inputs, W) + bypass(inputs, A, B), to any order,
    without an array of the kernel's size, unless `form.forms_gradient`. Only for
    TensorFlow's graphs, which leave out the unused outputs that the gradient repeats.
    """
    import tensorflow as tf

    form = host.form
    kernel = ops.stop_gradient(host.base_kernel(host.compute_dtype))
    if form.forms_gradient:
        return host.linear(inputs, ops.add(kernel, form.compose(a, b)))

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
                hidden = form.down(inputs, a)
                outputs = form.up(hidden, b)
            if form.gradient_of_a is None:
                return of_inputs, *tape.gradient(outputs, [a, b], upstream)
            of_hidden, of_b = tape.gradient(outputs, [hidden, b], upstream)
            return of_inputs, form.gradient_of_a(inputs, of_hidden), of_b

        return host.linear(inputs, merged), gradient

    # Read once: if `fit` runs several steps in one call, a read in the backward pass
    # may come after the optimizer's update.
    return call(inputs, tf.convert_to_tensor(a), tf.convert_to_tensor(b))


def product_with_update(inputs, kernel, a, b):
    """inputs @ kernel for the kernel W + A @ B, with low-rank gradients of A and B.

    For matrices in a loop over steps: the kernel is formed before the loop. The
    gradients are written out, because TensorFlow leaves out nothing inside a loop.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def call(inputs, a, b):
        def gradient(upstream):
            of_hidden = tf.matmul(upstream, b, transpose_b=True)
            return (
                tf.matmul(upstream, kernel, transpose_b=True),
                tf.matmul(inputs, of_hidden, transpose_a=True),
                tf.matmul(tf.matmul(inputs, a), upstream, transpose_a=True),
            )

        return ops.matmul(inputs, kernel), gradient

    return call(inputs, a, b)
