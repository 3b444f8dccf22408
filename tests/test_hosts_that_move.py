"""What assigns to a kernel, computes it or reads it elsewhere is right or refused."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops
from layer_cases import fill, to_numpy
from seeds import set_seed

import keras_lora
from keras_lora import apply_lora


def x():
    return np.random.default_rng(1).standard_normal((4, 6)).astype("float32")


def around(*layers):
    head = keras.layers.Dense(2, name="head")
    return keras.Sequential([keras.Input((6,)), *layers, head])


def test_spectral_normalization_is_passed_over_or_refused():
    inside = keras.layers.Dense(6, name="inside")
    model = around(
        keras.layers.SpectralNormalization(inside), keras.layers.Dense(6, name="other")
    )
    report = apply_lora(model)
    assert [row.path for row in report] == ["other"]
    (reason,) = report.skipped.values()
    assert "assigns to its kernel" in reason
    keras_lora.remove_lora(model)
    with pytest.raises(ValueError, match=r"cannot be adapted.*exclude="):
        apply_lora(model, target=["inside"])
    assert [row.path for row in apply_lora(model, target=".*(inside|other)")] == [
        "other"
    ]


def test_spectral_normalization_of_a_lora_layer_is_refused_when_it_is_built():
    """Before any loop: on JAX an error in `fit` costs the model its weights."""
    for inside in (keras_lora.LoRADense(6, rank=2), keras_lora.LoRAEmbedding(6, 6)):
        wrapped = keras.layers.SpectralNormalization(inside)
        with pytest.raises(ValueError, match=f"that of '{inside.name}' is frozen"):
            wrapped.build((4, 6))
    inside = keras_lora.LoRADense(6, rank=0)
    keras.layers.SpectralNormalization(inside).build((4, 6))


def normalized(trained=(), **settings):
    """A model with a normalized layer that nothing adapts, after training."""
    set_seed(7)
    inside = keras.layers.Dense(6, name="inside")
    wrapped = keras.layers.SpectralNormalization(inside, name="wrapped")
    model = around(keras.layers.Dense(6, name="other"), wrapped)
    base = model.predict(x(), verbose=0)
    apply_lora(model, rank=2, target=["other"], **settings)
    for layer in trained:
        model.get_layer(layer).trainable = True
    return model, base


def fit(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x(), x()[:, :2], epochs=2, verbose=0)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_spectral_normalization_beside_adapters_stays_where_it_is(bias, tmp_path):
    model, base = normalized(bias=bias)
    layer = model.get_layer("wrapped")
    before = [to_numpy(v) for v in (layer.kernel, layer.vector_u)]
    fit(model)
    model.save(tmp_path / "model.keras")
    keras_lora.save_adapter(model, tmp_path / "adapter")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    other, _ = normalized(bias=bias)
    keras_lora.load_adapter(other, tmp_path / "adapter")
    expected = model.predict(x(), verbose=0)
    for each in (loaded, other):
        found = each.predict(x(), verbose=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    fit(loaded)
    for each in (model, loaded):
        layer = each.get_layer("wrapped")
        for value, variable in zip(before, (layer.kernel, layer.vector_u), strict=True):
            np.testing.assert_array_equal(to_numpy(variable), value)
    with keras_lora.disabled(model):
        found = model.predict(x(), verbose=0)
    np.testing.assert_allclose(found, base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["also_train", "flags", "remove_lora"])
def test_spectral_normalization_that_trains_is_keras_own(way):
    model, _ = normalized(
        trained=["wrapped"] if way == "flags" else [],
        also_train=["wrapped"] if way == "also_train" else None,
    )
    if way == "remove_lora":
        keras_lora.remove_lora(model)
    layer = model.get_layer("wrapped")
    fit(model)
    kernel = to_numpy(layer.kernel)
    layer(np.ones((1, 6), "float32"), training=True)
    assert np.abs(to_numpy(layer.kernel) - kernel).max() > 1e-4
    assert np.linalg.norm(to_numpy(layer.vector_u)) == pytest.approx(1, abs=1e-4)


class Halving(keras.layers.Wrapper):
    """Assigns to its layer's kernel in training calls, as nobody expects."""

    def call(self, inputs, training=None):
        if training:
            self.layer._kernel.assign(self.layer._kernel * 0.5)
        return self.layer(inputs)


