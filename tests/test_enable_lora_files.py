"""What Keras's own enable_lora has trained, run live, into the layers here."""

import keras
import keras_hub
import numpy as np
import pytest
from layer_cases import fill, to_numpy

import keras_lora
from keras_lora.models.sites import adapted_sites

SIZES = {
    "vocabulary_size": 20,
    "num_layers": 1,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
BACKBONES = {
    "gpt2": (keras_hub.models.GPT2Backbone, {"num_heads": 2}),
    "gemma": (
        keras_hub.models.GemmaBackbone,
        {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
    ),
}


def backbone(kind):
    cls, heads = BACKBONES[kind]
    return cls(**SIZES, **heads)


def outputs(model):
    ids = np.arange(12).reshape(2, 6)
    return to_numpy(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))


def with_factors(kind, folder):
    """KerasHub's own file, the outputs it stands for, and the plain backbone."""
    theirs, plain = backbone(kind), backbone(kind)
    plain.set_weights(theirs.get_weights())
    theirs.enable_lora(3)
    for seed, weight in enumerate(w for w in theirs.weights if "lora_" in w.path):
        fill(weight, seed, 0.5)
    path = folder / "x.lora.h5"
    theirs.save_lora_weights(str(path))
    assert np.abs(outputs(theirs) - outputs(plain)).max() > 0.01
    return path, outputs(theirs), plain


@pytest.mark.parametrize("kind", BACKBONES)
def test_files_of_keras_hub(kind, tmp_path):
    path, expected, plain = with_factors(kind, tmp_path)
    report = keras_lora.load_keras_lora(plain, path)
    np.testing.assert_allclose(outputs(plain), expected, rtol=0, atol=1e-5)
    ranks = {row.path.split("/")[-1]: row.rank for row in report}
    assert ranks == {"query": 6, "value": 6 if kind == "gpt2" else 3}
    for layer in adapted_sites(plain):
        fill(layer.lora.b, 1)
    keras_lora.load_keras_lora(plain, path)  # over the adapters
    np.testing.assert_allclose(outputs(plain), expected, rtol=0, atol=1e-5)


def test_a_task_has_the_backbone(tmp_path):
    path, expected, plain = with_factors("gpt2", tmp_path)
    task = keras_hub.models.GPT2CausalLM(plain, preprocessor=None)
    keras_lora.load_keras_lora(task, path)
    np.testing.assert_allclose(outputs(task.backbone), expected, rtol=0, atol=1e-5)


def test_layers_of_keras():
    """Every kind that has enable_lora, with an alpha of its own."""
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(9, 8, name="tokens")(inputs)
    x = keras.layers.Conv1D(8, 3, name="conv", groups=2)(x)
    x = keras.layers.EinsumDense("abc,cde->abde", (4, 2, 4), name="heads")(x)
    x = keras.layers.EinsumDense("abcd,cde->abe", (4, 8), name="join")(x)
    outputs = keras.layers.Dense(3, name="dense")(keras.layers.Flatten()(x))
    plain = keras.Model(inputs, outputs)
    theirs = keras.models.clone_model(plain)
    theirs.set_weights(plain.get_weights())
    for seed, layer in enumerate(theirs.layers):
        if hasattr(layer, "enable_lora"):
            layer.enable_lora(2, lora_alpha=5)
            for weight in layer.trainable_weights:
                fill(weight, seed, 0.5)
    for layer in theirs.layers:  # enable_lora leaves biases as they are, fill does not
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(plain.get_layer(layer.name).bias)
    ids = np.arange(18).reshape(3, 6) % 9
    report = keras_lora.load_keras_lora(plain, theirs)
    assert {row.path: row.rank for row in report} == {
        "tokens": 2,
        "conv": 2,
        "heads": 4,
        "join": 2,
        "dense": 2,
    }
    np.testing.assert_allclose(
        to_numpy(plain(ids)), to_numpy(theirs(ids)), rtol=1e-5, atol=1e-5
    )


def test_bad_input_changes_nothing(tmp_path):
    path, _, plain = with_factors("gpt2", tmp_path)
    before = outputs(plain)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="No layer of"):
        keras_lora.load_keras_lora(plain, other)
    other.layers[0].enable_lora(2)
    with pytest.raises(ValueError, match="has no layer 'dense'"):
        keras_lora.load_keras_lora(plain, other)
    with pytest.raises(ValueError, match="the model does not have"):
        keras_lora.load_keras_lora(other, path)
    other.save_weights(tmp_path / "y.weights.h5")
    with pytest.raises(ValueError, match=r"is not a \.lora\.h5 file"):
        keras_lora.load_keras_lora(plain, tmp_path / "y.weights.h5")
    wider = keras_hub.models.GPT2Backbone(**SIZES | {"hidden_dim": 12}, num_heads=2)
    with pytest.raises(ValueError, match="do not fit its kernel"):
        keras_lora.load_keras_lora(wider, path)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises((ValueError, OSError)):
            keras_lora.load_keras_lora(plain, path)
    assert adapted_sites(plain) == []
    np.testing.assert_array_equal(outputs(plain), before)
