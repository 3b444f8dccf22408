"""Adapters come back from every file, copy and new model that holds their layers."""

import copy
import json
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from layer_cases import slow_but, to_numpy
from seeds import set_seed

import keras_lora
from keras_lora.models.sites import adapted_sites

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a format of TensorFlow"
)


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """Its configuration names no sublayer; one of them is opaque too."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.attention = keras.layers.MultiHeadAttention(2, 3, name="attention")
        self.up = keras.layers.Dense(units, name="up")
        self.norm = keras.layers.LayerNormalization(name="norm")

    def build(self, shape):
        self.attention.build(shape, shape)
        self.up.build(shape)
        self.norm.build((*shape[:-1], self.units))

    def call(self, inputs):
        return self.norm(self.up(inputs + self.attention(inputs, inputs)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests")
class OwnDense(keras.layers.Dense):
    """Another constructor than Dense has, so that its LoRA class is made for it."""

    def __init__(self, width, **kwargs):
        kwargs.pop("units", None)
        super().__init__(width, **kwargs)

    def get_config(self):
        return {**super().get_config(), "width": self.units}


def network():
    set_seed(3)
    inputs = keras.Input((5, 4))
    hidden = Block(4, name="block")(inputs)
    hidden = keras.layers.MultiHeadAttention(2, 3, name="mha")(hidden, hidden)
    hidden = OwnDense(4, name="own")(hidden)
    hidden = keras.layers.Dense(4, name="dense")(hidden)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))


def x():
    return np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")


def moved(model):
    """All that trains has other values."""
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) * 0.5)
    return model


@pytest.fixture
def adapted():
    model = network()
    keras_lora.apply_lora(model, rank=2, alpha=5, bias="all", dropout=0.2)
    return moved(model)


def assert_same(copied, model, inputs=None):
    """Outputs, adapters, and who trains."""
    inputs = x() if inputs is None else inputs
    expected = to_numpy(model(inputs))
    np.testing.assert_allclose(to_numpy(copied(inputs)), expected, atol=1e-5)
    one, other = adapted_sites(copied), adapted_sites(model)
    assert [layer.lora.options() for layer in one] == [
        layer.lora.options() for layer in other
    ]
    assert [v.name for v in copied.trainable_variables] == [
        v.name for v in model.trainable_variables
    ]
    assert [type(layer).__name__ for layer in one] == [
        type(layer).__name__ for layer in other
    ]


def reloaded(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


def cloned(model, tmp_path):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


COPIES = {
    "file": reloaded,
    "clone": cloned,
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "clone and file": lambda m, path: reloaded(cloned(m, path), path),
    "file and file": lambda m, path: reloaded(reloaded(m, path), path),
}
over_copies = pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)


@over_copies
def test_copies_of_the_model(adapted, way, tmp_path):
    assert_same(way(adapted, tmp_path), adapted)


# A copy of a copy, where what is copied carries adapters of sublayers.
@pytest.mark.parametrize(
    ("part", "way"),
    [
        (part, way)
        for part in ("block", "mha", "own", "dense", "hidden")
        for way in ("file", "clone", "pickle")
    ]
    + [("block", way) for way in COPIES if way not in ("file", "clone", "pickle")],
)
def test_copies_of_new_models_over_parts_of_it(adapted, part, way, tmp_path):
    """Plain Functional models, which know nothing of what was applied to another."""
    inputs = keras.Input((5, 4))
    if part == "hidden":
        outputs = keras.layers.Dense(3, name="new")(adapted.get_layer("dense").output)
        model = keras.Model(adapted.inputs[0], outputs)
    else:
        layer = adapted.get_layer(part)
        model = keras.Model(
            inputs, layer(inputs, inputs) if part == "mha" else layer(inputs)
        )
    assert adapted_sites(model)
    assert_same(COPIES[way](model, tmp_path), model)


@pytest.mark.parametrize("part", ["block", "mha", "own"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_of_single_layers(adapted, part, way, tmp_path):
    layer = adapted.get_layer(part)
    copied = COPIES[way](layer, tmp_path)
    inputs = [x(), x()] if part == "mha" else [x()]
    expected, found = layer(*inputs), copied(*inputs)
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=1e-6)
    assert len(adapted_sites(copied)) == len(adapted_sites(layer)) > 0


@pytest.mark.parametrize("part", ["block", "dense"])
@pytest.mark.parametrize("way", ["file", "clone"])
def test_frozen_biases_stay_frozen(part, way, tmp_path):
    model = network()
    keras_lora.apply_lora(model, rank=2)
    inputs = keras.Input((5, 4))
    layer = moved(model).get_layer(part)
    new = keras.Model(inputs, layer(layer(inputs)))
    assert {v.name for v in new.trainable_variables} == {"a", "b"}
    assert_same(COPIES[way](new, tmp_path), new)


@pytest.mark.parametrize("part", ["block", "mha"])
def test_adapters_of_one_layer_of_a_model(part, tmp_path):
    model = network()
    keras_lora.apply_lora(model.get_layer(part), rank=2, target=".*")
    moved(model.get_layer(part))
    assert_same(reloaded(model, tmp_path), model)


def test_a_model_that_was_only_marked(tmp_path):
    layers = [keras_lora.LoRADense(4, rank=2), keras.layers.Dense(2)]
    for bias, count in ("none", 2), ("lora_only", 3), ("all", 4):
        model = keras.Sequential([keras.Input((4,)), *layers])
        keras_lora.mark_only_lora_as_trainable(model, bias=bias)
        again = reloaded(moved(model), tmp_path)
        assert len(again.trainable_variables) == count
        assert_same(again, model, x()[:, 0])


def test_a_copy_can_be_undone(adapted, tmp_path):
    again = reloaded(adapted, tmp_path)
    keras_lora.remove_lora(again)
    plain = network()
    np.testing.assert_allclose(to_numpy(again(x())), to_numpy(plain(x())), atol=1e-6)
    pairs = zip(again._flatten_layers(), plain._flatten_layers(), strict=True)
    for one, other in pairs:
        assert type(one) is type(other)
        assert one.trainable == other.trainable
    assert len(again.trainable_variables) == len(plain.trainable_variables)


def test_a_configuration_changes_nothing_for_another_thread(adapted, monkeypatch):
    def fail(*args):
        raise AssertionError("a class was changed")

    for name, module in list(sys.modules.items()):
        if name.startswith("keras_lora") and hasattr(module, "change_class"):
            monkeypatch.setattr(module, "change_class", fail)
    for layer in [adapted, *adapted.layers, *adapted_sites(adapted)]:
        before = dict(vars(layer))
        keras.saving.serialize_keras_object(layer)
        assert vars(layer) == before


def test_shared_opaque_layers_stay_shared(tmp_path):
    inputs = keras.Input((5, 4))
    block = Block(4, name="block")
    model = keras.Model(inputs, block(block(inputs)))
    keras_lora.apply_lora(model, rank=2)
    again = reloaded(moved(model), tmp_path)
    assert len(again.layers) == 2
    assert_same(again, model)


def test_the_plain_layer_in_a_configuration_is_not_compiled_nor_shared(
    adapted, monkeypatch
):
    """It is made for that alone, and the next may get its place in memory."""
    views = {}

    def same_place(layer, cls):
        view = views.setdefault(cls, object.__new__(cls))
        object.__setattr__(view, "__dict__", vars(layer))
        return view

    monkeypatch.setattr("keras_lora.keras_internals.classes.view_as", same_place)
    adapted.compile("sgd", "mse")
    layers = [adapted, adapted.get_layer("block"), adapted.get_layer("mha")]
    with keras.src.saving.serialization_lib.ObjectSharingScope():
        configs = [keras.saving.serialize_keras_object(layer) for layer in layers * 2]
    assert "compile_config" in configs[0]
    assert all("shared_object_id" in config for config in configs)
    for config in configs:
        plain = config["config"]["layer"]
        assert not {"compile_config", "shared_object_id"} & plain.keys()


@pytest.mark.parametrize(
    ("build", "way"),
    [("applied", way) for way in ("file", "clone", "pickle", "deepcopy")]
    + [("constructed", way) for way in ("file", "clone")],
)
def test_how_a_layer_merges_is_kept(build, way, adapted, tmp_path):
    if build == "constructed":
        layers = [keras_lora.LoRADense(4, rank=2), keras.layers.Dense(2)]
        adapted = keras.Sequential([keras.Input((4,)), *layers])
    for layer in adapted_sites(adapted):
        layer.merge_weights = False
    copied = COPIES[way](adapted, tmp_path)
    assert adapted_sites(copied)
    assert not any(layer.merge_weights for layer in adapted_sites(copied))


def test_the_class_of_an_owner_makes_plain_ones_too(adapted):
    """KerasHub asks the class of a task for one of a plain configuration."""
    block = type(adapted.get_layer("block")).from_config(Block(4).get_config())
    assert type(block) is Block


@keras.saving.register_keras_serializable(package="tests")
class Grown(keras.Model):
    """Gets its layer from outside, which no configuration can say."""

    def call(self, inputs):
        return self.inner(inputs)


@pytest.mark.filterwarnings("ignore:Model .grown. had a build config")
def test_an_adapter_without_its_layer_is_an_error_that_says_so(tmp_path):
    model = Grown()
    model.inner = keras.layers.Dense(4)
    model(x())
    keras_lora.apply_lora(model, rank=2)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="does not build the layer 'inner'"):
        keras.models.load_model(tmp_path / "model.keras")


def test_old_h5_files_are_refused(adapted, tmp_path):
    (tmp_path / "old.h5").write_text("an earlier model")
    for name in ("model.h5", "model.hdf5", "old.h5"):
        with pytest.raises(ValueError, match=r"\.h5 format cannot store"):
            adapted.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.h5"]
    assert (tmp_path / "old.h5").read_text() == "an earlier model"
    with pytest.raises(ValueError, match=r"\.h5 format cannot store"):
        keras.saving.save_model(adapted, tmp_path / "model.h5")


@pytest.mark.filterwarnings("ignore:Skipping nested")
@pytest.mark.parametrize("part", ["block", "mha", "own", "dense", "all"])
def test_weights_with_adapters_do_not_go_into_a_plain_model(part, tmp_path):
    path = tmp_path / "model.weights.h5"

    def build():
        if part == "all":
            return network()
        inputs, layer = keras.Input((5, 4)), network().get_layer(part)
        outputs = layer(inputs, inputs) if part == "mha" else layer(inputs)
        return keras.Model(inputs, outputs)

    model, again, plain = build(), build(), build()
    for each in (model, again):
        keras_lora.apply_lora(each, rank=2, target=lambda path, layer: True)
    moved(model).save_weights(path)
    with pytest.raises(ValueError, match="could not be loaded"):
        plain.load_weights(path)
    again.load_weights(path)
    assert_same(again, model)


WITHOUT = """
import json, keras, sys
words = {}
for path in sys.argv[1:]:
    try:
        keras.models.load_model(path)
    except Exception as error:
        words[path] = str(error)
