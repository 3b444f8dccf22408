"""save_adapter and load_adapter: everything comes back, and no bad file harms."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import safetensors.numpy
from layer_cases import CASES, EVERY, factors, fill, frozen_kernels, to_numpy
from pretrained import PRETRAINED, sequential, transformer
from seeds import set_seed
from shared import (
    adapt,
    adapted,
    assert_close,
    assert_same,
    compile_,
    fit,
    flags,
    predict,
    same_base,
)

import keras_lora
from keras_lora.files.config import CONFIG
from keras_lora.files.disk import TENSORS
from keras_lora.files.save import adapter_of
from keras_lora.models.sites import adapted_sites

over_models = pytest.mark.parametrize(
    "build", PRETRAINED, ids=lambda build: build.__name__
)
over_cases = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


@pytest.mark.parametrize(
    ("build", "bias"),
    [
        *((build, "all") for build in PRETRAINED),
        *((build, bias) for build in PRETRAINED[::2] for bias in ("none", "lora_only")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_adapter_onto_a_plain_model(build, bias, tmp_path):
    model = adapted(build, bias=bias, use_rslora=bias == "all", also_train=["head"])
    keras_lora.save_adapter(model, tmp_path / "adapter")
    expected, trained = predict(model), len(model.trainable_weights)
    plain = same_base(model, build)
    # the trained heads and biases are in the file, so start them elsewhere
    for layer in plain._flatten_layers():
        if layer.name == "head" and hasattr(layer, "kernel"):
            layer.kernel.assign(np.zeros(layer.kernel.shape))
    keras_lora.load_adapter(plain, tmp_path / "adapter")
    plain.run_eagerly = model.run_eagerly  # which sums in another order
    assert_same(predict(plain), expected)
    assert len(plain.trainable_weights) == trained


@over_cases
def test_every_kind_comes_back(case, tmp_path):
    model = case.model()
    layer = model.layers[0]
    for seed, factor in enumerate(factors(layer).values()):
        fill(factor, seed, 0.3)
    expected = to_numpy(model(case.inputs()))
    keras_lora.save_adapter(model, tmp_path / "adapter")
    other = case.model()
    for name, kernel in frozen_kernels(other.layers[0]).items():
        kernel.assign(frozen_kernels(layer)[name])
    for lora in other.layers[0].loras.values():
        lora.set_alpha(77)
    keras_lora.load_adapter(other, tmp_path / "adapter")
    assert_same(to_numpy(other(case.inputs())), expected)
    for weight, lora in other.layers[0].loras.items():
        assert lora.scaling == pytest.approx(layer.loras[weight].scaling)
        assert lora.use_rslora == layer.loras[weight].use_rslora


def test_a_file_that_adapts_another_slice_is_refused():
    case = next(case for case in CASES if case.name == "merged-dense-query-value")
    model = case.model()
    adapter = adapter_of(model)
    (key,) = [key for key in adapter.tensors if "lora_B" in key]
    adapter.tensors[key][4:8] = 1  # of the second slice, which has no adapter
    with pytest.raises(ValueError, match="not zero outside the blocks"):
        keras_lora.load_adapter(model, adapter)


def test_file_holds_what_training_changed_and_nothing_else(tmp_path):
    model = adapted(transformer, also_train=["head"], target=["query", "value"])
    keras_lora.save_adapter(model, tmp_path / "adapter")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / TENSORS)
    size = sum(value.size for value in tensors.values())
    trained = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert size == trained
    assert "base_model.model.attention.query.lora_A.weight" in tensors
    assert tensors["base_model.model.head.weight"].shape == (3, 8)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 6
    assert config["modules_to_save"] == ["head"]
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {CONFIG, TENSORS}


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_file_says_which_biases_train(bias, tmp_path):
    """PEFT trains those when it goes on."""
    model = adapted(transformer, bias=bias)
    keras_lora.save_adapter(model, tmp_path)
    assert keras_lora.Adapter.read(tmp_path).config.get("bias", "none") == bias


def test_patterns_come_back(tmp_path):
    model, report = adapt(
        transformer,
        rank_pattern={"attention/query": 3, "up": 1},
        alpha_pattern={"shared": 11.5},
    )
    keras_lora.save_adapter(model, tmp_path / "adapter")
    plain = same_base(model, transformer)
    again = keras_lora.load_adapter(plain, tmp_path / "adapter")
    settings = {row.path: (row.rank, row.alpha) for row in report}
    assert {row.path: (row.rank, row.alpha) for row in again} == settings
    assert settings["attention/query"] == (3, 6)
    assert settings["shared"] == (2, 11.5)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="counts TensorFlow's traces"
)
def test_switching_adapters_never_traces_anew(tmp_path):
    model = adapted(sequential)
    fit(model, 1)
    first = predict(model)
    keras_lora.save_adapter(model, tmp_path / "first")
    for seed, layer in enumerate(adapted_sites(model)):
        fill(layer.lora.b, seed, 0.5)
        layer.lora.set_alpha(17, use_rslora=True)
    second = predict(model)
    keras_lora.save_adapter(model, tmp_path / "second")
    function, train_function = model.predict_function, model.train_function
    traces = function.experimental_get_tracing_count()
    for name, expected in [("first", first), ("second", second), ("first", first)]:
        keras_lora.load_adapter(model, tmp_path / name)
        np.testing.assert_array_equal(predict(model), expected)
    assert model.predict_function is function
    assert model.train_function is train_function
    assert function.experimental_get_tracing_count() == traces


def test_another_alpha_is_seen_by_a_compiled_predict(tmp_path):
    model = adapted(sequential)
    for layer in adapted_sites(model):
        layer.lora.set_alpha(31)
    expected = predict(model)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    for layer in adapted_sites(model):
        layer.lora.set_alpha(1)
    assert np.abs(predict(model) - expected).max() > 1e-3
    keras_lora.load_adapter(model, tmp_path / "adapter")
    assert_same(predict(model), expected)


def test_training_goes_on_after_loading(tmp_path):
    model = adapted(transformer)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    plain = same_base(model, transformer)
    keras_lora.load_adapter(plain, tmp_path / "adapter")
    before = [to_numpy(layer.lora.b) for layer in adapted_sites(plain)]
    fit(compile_(plain))
    for layer, b in zip(adapted_sites(plain), before, strict=True):
        assert np.abs(to_numpy(layer.lora.b) - b).max() > 0
    keras_lora.load_adapter(plain, tmp_path / "adapter", trainable=False)
    assert plain.trainable_weights == []


def test_names_map_paths_to_modules(tmp_path):
    names = {"first": "model.layers.0.fc", "dense": "model.layers.1.fc"}
    model = adapted(sequential)
    expected = predict(model)
    keras_lora.save_adapter(model, tmp_path / "adapter", names=names)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["target_modules"] == sorted(names.values())
    plain = same_base(model, sequential)
    with pytest.raises(ValueError, match=r"model\.layers"):
        keras_lora.load_adapter(plain, tmp_path / "adapter")
    keras_lora.load_adapter(plain, tmp_path / "adapter", names=names.get)
    np.testing.assert_allclose(predict(plain), expected, atol=1e-6)
    with pytest.raises(ValueError, match="not the path of a layer"):
        keras_lora.save_adapter(plain, tmp_path / "x", names={"furst": "a"})
    with pytest.raises(ValueError, match="two layers the name 'a'"):
        keras_lora.save_adapter(
            plain, tmp_path / "x", names={"first": "a", "dense": "a"}
        )
    assert not (tmp_path / "x").exists()


def test_saved_inside_a_context(tmp_path):
    model = adapted(sequential)
    keras_lora.save_adapter(model, tmp_path / "outside")
    with keras_lora.merged(model):
        keras_lora.save_adapter(model, tmp_path / "inside")
    with keras_lora.disabled(model):
        keras_lora.save_adapter(model, tmp_path / "disabled")
    outside = safetensors.numpy.load_file(tmp_path / "outside" / TENSORS)
    for name in ("inside", "disabled"):
        tensors = safetensors.numpy.load_file(tmp_path / name / TENSORS)
        assert tensors.keys() == outside.keys()
        for key, value in tensors.items():
            np.testing.assert_array_equal(value, outside[key])


def test_layer_with_a_constraint_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="x")])
    keras_lora.apply_lora(model, target=["x"])
    keras_lora.save_adapter(model, tmp_path / "adapter")
    bound = keras.layers.Dense(3, name="x", kernel_constraint="non_neg")
    model = keras.Sequential([keras.Input((4,)), bound])
    with pytest.raises(ValueError, match="in a form that can be adapted"):
        keras_lora.load_adapter(model, tmp_path / "adapter")


def test_other_files_in_the_folder_stay(tmp_path):
    model = adapted(sequential)
    folder = tmp_path / "adapter"
    keras_lora.save_adapter(model, folder)
    (folder / "README.md").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "notes").write_text("mine too")
    keras_lora.save_adapter(model, folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "more" / "notes").read_text() == "mine too"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    set_seed(3)
    model = adapted(sequential, also_train=["head"])
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    keras_lora.save_adapter(model, folder)
    return folder


def refused(folder, match=None, adapted_already=False):
    """Loading is a ValueError or OSError, and the model is as before, to the bit."""
    model = sequential()
    if adapted_already:
        keras_lora.apply_lora(model, rank=2, alpha=6)
    before, weights = flags(model), [to_numpy(w) for w in model.weights]
    with pytest.raises((ValueError, OSError), match=match):
        keras_lora.load_adapter(model, folder)
    assert flags(model) == before
    for old, new in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize(
    "change, match",
    [
        ({"r": 0}, "whole number"),
        ({"r": 2.5}, "whole number"),
        ({"r": "2"}, "whole number"),
        ({"r": 3}, "do not belong together: r is 3 and 2"),
        ({"lora_alpha": float("nan")}, "finite number"),
        ({"lora_alpha": float("inf")}, "finite number"),
        ({"lora_alpha": "8"}, "finite number"),
        ({"lora_alpha": 7}, "do not belong together"),
        ({"rank_pattern": [1]}, "must be an object"),
        ({"rank_pattern": {"first": -1}}, "whole number"),
        ({"rank_pattern": {"(": 1}}, "not a regular expression"),
        ({"alpha_pattern": {"first": None}}, "finite number"),
        ({"use_rslora": "yes"}, "use_rslora must be a Boolean"),
        ({"use_rslora": None}, "use_rslora must be a Boolean"),
        ({"lora_dropout": 2}, "dropout"),
        ({"bias": "some"}, "bias"),
        ({"bias": [1]}, "bias"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": 3}, "target_modules"),
        ({"modules_to_save": "head"}, "modules_to_save"),
        ({"modules_to_save": ["nothing"]}, "'nothing', but no layer of that name"),
        ({"fan_in_fan_out": "yes"}, "fan_in_fan_out must be a Boolean"),
        ({"target_parameters": "experts"}, "target_parameters must be a list"),
        ({"task_type": 3}, "task_type must be a name"),
        ({"task_type": 0}, "task_type must be a name"),
        ({"base_model_name_or_path": ["base"]}, "_path must be a name"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)
def test_bad_settings(saved, change, match, already, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    refused(folder, match, already)


@pytest.mark.parametrize(
    "text", ["", "[1]", "null", "3", '"r"', "{", "\x00", "[" * 99999]
)
def test_settings_that_are_no_object(saved, text, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    (folder / CONFIG).write_text(text)
    refused(folder)
    (folder / CONFIG).write_bytes(b"\xff\xfe")
    refused(folder)


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("damage", ["missing", "more", "shape", "nan", "int", "head"])
def test_bad_tensors(saved, damage, already, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    key = "base_model.model.dense.lora_B.weight"
    if damage == "missing":
        del tensors[key]
    elif damage == "more":
        tensors["base_model.model.dense.oops"] = tensors[key]
    elif damage == "shape":
        tensors[key] = tensors[key][:-1].copy()
    elif damage == "nan":
        tensors[key] = tensors[key] * np.float32("nan")
    elif damage == "int":
        tensors[key] = tensors[key].astype("int32")
    elif damage == "head":
        del tensors["base_model.model.head.bias"]
    safetensors.numpy.save_file(tensors, folder / TENSORS)
    refused(folder, "dense|head", already)


def test_other_rank_or_targets_than_the_model(saved):
    model = sequential()
    keras_lora.apply_lora(model, rank=3, alpha=6)
    before = flags(model)
    with pytest.raises(ValueError, match=r"rank of '\w+' is 2 .* 3 in"):
        keras_lora.load_adapter(model, saved)
    assert flags(model) == before
    keras_lora.remove_lora(model)
    keras_lora.apply_lora(model, rank=2, target=["first"])
    before = flags(model)
    with pytest.raises(ValueError, match=r"Only in the file: \['dense'\]"):
        keras_lora.load_adapter(model, saved)
    assert flags(model) == before


def test_unknown_settings_are_named_and_passed_over(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    config |= {"of_the_future": 1, "base_model_name_or_path": "/etc/passwd"}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="ignored of_the_future"):
        keras_lora.load_adapter(sequential(), folder)


def test_pickle_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    os.rename(folder / TENSORS, folder / "adapter_model.bin")
    refused(folder, "pickle")


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """An adapter of some 20 KiB, and what builds its model."""

    def build():
        inputs = keras.Input((64,))
        return keras.Model(inputs, keras.layers.Dense(64, name="wide")(inputs))

    model = build()
    keras_lora.apply_lora(model, rank=16, target=["wide"], also_train=None)
    fill(adapted_sites(model)[0].lora.b, 1)
    folder = tmp_path_factory.mktemp("long") / "adapter"
    keras_lora.save_adapter(model, folder)
    return folder, build


def assert_refused(model, folder, before):
    with pytest.raises((ValueError, OSError)):
        keras_lora.load_adapter(model, folder)
    assert adapted_sites(model) == []
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_file_cut_at_every_kilobyte(long_file, name, tmp_path):
    """And at every sixteenth byte of the first, where the header is."""
    saved, build = long_file
    folder = shutil.copytree(saved, tmp_path / "adapter")
    whole = (saved / name).read_bytes()
    model = build()
    before = [to_numpy(weight) for weight in model.weights]
    sizes = {*range(0, len(whole), 1024), *range(0, 1024, 16), len(whole) - 1}
    for size in sorted(size for size in sizes if size < len(whole)):
        (folder / name).write_bytes(whole[:size])
        assert_refused(model, folder, before)


def test_flipped_bytes(long_file, tmp_path):
    """Of the tensors: always an error. Of the header: an error or the same file."""
    saved, build = long_file
    folder = shutil.copytree(saved, tmp_path / "adapter")
    whole = (saved / TENSORS).read_bytes()
    expected = keras_lora.Adapter.read(saved).tensors
    model = build()
    before = [to_numpy(weight) for weight in model.weights]
    random = np.random.default_rng(0)
    header = int.from_bytes(whole[:8], "little") + 8
    places = [*range(0, header, 2), *random.integers(header, len(whole), 200)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << random.integers(8)
        (folder / TENSORS).write_bytes(flipped)
        try:
            found = keras_lora.Adapter.read(folder).tensors
        except (ValueError, OSError):
            assert_refused(model, folder, before)
        else:
            assert place < header
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_array_equal(found[key], value)


def test_missing_folder_is_an_os_error(tmp_path):
    refused(tmp_path / "nowhere")


def test_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = adapted(sequential)
    folder = tmp_path / "adapter"
    keras_lora.save_adapter(model, folder)
    old = (folder / TENSORS).read_bytes()
    for layer in adapted_sites(model):
        fill(layer.lora.b, 1)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="no space"):
        keras_lora.save_adapter(model, folder)
    monkeypatch.undo()
    assert (folder / TENSORS).read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    adapted_sites(model)[0].lora.a.assign(
        np.full(adapted_sites(model)[0].lora.a.shape, np.inf)
    )
    with pytest.raises(ValueError, match="not finite"):
        keras_lora.save_adapter(model, folder)
    assert (folder / TENSORS).read_bytes() == old


@pytest.mark.slow  # test_folders.py stops between all steps, without processes
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_while_saving(tmp_path):
    """At whatever moment: the old adapter or the new one, never a mixture."""
    program = (
        "import sys, numpy as np, keras_lora\n"
        "tensors = {f'x.lora_{n}.weight': np.ones((8, 8)) for n in 'AB'}\n"
        "config = {'peft_type': 'LORA', 'r': 8, 'target_modules': ['x']}\n"
        "for n in range(1, 10**6):\n"
        "    tensors['x.lora_A.weight'] = np.full((8, 64), n, 'float32')\n"
        "    adapter = keras_lora.Adapter(tensors, config | {'lora_alpha': n})\n"
        "    adapter.save(sys.argv[1])\n"
        "    print(n, flush=True)\n"
    )
    folder = tmp_path / "adapter"
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            env={**os.environ, "KERAS_BACKEND": "numpy"},  # the quickest to import
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.readline()
        time.sleep(0.05 + 0.059 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = keras_lora.Adapter.read(folder)
        a = next(value for key, value in found.tensors.items() if "lora_A" in key)
        config = found.config
        assert (a == config["lora_alpha"]).all()


def test_another_rank_is_an_error_that_says_what_to_do(tmp_path):
    for rank, folder in ((1, "low"), (4, "high")):
        model, _ = adapt(sequential, rank=rank)
        keras_lora.save_adapter(model, tmp_path / folder)
    model, _ = adapt(sequential, rank=2)
    advice = r"Call remove_lora\(model\) first, and the file's adapters are created\."
    with pytest.raises(ValueError, match=f"is 1 in the file and 2 in .*{advice}$"):
        keras_lora.load_adapter(model, tmp_path / "low")
    cut = r"Or lower the file's rank: combine_adapters\(\[adapter\], rank=2\)"
    with pytest.raises(ValueError, match=f"is 4 in the file.*{advice} {cut}"):
        keras_lora.load_adapter(model, tmp_path / "high")
    cut = keras_lora.combine_adapters([tmp_path / "high"], rank=2)
    keras_lora.load_adapter(model, cut)
    keras_lora.remove_lora(model)
    keras_lora.load_adapter(model, tmp_path / "high")


def test_names_may_give_one_word_to_layers_without_weights(tmp_path):
    def build():
        inner = [keras.Input((6,)), keras.layers.Dense(6, name="a")]
        inputs = keras.Input((6,))
        hidden = keras.Sequential(inner, name="inner")(inputs)
        return keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden))

    names = lambda path: path.removeprefix("inner/")  # noqa: E731
    model, other = build(), build()
    other.set_weights(model.get_weights())
    keras_lora.apply_lora(model, rank=2, target=["a"])
    fill(model.get_layer("inner").get_layer("a").lora.b, seed=1)
    keras_lora.save_adapter(model, tmp_path, names=names)
    keras_lora.load_adapter(other, tmp_path, names=names)
    np.testing.assert_array_equal(predict(other), predict(model))
    with pytest.raises(ValueError, match="two layers the name 'same'"):
        keras_lora.save_adapter(model, tmp_path, names=lambda path: "same")


LIKE_SUFFIXES = ["lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector"]
LIKE_SUFFIXES += ["original_module", "modules_to_save", "base_layer", "default"]


@pytest.mark.parametrize("name", LIKE_SUFFIXES)
@pytest.mark.parametrize("inside", [False, True])
def test_layers_may_be_called_like_parts_of_keys(name, inside, tmp_path):
    def build():
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(6, name=name)
        if inside:
            hidden = keras.Sequential([keras.Input((6,)), hidden], name="block")
        return keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden(inputs)))

    target = f"block/{name}" if inside else name
    for place, settings in enumerate(
        (
            {"target": [target]},
            {"target": [target, "head"], "use_dora": True, "bias": "lora_only"},
            {"target": ["head"], "also_train": [target]},
        )
    ):
        model, other = build(), build()
        other.set_weights(model.get_weights())
        keras_lora.apply_lora(model, rank=2, **settings)
        for seed, variable in enumerate(model.trainable_variables):
            fill(variable, seed, 0.5)
        names = None
        if inside and name != "default" and (place == 2 or name == "modules_to_save"):
            with pytest.raises(ValueError, match=f"'block.{name}' has a name like"):
                keras_lora.save_adapter(model, tmp_path / str(place))
            names = {target: "block.other"}
        keras_lora.save_adapter(model, tmp_path / str(place), names=names)
        keras_lora.load_adapter(other, tmp_path / str(place), names=names)
        np.testing.assert_array_equal(predict(other), predict(model))


@pytest.mark.parametrize("mask", [(True,), (True, False, True)])
def test_a_merged_layer_without_an_adapter_gets_that_of_a_file(mask, tmp_path):
    def network(rank):
        layer = keras_lora.LoRAMergedDense(6, rank=rank, enable_lora=mask)
        return keras.Sequential([keras.Input((4,)), layer])

    model, other = network(rank=2), network(rank=0)
    (saved,), (loaded,) = model.layers, other.layers
    fill(saved.lora.b, 1)
    loaded.kernel.assign(saved.kernel)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    keras_lora.load_adapter(other, tmp_path / "adapter")
    inputs = np.random.default_rng(1).standard_normal((3, 4)).astype("float32")
    assert_close(to_numpy(other(inputs)), model(inputs))
