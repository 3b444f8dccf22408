"""Arguments of the Keras layers that the table of cases does not reach."""

import inspect

import keras
import numpy as np
import pytest
from layer_cases import merged_kernels, to_numpy
from shared import assert_close, assert_equal_bits

import keras_lora
from keras_lora import LoRADense, LoRAEmbedding

LORA_ARGUMENTS = {"rank", "alpha", "dropout", "use_rslora", "merge_weights"}
LORA_ARGUMENTS |= {"use_dora", "a_initializer", "b_initializer"}
REQUIRED = {
    "Dense": {"units": 3},
    "EinsumDense": {"equation": "ab,bc->ac", "output_shape": 3},
    "Embedding": {"input_dim": 4, "output_dim": 3},
    **{f"Conv{n}D": {"filters": 3, "kernel_size": 1} for n in (1, 2, 3)},
}


@pytest.mark.parametrize("name", REQUIRED)
def test_constructor_takes_what_its_signature_shows(name):
    """All arguments of the Keras layer, and those of LoRA, each of them really."""
    cls = getattr(keras_lora, f"LoRA{name}")
    shown = inspect.signature(cls).parameters
    base = inspect.signature(getattr(keras.layers, name).__init__).parameters
    named = {p for p, x in base.items() if x.kind not in (x.VAR_KEYWORD,)}
    missing = named - {"self", "lora_rank", "lora_alpha"} - set(shown)
    assert not missing and set(shown) >= LORA_ARGUMENTS
    defaults = {
        argument: parameter.default
        for argument, parameter in shown.items()
        if parameter.default is not parameter.empty
    }
    layer = cls(**{**defaults, **REQUIRED[name]})
    plain = getattr(keras.layers, name)(**REQUIRED[name]).get_config()
    config = layer.get_config()
    kept = plain.keys() - {"name"}
    assert {key: config[key] for key in kept} == {key: plain[key] for key in kept}


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has no sparse tensors on torch"
)
def test_sparse_inputs():
    dense = np.zeros((4, 6), "float32")
    dense[[0, 1, 3], [2, 5, 0]] = [1.0, -2.0, 3.0]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        sparse = tf.sparse.from_dense(dense)
    else:
        from jax.experimental import sparse as jax_sparse

        sparse = jax_sparse.BCOO.fromdense(dense)
    layer = LoRADense(5, rank=2, dropout=0.5)
    layer.build((None, 6))
    layer.lora.b.assign(np.ones((2, 5)))
    assert_close(layer(sparse), layer(dense))
    assert to_numpy(layer(sparse, training=True)).shape == (4, 5)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="ragged tensors are TensorFlow's"
)
def test_ragged_ids():
    import tensorflow as tf

    layer = LoRAEmbedding(10, 4, rank=2)
    layer.build()
    layer.lora.a.assign(np.ones((10, 2)))
    ids = tf.ragged.constant([[[1, 2], []], [[3]]])
    plain = keras.layers.Embedding(10, 4)
    plain.build()
    plain.embeddings.assign(layer.embeddings + layer.lora.delta())
    for training in (False, True):
        found = layer(ids, training=training)
        assert_close(found.flat_values, plain(ids).flat_values)
        assert found.nested_row_lengths()[0].numpy().tolist() == [2, 1]
        assert found.shape.as_list() == plain(ids).shape.as_list()


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="TensorFlow's convolutions need a GPU for channels_first",
)
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("factorization", ["standard", "loralib"])
def test_channels_first(ndim, groups, factorization):
    options = {
        "filters": 6,
        "kernel_size": 3,
        "groups": groups,
        "padding": "same",
        "activation": "tanh",
        "data_format": "channels_first",
    }
    kind = getattr(keras_lora, f"LoRAConv{ndim}D")
    layer = kind(**options, rank=2, factorization=factorization)
    inputs = np.random.default_rng(1).standard_normal((2, 4, 7, 8, 6)[: ndim + 2])
    inputs = inputs.astype("float32")
    layer.build(inputs.shape)
    random = np.random.default_rng(2)
    for variable in (layer.lora.a, layer.lora.b, layer.bias):
        variable.assign(random.standard_normal(variable.shape) * 0.3)
    plain = layer.plain_class(**options)
    plain.build(inputs.shape)
    plain.kernel.assign(merged_kernels(layer)["kernel"])
    plain.bias.assign(layer.bias)
    assert_equal_bits(layer(inputs), plain(inputs))
    assert_close(layer(inputs, training=True), layer(inputs))


def test_embedding_mask_and_weights():
    table = np.random.default_rng(1).standard_normal((7, 3)).astype("float32")
    for weights in (table, [table]):
        layer = LoRAEmbedding(7, 3, mask_zero=True, weights=weights, rank=2)
        ids = np.array([[0, 3, 6]])
        np.testing.assert_array_equal(to_numpy(layer(ids))[0], table[[0, 3, 6]])
        mask = to_numpy(layer.compute_mask(ids))
        np.testing.assert_array_equal(mask, [[False, True, True]])
        assert len(layer.trainable_weights) == 2


