"""No training step forms a gradient of the kernel's size.

Nor any other array of that size, but where a float32 step that TensorFlow compiles
uses W + delta: it is made of the weights alone, not of the inputs.
"""

from typing import NamedTuple

import keras
import numpy as np
import pytest
from gradients import factors
from layer_cases import Case, to_numpy

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
        {"filters": 41, "kernel_size": 5},
        (113, 11),
        {"rank": 3},
    ),
    Case(
        "conv2d",
        keras_lora.LoRAConv2D,
        {"filters": 41, "kernel_size": (5, 3)},
        (17, 19, 11),
        {"rank": 3},
    ),
    Case(
        "conv3d",
        keras_lora.LoRAConv3D,
        {"filters": 41, "kernel_size": (5, 3, 2)},
        (9, 8, 10, 11),
        {"rank": 3},
    ),
]
# Its kernel is larger than its inputs.
DEEP = Case(
    "conv2d-deep",
    keras_lora.LoRAConv2D,
    {"filters": 41, "kernel_size": (5, 3)},
    (5, 3, 11),
    {"rank": 3},
)
SIZES.append(DEEP)
# Their inputs are larger than their kernels.
LARGE = [
    Case("dense-large", keras_lora.LoRADense, {"units": 23}, (37, 11), {"rank": 3}),
    Case(
        "merged-dense-large",
        keras_lora.LoRAMergedDense,
        {"units": 46},
        (37, 11),
        {"rank": 3, "enable_lora": (True, False)},
    ),
    Case(
        "einsum-dense-large",
        keras_lora.LoRAEinsumDense,
        {"equation": "abc,cde->abde", "output_shape": (37, 7, 13)},
        (37, 11),
        {"rank": 3},
    ),
]
SIZES += LARGE
over_kinds = pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
# Reading W, and laying it out anew for the product with it.
READS = ("ReadVariableOp", "Identity", "StopGradient", "Cast")
READS += ("Transpose", "Reshape", "ExpandDims")


def merged_kernel(case, policy) -> list:
    """The operations that form W + delta in a step, the product A @ B and the sum."""
    merges = case in LARGE or (case.name.startswith("conv") and case is not DEEP)
    product = "Einsum" if case.name.startswith("einsum") else "MatMul"
    return [product, "AddV2"] * (merges and policy == "float32")


class Operation(NamedTuple):
    """One operation of a graph."""

    kind: str
    sizes: list  # of its outputs
    of_inputs: bool  # whether it depends on the layer's inputs


def training_step(layer, inputs):
    """The operations that a compiled training step needs."""
    import tensorflow as tf

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            if x.dtype.is_floating:
                tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        sources = factors(layer)
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
    of_inputs = {graph.inputs[0].op.name}
    for operation in graph.get_operations():  # in the order in which they were made
        if of_inputs & {tensor.op.name for tensor in operation.inputs}:
            of_inputs.add(operation.name)
        if operation.name in needed:
            yield Operation(
                operation.type,
                [out.shape.num_elements() for out in operation.outputs],
                operation.name in of_inputs,
            )


