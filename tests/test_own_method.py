"""A method is one file: outputs scaled by a trained vector, on several kinds."""

import keras
import numpy as np
import pytest
from keras import ops
from layer_cases import CASES, fill, to_numpy

import keras_lora
from keras_lora.files.command import main
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.methods import register_method


@register_method
@keras.saving.register_keras_serializable(package="tests")
class OutputScale(LowRankAdapter):
    """y = finish( linear(x, W) * scale ), scale one number for each output."""

    keyword = "output_scale"
    factor_names = ("scale",)
    more_suffixes = (".output_scale",)

    def build_factors(self, form, regularizer):
        sizes = list(self.read_kernel().shape)
        shape = [n for axis, n in enumerate(sizes) if axis not in form.input_axes]
        self.scale = self.add_factor("scale", shape, "ones", regularizer)

    def values(self):
        return 1.0 + self.switched * (self.scale - 1.0)

    def effective_kernel(self, kernel):
        return kernel * self.form.over_kernel(self.values())

    def low_rank_outputs(self, host, inputs, training):
        outputs = host.frozen_linear(inputs)
        return outputs * ops.cast(host.form.over_outputs(self.values()), outputs.dtype)

    @classmethod
    def suffixes_for(cls, suffixes):
        return cls.more_suffixes

    def to_file(self, suffixes):
        return {".output_scale": to_numpy(self.scale)}

    def from_file(self, arrays, suffixes):
        return {"scale": arrays[".output_scale"]}


NAMES = ["dense-relu", "embedding-two-axes", "einsum-dense-query"]
NAMES += ["einsum-dense-output", "einsum-dense-ellipsis", "einsum-dense-batch-axis"]
NAMES += ["conv1d-causal", "conv2d-groups", "conv3d-plain"]
over_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in NAMES], ids=lambda case: case.name
)


def scaled(case):
    layer = case.layer(output_scale=True)
    fill(layer.lora.scale, seed=1)
    return layer


def plain(case, layer):
    """The plain layer with the kernel that NumPy scales."""
    kernel = to_numpy(layer.frozen_kernel).astype("float64")
    scale = to_numpy(layer.lora.scale).astype("float64")
    for axis in sorted(layer.form.input_axes):
        scale = np.expand_dims(scale, axis)
    return case.plain_layer(layer, (kernel * scale).astype("float32"))


def assert_close(found, expected):
    found, expected = to_numpy(found), to_numpy(expected)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@over_cases
def test_fresh_adapter_changes_nothing(case):
    layer = case.layer(output_scale=True)
    expected = to_numpy(case.plain_layer(layer, layer.frozen_kernel)(case.inputs()))
    for training in (True, False):
        found = to_numpy(layer(case.inputs(), training=training))
        np.testing.assert_array_equal(found, expected)


@over_cases
@pytest.mark.parametrize("training", [True, False])
def test_both_paths_are_the_plain_layer_with_the_scaled_kernel(case, training):
    layer = scaled(case)
    found = layer(case.inputs(), training=training)
    assert_close(found, plain(case, layer)(case.inputs()))


def adapted_model(case):
    layer = case.layer_class(**{**case.arguments, **case.lora}, output_scale=True)
    dtype = "int32" if case.vocabulary else "float32"
    model = keras.Sequential([keras.Input(case.input_shape, dtype=dtype), layer])
    fill(layer.lora.scale, seed=1)
    return model


@over_cases
def test_contexts_and_merging(case):
    model = adapted_model(case)
    layer = model.layers[0]
    plain_class = layer.plain_class
    expected = to_numpy(plain(case, layer)(case.inputs()))
    base = to_numpy(case.plain_layer(layer, layer.frozen_kernel)(case.inputs()))
    with keras_lora.disabled(model):
        assert_close(model(case.inputs()), base)
        assert_close(model(case.inputs(), training=True), base)
    with keras_lora.merged(model):
        assert_close(model(case.inputs()), expected)
    keras_lora.merge_lora(model)
    assert type(layer) is plain_class
    assert_close(model(case.inputs()), expected)


@over_cases
def test_keras_file(case, tmp_path):
    model = adapted_model(case)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0].lora) is OutputScale
    found = to_numpy(loaded(case.inputs()))
    np.testing.assert_array_equal(found, to_numpy(model(case.inputs())))


@over_cases
def test_adapter_folder(case, tmp_path):
    model = adapted_model(case)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    other = adapted_model(case)
    other.layers[0].frozen_kernel.assign(model.layers[0].frozen_kernel)
    expected = to_numpy(model(case.inputs()))
    other.layers[0].lora.scale.assign(np.ones(other.layers[0].lora.scale.shape))
    keras_lora.load_adapter(other, tmp_path / "adapter")
    assert_close(other(case.inputs()), expected)
    keras_lora.remove_lora(other)
    keras_lora.load_adapter(other, tmp_path / "adapter")
    assert type(other.layers[0].lora) is OutputScale
    assert_close(other(case.inputs()), expected)


def test_tables_of_files_without_a_and_b(tmp_path, capsys):
    case = next(case for case in CASES if case.name == "dense-relu")
    model = adapted_model(case)
    for name in ("one", "two"):
        keras_lora.save_adapter(model, tmp_path / name)
        fill(model.layers[0].lora.scale, seed=2)
    one, two = (keras_lora.Adapter.read(tmp_path / name) for name in ("one", "two"))
    (key,) = [key for key in one.tensors if key.endswith(".output_scale")]
    values, others = one.tensors[key], two.tensors[key]
    assert str(values.shape) in str(one) and "LoRA, output_scale" in str(one)
    paths = [str(tmp_path / name) for name in ("one", "one", "two")]
    assert main(["diff", *paths[:2]]) == 0
    assert main(["diff", *paths[1:]]) == 1
    apart = np.linalg.norm(values - others) / max(map(np.linalg.norm, (values, others)))
    assert f"{apart:.3g}" in capsys.readouterr().out
    for source in (one, model):
        with pytest.raises(ValueError, match="has no A and B"):
            keras_lora.analyze(source)


def test_a_weight_of_several_without_a_and_b_is_named_by_its_path():
    recurrent = keras_lora.LoRALSTM(4, rank=2, output_scale=True, name="recurrent")
    model = keras.Sequential([keras.Input((5, 3)), recurrent])
    with pytest.raises(ValueError, match="'recurrent/kernel' has no A and B"):
        keras_lora.analyze(model)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's tape"
)
def test_no_gradient_of_the_kernel():
    import tensorflow as tf

    case = next(case for case in CASES if case.name == "dense-relu")
    layer = scaled(case)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(case.inputs(), training=True) ** 2)
    kernel, scale = layer.frozen_kernel.value, layer.lora.scale.value
    of_kernel, of_scale = tape.gradient(loss, [kernel, scale])
    assert of_kernel is None
    assert np.abs(to_numpy(of_scale)).max() > 0
