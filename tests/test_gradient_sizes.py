"""No training step forms an array of the kernel's size, but W itself."""

import keras
import numpy as np
import pytest
from layer_cases import Case
from layer_cases import to_numpy

import keras_lora

# Every axis differs, so that a shape can be told from another; the batch is 2.
SIZES = [
    Case("dense", keras_lora.LoRADense, {"units": 23}, (11,), {"rank": 3}),
    Case(
        "merged-dense",
        keras_lora.LoRAMergedDense,
        {"units": 46},
        (11,),
        {"rank": 3, "enable_lora": (True, False)},
    ),
    Case(
        "einsum-dense",
        keras_lora.LoRAEinsumDense,
        {"equation": "abc,cde->abde", "output_shape": (5, 7, 13)},
        (5, 11),
        {"rank": 3},
    ),
    Case(
        "embedding",
        keras_lora.LoRAEmbedding,
        {"input_dim": 101, "output_dim": 23},
        (5,),
        {"rank": 3},
        vocabulary=101,
    ),
    Case(
        "conv1d",
        keras_lora.LoRAConv1D,
        {"filters": 23, "kernel_size": 5},
        (13, 11),
        {"rank": 3},
    ),
    Case(
        "conv2d",
        keras_lora.LoRAConv2D,
        {"filters": 23, "kernel_size": (5, 3)},
        (13, 17, 11),
        {"rank": 3},
    ),
    Case(
        "conv3d",
        keras_lora.LoRAConv3D,
        {"filters": 23, "kernel_size": (5, 3, 2)},
        (7, 8, 9, 11),
        {"rank": 3},
    ),
]
over_kinds = pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
# Reading W, and laying it out anew for the product with it.
READS = ("ReadVariableOp", "Identity", "StopGradient", "Cast")
READS += ("Transpose", "Reshape", "ExpandDims")


def training_step(layer, inputs):
    """The operations that a compiled training step needs, as (kind, sizes)."""
    import tensorflow as tf

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            if x.dtype.is_floating:
                tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        sources = [layer.lora.a.value, layer.lora.b.value]
        if x.dtype.is_floating:
            sources.append(x)
        return tape.gradient(loss, sources)

    graph = step.get_concrete_function(tf.constant(inputs)).graph
    needed, todo = set(), [tensor.op for tensor in graph.outputs]
    while todo:
        operation = todo.pop()
        if operation.name not in needed:
            needed.add(operation.name)
            todo += [tensor.op for tensor in operation.inputs]
            yield (
                operation.type,
                [out.shape.num_elements() for out in operation.outputs],
            )


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
@over_kinds
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_compiled_step_forms_no_kernel_sized_array(case, policy):
    layer = case.trained_layer(dtype=policy)
    size = int(np.prod(layer.frozen_kernel.shape))
    operations = list(training_step(layer, case.inputs(batch=2)))
    assert any("ReadVariableOp" in kind or "Gather" in kind for kind, _ in operations)
    formed = [kind for kind, sizes in operations if size in sizes and kind not in READS]
    assert formed == []
    if case.vocabulary:  # nor is the table or A copied, cast or summed as a whole
        whole = {size, int(np.prod(layer.lora.a.shape))}
        touched = {kind for kind, sizes in operations if whole & set(sizes)}
        assert touched <= {"ReadVariableOp"}  # hands out the buffer


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads JAX's programs")
@over_kinds
def test_jax_step_forms_no_kernel_sized_array(case):
    import jax
    from jax.interpreters import partial_eval

    layer = case.trained_layer()
    size = int(np.prod(layer.frozen_kernel.shape))
    trained = [v.value for v in layer.trainable_variables]
    other = [v.value for v in layer.non_trainable_variables]

    def loss(trained, x):
        return (layer.stateless_call(trained, other, x, training=True)[0] ** 2).sum()

    program = jax.make_jaxpr(jax.grad(loss))(trained, case.inputs(batch=2)).jaxpr
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    formed = [
        str(equation.primitive)
        for equation in program.eqns
        if size in [int(np.prod(out.aval.shape)) for out in equation.outvars]
    ]
    allowed = ("stop_gradient", "convert_element_type", "transpose", "reshape")
    assert [name for name in formed if name not in allowed] == []


@over_kinds
def test_eager_gradient_of_the_kernel_is_none(case):
    if keras.backend.backend() != "tensorflow":
        return  # the trainers of the other backends never ask for it
    import tensorflow as tf

    layer = case.trained_layer()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(case.inputs(), training=True) ** 2)
    assert tape.gradient(loss, layer.frozen_kernel.value) is None
    assert np.isfinite(to_numpy(loss))