def test_embedding_trains_the_rows_that_occur():
    layer = LoRAEmbedding(7, 3, rank=2)
    model = keras.Sequential([keras.Input((2,), dtype="int32"), layer])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.array([[1, 4]]), np.ones((1, 2, 3)), epochs=2, verbose=0)
    moved = np.flatnonzero(np.abs(to_numpy(layer.lora.a)).sum(axis=1))
    assert moved.tolist() == [1, 4]


def test_embedding_takes_ids_of_any_whole_type():
    layer = LoRAEmbedding(7, 3, rank=2)
    layer.build()
    layer.lora.a.assign(np.ones((7, 2)))
    for dtype in ("int32", "int64", "uint8", "float32"):
        assert_equal_bits(layer(np.array([[1, 4]], dtype)), layer(np.array([[1, 4]])))


def test_embedding_refuses_dropout():
    with pytest.raises(ValueError, match=r"must be 0.*dropout=0\.5"):
        LoRAEmbedding(7, 3, dropout=0.5)


@pytest.mark.parametrize("mask", [(), (False, False), [1, 0], "TFT", None, True])
def test_merged_dense_refuses_a_wrong_mask(mask):
    with pytest.raises(ValueError, match=r"`enable_lora`.*Received"):
        keras_lora.LoRAMergedDense(6, enable_lora=mask)


def test_merged_dense_refuses_units_that_do_not_divide():
    with pytest.raises(ValueError, match="units=7, 3 slices"):
        keras_lora.LoRAMergedDense(7, enable_lora=(True, False, True))


def test_merged_dense_equals_layers_of_its_own():
    mask = (True, False, True)
    layer = keras_lora.LoRAMergedDense(12, enable_lora=mask, rank=2, alpha=3)
    layer.build((None, 6))
    layer.lora.b.assign(np.random.default_rng(1).standard_normal((2, 2, 4)))
    inputs = np.random.default_rng(2).standard_normal((5, 6)).astype("float32")
    outputs = []
    for place, adapted in enumerate(mask):
        single = LoRADense(4, rank=2 if adapted else 0, alpha=3)
        single.build((None, 6))
        single.kernel.assign(layer.kernel[:, 4 * place : 4 * (place + 1)])
        if adapted:
            g = sum(mask[:place])
            single.lora.a.assign(layer.lora.a[:, 2 * g : 2 * (g + 1)])
            single.lora.b.assign(layer.lora.b[g])
        outputs.append(to_numpy(single(inputs, training=True)))
    assert_close(layer(inputs, training=True), np.concatenate(outputs, -1))


@pytest.mark.parametrize("equation", ["ab,b->ab", "ab,b->a", "ab,cd->abcd"])
def test_einsum_without_contracted_or_new_axis(equation):
    with pytest.raises(ValueError, match="nothing to factor"):
        keras_lora.LoRAEinsumDense(equation, (3,))
    assert keras_lora.LoRAEinsumDense(equation, (3,), rank=0).lora is None


def test_einsum_batch_axis_has_factors_per_index():
    layer = keras_lora.LoRAEinsumDense("abc,bcd->abd", (3, 5), rank=2)
    layer.build((None, 3, 6))
    assert layer.lora.a.shape == (3, 6, 2)
    assert layer.lora.b.shape == (3, 2, 5)
    layer.lora.b.assign(np.random.default_rng(1).standard_normal((3, 2, 5)))
    a, b = to_numpy(layer.lora.a), to_numpy(layer.lora.b)
    expected = np.stack([a[i] @ b[i] for i in range(3)])
    assert_close(layer.lora.delta(), expected)


def test_attention_update_has_true_rank():
    layer = keras_lora.LoRAEinsumDense("abc,cde->abde", (None, 4, 8), rank=2)
    layer.build((None, 5, 16))
    layer.lora.b.assign(np.random.default_rng(1).standard_normal((2, 4, 8)))
    assert np.linalg.matrix_rank(to_numpy(layer.lora.delta()).reshape(16, 32)) == 2


def test_convolution_refuses_an_unknown_factorization():
    with pytest.raises(ValueError, match=r"standard.*loralib.*factorization='svd'"):
        keras_lora.LoRAConv2D(4, 3, factorization="svd")


def test_default_names():
    assert LoRADense(3).name == "lora_dense"
    assert LoRADense(3).name == "lora_dense_1"
    assert keras_lora.LoRAConv2D(3, 3).name == "lora_conv2d"
    assert LoRADense(3, name="query").name == "query"


def test_a_and_b_initializers():
    layer = LoRADense(3, rank=2, a_initializer="ones", b_initializer="ones", alpha=6)
    layer.build((None, 4))
    assert_close(layer.lora.delta(), np.full((4, 3), 6.0))
    twin = LoRADense.from_config(layer.get_config())
    assert isinstance(twin.lora.b_initializer, keras.initializers.Ones)