assert "keras_lora" not in sys.modules
print(json.dumps(words))
"""


@pytest.mark.slow
def test_a_process_without_this_package_is_told_of_it(tmp_path):
    paths = []
    for layer in (keras.layers.Dense, keras_lora.LoRADense):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, keras.layers.Dense(2)(layer(4)(inputs)))
        if layer is keras.layers.Dense:
            keras_lora.apply_lora(model)
        paths.append(str(tmp_path / f"{layer.__name__}.keras"))
        model.save(paths[-1])
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, *paths], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    words = json.loads(run.stdout.splitlines()[-1])
    for path in paths:
        assert "Could not locate class" in words[path]
        assert "keras_lora" in words[path]
    assert "import keras_lora" in words[paths[0]]


def test_files_of_the_first_version(adapted, tmp_path):
    """They had the plain model under another word, and less beside it."""
    config = keras.saving.serialize_keras_object(adapted)
    with_places = config["config"]["adapters"].keys()
    places = config["config"]["places"]
    plain = keras.saving.serialize_keras_object(network())
    old = {
        "module": "keras.src.models.functional",
        "class_name": "Functional",
        "registered_name": "keras_lora>AdaptedModel",
        "config": {
            "model": plain,
            "adapters": config["config"]["adapters"],
            "places": {path: places[path] for path in with_places},
            "merge_weights": config["config"]["merge_weights"],
            "trainable": config["config"]["trainable"],
            "trainable_before": config["config"]["trainable_before"],
        },
    }
    again = keras.saving.deserialize_keras_object(old)
    again.set_weights(adapted.get_weights())
    assert_same(again, adapted)
    assert_same(reloaded(again, tmp_path), adapted)


@tensorflow_only
@pytest.mark.parametrize(
    "context", slow_but(["merged"], ["none", "merged", "disabled"])
)
def test_saved_models_of_tensorflow(adapted, context, tmp_path):
    import contextlib

    import tensorflow as tf

    contexts = {"merged": keras_lora.merged, "disabled": keras_lora.disabled}
    with contexts.get(context, contextlib.nullcontext)(adapted):
        expected = to_numpy(adapted(x()))
        function = tf.function(lambda inputs: adapted(inputs, training=False))
        spec = tf.TensorSpec((None, 5, 4), tf.float32, name="x")
        signature = function.get_concrete_function(spec)
        tf.saved_model.save(adapted, str(tmp_path / "artifact"), signatures=signature)
        module = tf.Module()
        module.model, module.serve = adapted, function
        if context == "merged":  # of these one says what all would
            tf.saved_model.save(module, str(tmp_path / "module"), signatures=signature)
    for path in tmp_path.iterdir():
        artifact = tf.saved_model.load(str(path))
        (found,) = artifact.signatures["serving_default"](x=tf.constant(x())).values()
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@tensorflow_only
def test_checkpoints_of_tensorflow(adapted, tmp_path):
    import tensorflow as tf

    adapted_sites(adapted)[0].lora.set_alpha(9.5, use_rslora=True)
    path = tf.train.Checkpoint(model=adapted).save(str(tmp_path / "checkpoint"))
    other = network()
    keras_lora.apply_lora(other, rank=2, bias="all", dropout=0.2)
    status = tf.train.Checkpoint(model=other).restore(path)
    status.assert_existing_objects_matched()
    assert adapted_sites(other)[0].lora.scaling == 9.5 / 2**0.5
    assert_same(other, adapted)


def language_model():
    keras_hub = pytest.importorskip("keras_hub")
    set_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=30,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


IDS = {
    "token_ids": np.arange(12).reshape(2, 6),
    "padding_mask": np.ones((2, 6), "int32"),
}


@pytest.mark.filterwarnings("ignore:`compile")
@pytest.mark.parametrize("applied_to", ["task", "backbone"])
@pytest.mark.parametrize("way", ["file", "preset"])
def test_tasks_of_keras_hub(applied_to, way, tmp_path):
    task = language_model()
    part = task if applied_to == "task" else task.backbone
    keras_lora.apply_lora(part, rank=2, target=["query", "value"])
    moved(part)
    if way == "file":
        again = reloaded(task, tmp_path)
    else:
        import keras_hub

        task.save_to_preset(tmp_path / "preset")
        again = keras_hub.models.CausalLM.from_preset(
            str(tmp_path / "preset"), preprocessor=None
        )
    assert type(again).__name__ == "GPT2CausalLM"
    assert_same(again.backbone, task.backbone, IDS)
    np.testing.assert_allclose(
        again.predict(IDS, verbose=0), task.predict(IDS, verbose=0), atol=1e-5
    )


def classifier_of_keras_hub():
    keras_hub = pytest.importorskip("keras_hub")
    bert = keras_hub.models.BertBackbone(
        vocabulary_size=30,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
    )
    return keras_hub.models.BertTextClassifier(bert, num_classes=2)


@pytest.mark.filterwarnings("ignore:`compile")
def test_a_preset_can_be_read_in_another_dtype(tmp_path):
    import keras_hub

    task = language_model()
    keras_lora.apply_lora(task.backbone, rank=2, target=["query", "value"])
    task.save_to_preset(tmp_path / "preset")
    again = keras_hub.models.CausalLM.from_preset(
        str(tmp_path / "preset"), preprocessor=None, dtype="bfloat16"
    )
    assert again.backbone.dtype_policy.name == "bfloat16"
    for layer in adapted_sites(again):
        assert layer.compute_dtype == layer.frozen_kernel.dtype == "bfloat16"
        assert layer.lora.a.dtype == "float32"


@pytest.mark.filterwarnings("ignore:`compile")
def test_a_preset_has_the_head_that_trained(tmp_path):
    import keras_hub

    classifier = classifier_of_keras_hub()
    keras_lora.apply_lora(classifier, rank=2, also_train=["logits"])
    moved(classifier)
    with pytest.warns(UserWarning, match="has the trained values of logits, not those"):
        classifier.save_to_preset(tmp_path / "preset")
    task = keras_hub.models.TextClassifier
    again = task.from_preset(str(tmp_path / "preset"), preprocessor=None)
    inputs = {**IDS, "segment_ids": np.zeros((2, 6), "int32")}
    np.testing.assert_allclose(
        again.predict(inputs, verbose=0), classifier.predict(inputs, verbose=0)
    )
    # The copy's head is saved with its adapter.
    keras_lora.save_adapter(classifier, tmp_path / "adapter")
    keras_lora.save_adapter(again, tmp_path / "again")
    assert keras_lora.Adapter.read(tmp_path / "adapter") == keras_lora.Adapter.read(
        tmp_path / "again"
    )


@pytest.mark.filterwarnings("ignore:`compile")
def test_a_preset_of_a_backbone_alone_is_a_tasks_to_load(tmp_path):
    import keras_hub

    backbone = language_model().backbone
    keras_lora.apply_lora(backbone, rank=2, target=["query", "value"])
    moved(backbone)
    with pytest.warns(UserWarning, match="GPT2Backbone.from_preset cannot load"):
        backbone.save_to_preset(str(tmp_path / "preset"))
    task = keras_hub.models.GPT2CausalLM
    again = task.from_preset(str(tmp_path / "preset"), preprocessor=None)
    assert_same(again.backbone, backbone, IDS)


def test_a_preset_that_cannot_hold_the_adapters_is_refused(tmp_path):
    classifier = classifier_of_keras_hub()
    keras_lora.apply_lora(classifier, rank=2, target=["query", "logits"])
    with pytest.raises(ValueError, match="adapter of 'logits'"):
        classifier.save_to_preset(tmp_path / "preset")
    assert not (tmp_path / "preset").exists()