def test_a_wrapper_that_assigns_to_a_frozen_kernel_is_stopped():
    model = around(Halving(keras.layers.Dense(6, name="inside")))
    apply_lora(model, target=["inside"])
    layer = model.layers[0].layer
    kernel = to_numpy(layer.kernel)
    with pytest.raises(ValueError, match="frozen kernel of a LoRA layer"):
        model(x(), training=True)
    np.testing.assert_array_equal(to_numpy(layer.kernel), kernel)
    layer.kernel.assign(kernel + 1)  # from outside it may be set
    keras_lora.remove_lora(model)
    model(x(), training=True)
    np.testing.assert_array_equal(to_numpy(layer.kernel), (kernel + 1) * 0.5)


@keras.saving.register_keras_serializable("tests")
class Reader(keras.layers.Layer):
    """Calls one layer, and multiplies with its kernel once more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up = keras.layers.Dense(6, name="up")

    def build(self, shape):
        self.up.build(shape)

    def call(self, inputs):
        return ops.matmul(self.up(inputs), self.up.kernel)


def test_reading_an_adapted_kernel_in_another_call_warns():
    model = around(Reader(name="reader"))
    model(x())
    apply_lora(model, target=["up"])
    with pytest.warns(UserWarning, match=r"reads the kernel of 'up'"):
        model(x())
    to_numpy(model.layers[0].up.kernel)  # from outside of a call anybody may
    keras_lora.merge_lora(model)
    model(x())


class InLists(keras.layers.Layer):
    """Holds its layers in lists, and multiplies with the kernel of one by itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gates = [keras.layers.Dense(6)]
        self.ups = [keras.layers.Dense(6)]

    def build(self, shape):
        for layer in (*self.gates, *self.ups):
            layer.build(shape)

    def call(self, inputs):
        return self.ups[0](ops.matmul(inputs, self.gates[0].kernel))


def test_the_owner_is_a_layer_and_not_its_list():
    model = around(InLists(name="block"))
    report = apply_lora(model)
    assert [row.layer for row in report] == model.layers[0].ups
    (reason,) = report.skipped.values()
    assert reason.startswith("InLists reads the kernel of this layer itself")


def test_a_layer_with_keras_own_adapter_is_passed_over_or_refused():
    model = around(keras.layers.Dense(6, name="own"), keras.layers.Dense(6, name="b"))
    model.layers[0].enable_lora(2)
    report = apply_lora(model)
    assert [row.path for row in report] == ["b"]
    assert "has Keras's own adapter" in report.skipped["own"]
    keras_lora.remove_lora(model)
    with pytest.raises(ValueError, match=r"has Keras's own adapter.*exclude="):
        apply_lora(model, target=["own"])