def formed(operations, size):
    """The operations that make an array of a size, but for reading W."""
    return [op for op in operations if size in op.sizes and op.kind not in READS]


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
@over_kinds
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_compiled_step_forms_no_kernel_sized_array(case, policy):
    layer = case.trained_layer(dtype=policy)
    size = int(np.prod(layer.frozen_kernel.shape))
    operations = list(training_step(layer, case.inputs(batch=2)))
    assert {"ReadVariableOp", "ResourceGather"} & {op.kind for op in operations}
    found = formed(operations, size)
    assert [op for op in found if op.of_inputs] == []
    assert [op.kind for op in found] == merged_kernel(case, policy)
    # A read on its own for the backward pass could come after the optimizer's update,
    # as it did where fit runs several steps at a time.
    for factor in () if case.vocabulary else (layer.lora.a, layer.lora.b):
        read = int(np.prod(factor.shape))
        reads = [op for op in operations if op.kind == "ReadVariableOp"]
        assert sum(op.sizes == [read] for op in reads) == 1
    if case.vocabulary:  # nor is the table or A copied, cast or summed as a whole
        whole = {size, int(np.prod(layer.lora.a.shape))}
        touched = {op.kind for op in operations if whole & set(op.sizes)}
        assert touched <= {"ReadVariableOp"}  # hands out the buffer


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"merge_weights": False}])
def test_convolution_keeps_to_the_low_rank_path(settings):
    case = next(case for case in SIZES if case.name == "conv2d")
    layer = case.trained_layer(**settings)
    size = int(np.prod(layer.frozen_kernel.shape))
    assert formed(training_step(layer, case.inputs(batch=2)), size) == []


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
@pytest.mark.parametrize(
    "filters, rank, forms", [(23, 3, True), (41, 20, False), (41, 21, True)]
)
def test_convolution_with_few_filters_forms_the_gradient(filters, rank, forms):
    """Of W + delta, and smaller than the inputs: so Keras's enable_lora does it."""
    case = next(case for case in SIZES if case.name == "conv2d")
    layer = case.trained_layer(filters=filters, rank=rank)
    size = int(np.prod(layer.frozen_kernel.shape))
    found = formed(training_step(layer, case.inputs(batch=4)), size)
    gradients = [op.kind for op in found if op.of_inputs]
    assert gradients == ["Conv2DBackpropFilter"] * forms


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
@pytest.mark.parametrize("kind", ["SimpleRNN", "LSTM", "GRU"])
def test_step_of_a_cell_forms_no_gradient_of_a_kernel(kind):
    # Without a loop, so that all operations stand in one graph.
    layer = getattr(keras_lora, f"LoRA{kind}")(7, rank=3, unroll=True)
    inputs = np.ones((2, 5, 11), "float32")
    layer(inputs)
    operations = list(training_step(layer, inputs))
    for site in layer.sites().values():
        found = formed(operations, int(np.prod(site.kernel_shape)))
        assert [op.kind for op in found] == ["MatMul", "AddV2"]
        assert [op for op in found if op.of_inputs] == []


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
@pytest.mark.parametrize(
    "count, settings, merges",
    [(100, {}, False), (101, {}, True), (101, {"merge_weights": False}, False)],
)
def test_lookup_forms_the_table_for_as_many_ids_as_it_has_rows(count, settings, merges):
    import tensorflow as tf

    case = next(case for case in SIZES if case.name == "embedding")
    layer = case.trained_layer(**settings)
    ids = np.arange(count) - 7  # negative ones count from the end
    call = tf.function(lambda ids: layer(ids, training=False))
    graph = call.get_concrete_function(tf.constant(ids)).graph
    lookups = [op for op in graph.get_operations() if op.type == "GatherV2"]
    assert len(lookups) == (1 if merges else 2)  # in W + delta, or in W and in A
    kernel, a, b = (
        to_numpy(v).astype("float64")
        for v in (layer.embeddings, layer.lora.a, layer.lora.b)
    )
    expected = kernel[ids] + layer.lora.scaling * a[ids] @ b
    np.testing.assert_allclose(to_numpy(call(ids)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
@pytest.mark.parametrize(
    "known, sizes, shapes",
    [
        ((None, 3), (2, 3), 0),
        ((None, 3), (0, 3), 0),
        ((None, 0), (2, 0), 1),
        ((None, None), (2, 3), 1),
        ((None, 3, 5), (2, 3, 5), 0),
    ],
)
def test_products_share_one_reshape(known, sizes, shapes):
    import tensorflow as tf

    layer = SIZES[0].trained_layer()
    values = np.random.default_rng(0).normal(size=(*sizes, 11)).astype("float32")
    spec = tf.TensorSpec((*known, 11))
    step = tf.function(lambda x: layer(x, training=True), input_signature=[spec])
    kinds = [op.type for op in step.get_concrete_function().graph.get_operations()]
    assert kinds.count("Reshape") == 2  # to rows and back
    assert kinds.count("Shape") == shapes
    kernel, a, b, bias = (
        to_numpy(v).astype("float64")
        for v in (layer.kernel, layer.lora.a, layer.lora.b, layer.bias)
    )
    expected = values @ (kernel + layer.lora.scaling * a @ b) + bias
    np.testing.assert_allclose(to_numpy(step(values)), expected, rtol=1e-5, atol=1e-5)


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


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="the trainers of the other backends never ask for it",
)
@over_kinds
def test_eager_gradient_of_the_kernel_is_none(case):
    import tensorflow as tf

    layer = case.trained_layer()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(case.inputs(), training=True) ** 2)
    assert tape.gradient(loss, layer.frozen_kernel.value) is None
    assert np.isfinite(to_numpy(loss))