class OwnConvolution(keras.layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return 2 * super().convolution_op(inputs, kernel)


class Masked(keras.layers.Dense):
    @property
    def kernel(self):
        return self._kernel * 1.0


class WithOptions(keras.layers.Dense):
    """A constructor of its own: required after optional, and whatever else."""

    def __init__(self, size=3, *rest, factor, **options):
        super().__init__(size * factor, **options)
        self.size, self.factor = size, factor


def test_subclasses_that_compute_otherwise_are_not_adapted():
    convolution = OwnConvolution(3, 1, name="own")
    inputs = keras.Input((4, 4, 2))
    hidden = keras.layers.Conv2D(3, 1, name="plain")(convolution(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    assert [row.path for row in apply_lora(model)] == ["plain"]
    masked = around(Masked(6, name="masked"), keras.layers.Dense(6, name="plain"))
    report = apply_lora(masked)
    assert [row.path for row in report] == ["plain"]
    assert "is computed and is not a variable" in report.skipped["masked"]


def test_a_subclass_with_a_constructor_of_its_own_is_adapted():
    model = around(WithOptions(3, factor=2, name="own"))
    outputs = to_numpy(model(x()))
    assert [row.path for row in apply_lora(model)] == ["own"]
    np.testing.assert_array_equal(to_numpy(model(x())), outputs)
    fill(model.layers[0].lora.b, 1)
    expected = to_numpy(model(x()))
    keras_lora.merge_lora(model)
    assert type(model.layers[0]) is WithOptions
    np.testing.assert_array_equal(to_numpy(model(x())), expected)


class SmallTable(keras.layers.Embedding):
    """Everything is optional, where the Keras layer has required arguments."""

    def __init__(self, size=4, **options):
        super().__init__(9, size, **options)


def test_a_subclass_whose_arguments_are_all_optional_is_adapted():
    inputs = keras.Input((3,), dtype="int32")
    model = keras.Model(inputs, SmallTable(name="table")(inputs))
    assert [row.path for row in apply_lora(model, target=SmallTable)] == ["table"]


class Sized(keras.layers.Dense):
    def __init__(self, size=4, **options):
        super().__init__(size, **options)


def test_a_required_argument_may_come_after_optional_ones():
    """Python has no such signature but with keywords."""
    attributes = {"plain_class": Sized}
    merged = type("LoRASized", (keras_lora.LoRAMergedDense, Sized), attributes)
    parameters = inspect.signature(merged).parameters
    assert parameters["size"].default == 4
    assert parameters["units"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["LoRADense", "LoRAMergedDense", "LoRAEmbedding"])
def test_an_empty_batch(kind, training):
    if kind == "LoRAEmbedding":
        layer, inputs = keras_lora.LoRAEmbedding(9, 5, rank=2), np.zeros((0,), "int32")
    else:
        layer, inputs = getattr(keras_lora, kind)(5, rank=2), np.zeros((0, 4))
    assert layer(inputs, training=training).shape == (0, 5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_one_row_trains_a_convolution_of_rank_one(data_format):
    """A training step of one row: torch's own convolution to one filter fails there."""
    if keras.backend.backend() == "tensorflow" and data_format == "channels_first":
        pytest.skip("not on TensorFlow's CPU")
    shape = (8, 8, 2) if data_format == "channels_last" else (2, 8, 8)
    conv = keras_lora.LoRAConv2D(3, 3, rank=1, data_format=data_format)
    model = keras.Sequential([keras.Input(shape), conv, keras.layers.Flatten()])
    model.compile("sgd", "mse")
    before = to_numpy(conv.lora.b)
    inputs = np.random.default_rng(1).standard_normal((1, *shape), "float32")
    model.fit(inputs, np.ones((1, 108)), verbose=0)
    assert np.abs(to_numpy(conv.lora.b) - before).max() > 0


def bidirectional():
    layers = [keras.layers.Dense(4, name="up"), keras.layers.Bidirectional(gru())]
    return keras.Sequential([keras.Input((5, 4)), *layers, keras.layers.Dense(2)])


def gru():
    return keras.layers.GRU(3)


@pytest.mark.parametrize("more", [{"bias": "all"}, {"also_train": ["bidirectional"]}])
def test_paths_inside_bidirectional_do_not_count_instances(more, tmp_path):
    model, other = bidirectional(), bidirectional()
    apply_lora(model, rank=2, target=["up"], **more)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    keras_lora.load_adapter(other, tmp_path / "adapter")
    paths = [[row.path for row in keras_lora.summary(m)] for m in (model, other)]
    assert paths[0] == paths[1]


def test_names_that_the_model_shows_are_understood_or_refused(tmp_path):
    layers = [keras.layers.Dense(6) for _ in range(4)]  # dense, dense_1, dense_2, ...
    model = around(*layers[1:])  # paths dense, dense_1, dense_2
    paths = ["dense", "dense_1", "dense_2"]
    for path, layer in zip(paths, layers[1:], strict=True):
        exact = lambda p, _, path=path: p == path  # noqa: E731
        (row,) = apply_lora(model, target=exact, dry_run=True)
        assert (row.path, row.layer) == (path, layer)
    (row,) = apply_lora(model, target=["dense"], dry_run=True)
    assert row.layer is layers[1]
    for path in paths[1:]:  # the path of one layer and the name of another
        for rule in (
            {"target": [path]},
            {"target": path},
            {"target": "dense.*", "exclude": [path]},
            {"target": "dense.*", "exclude": path},
            {"target": ["dense"], "also_train": [path]},
            {"target": "dense.*", "rank_pattern": {path: 1}},
            {"target": "dense.*", "alpha_pattern": {path: 1}},
        ):
            before = paths[paths.index(path) - 1]
            words = f"path of the one at '{path}'.* latter give '{before}'.*path == "
            with pytest.raises(ValueError, match=words):
                apply_lora(model, rank=2, **rule)
        with pytest.raises(ValueError, match="means two layers"):
            keras_lora.AdapterBank(model, target=[path])
    apply_lora(model, rank=2, target="dense.*")
    with pytest.raises(ValueError, match="means two layers"):
        keras_lora.save_adapter(model, tmp_path, names={"dense_1": "a"})
    keras_lora.remove_lora(model)
    (row,) = apply_lora(model, target=["dense_3"], dry_run=True)  # a name alone
    assert row.layer is layers[3]
    with pytest.raises(ValueError, match="has the path 'dense_2'"):
        apply_lora(model, target="dense_3")
