"""combine_adapters and extract_adapter, against sums of updates in float64."""

import keras
import numpy as np
import pytest
from layer_cases import fill, to_numpy
from pretrained import PRETRAINED, convolutional, sequential, transformer
from shared import adapt, adapted, flags, predict

import keras_lora
from keras_lora.models.sites import adapted_sites, layers_by_path

over_models = pytest.mark.parametrize(
    "build", PRETRAINED, ids=lambda build: build.__name__
)


def saved(build, folder, seed, **settings):
    """An adapter on disk, and its update of each layer."""
    model = build()
    settings = {"rank": 2, "alpha": 3} | settings
    keras_lora.apply_lora(model, **settings)
    for layer in adapted_sites(model):
        fill(layer.lora.a, seed, 0.3)
        fill(layer.lora.b, seed + 1, 0.3)
        seed += 2
    keras_lora.save_adapter(model, folder)
    return deltas(model)


def deltas(model):
    return {
        path: to_numpy(layer.lora.delta())
        for path, layer in layers_by_path(model).items()
        if getattr(layer, "lora", None) is not None
    }


def loaded(build, adapter):
    model = build()
    keras_lora.load_adapter(model, adapter)
    return deltas(model)


@over_models
@pytest.mark.parametrize("use_rslora", [False, True])
def test_combining_one_gives_it_back(build, use_rslora, tmp_path):
    model = adapted(build, use_rslora=use_rslora, also_train=["head"], bias="all")
    keras_lora.save_adapter(model, tmp_path / "a")
    one = keras_lora.Adapter.read(tmp_path / "a")
    again = keras_lora.combine_adapters([tmp_path / "a"], weights=[1])
    assert again.config == one.config and again.slices == one.slices
    assert again.tensors.keys() == one.tensors.keys()
    for key, value in one.tensors.items():
        np.testing.assert_array_equal(again.tensors[key], value)
        assert again.tensors[key].dtype == value.dtype


@over_models
def test_sum_is_exact(build, tmp_path):
    """Other ranks, alphas, scalings and layers in each."""
    first = saved(build, tmp_path / "a", 1)
    second = saved(build, tmp_path / "b", 50, rank=3, alpha=5, use_rslora=True)
    some = list(second)[:1]
    third = saved(build, tmp_path / "c", 99, rank=1, alpha=1, target=some)
    folders = [tmp_path / name for name in "abc"]
    combined = keras_lora.combine_adapters(folders, weights=[0.5, -2, 3])
    assert combined.errors == {}
    combined.save(tmp_path / "sum")
    for source in (combined, tmp_path / "sum"):
        found = loaded(build, source)
        assert found.keys() == first.keys()
        for path, delta in found.items():
            expected = 0.5 * first[path].astype("float64") - 2 * second[path]
            expected += 3 * third.get(path, 0)
            np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-6)


def test_rslora_stays(tmp_path):
    """Where all have it, with the alpha that the sum of the ranks needs."""
    first = saved(sequential, tmp_path / "a", 1, use_rslora=True)
    second = saved(sequential, tmp_path / "b", 50, rank=3, alpha=5, use_rslora=True)
    combined = keras_lora.combine_adapters([tmp_path / "a", tmp_path / "b"])
    assert combined.config["use_rslora"]
    for path, delta in loaded(sequential, combined).items():
        np.testing.assert_allclose(delta, first[path] + second[path], atol=1e-6)


@pytest.mark.parametrize("build", [convolutional, transformer])
def test_sum_of_a_lower_rank_is_the_nearest(build, tmp_path):
    first = saved(build, tmp_path / "a", 1)
    second = saved(build, tmp_path / "b", 50, rank=3)
    folders = [tmp_path / "a", tmp_path / "b"]
    combined = keras_lora.combine_adapters(folders, rank=2)
    found = loaded(build, combined)
    assert {m.replace(".", "/") for m in combined.errors} == set(found)
    for path, delta in found.items():
        if "grouped" in path or "attention" in path:
            continue  # an einsum's axes need reordering to be a matrix
        total = (first[path] + second[path]).astype("float64")
        total = total.reshape(-1, total.shape[-1])
        left, values, right = np.linalg.svd(total, full_matrices=False)
        best = (left[:, :2] * values[:2]) @ right[:2]
        found_delta = delta.reshape(best.shape)
        np.testing.assert_allclose(found_delta, best, rtol=0, atol=1e-6)
        error = np.linalg.norm(total - best) / np.linalg.norm(total)
        reported = combined.errors[path.replace("/", ".")]
        np.testing.assert_allclose(reported, error, rtol=1e-4, atol=1e-6)


def test_slices_of_one_module_come_apart_again(tmp_path):
    names = {"attention/query": "qkv[0/3]", "attention/value": "qkv[2/3]"}
    folders, expected = [], 0
    for seed in (1, 50):
        model = transformer()
        keras_lora.apply_lora(model, target=["attention/query", "attention/value"])
        for place, layer in enumerate(adapted_sites(model)):
            fill(layer.lora.b, seed + place, 0.3)
        folders.append(tmp_path / str(seed))
        keras_lora.save_adapter(model, folders[-1], names=names)
        expected = expected + deltas(model)["attention/value"]
    combined = keras_lora.combine_adapters(folders)
    assert combined.slices == {"qkv": [16, 0, 16]}
    model = transformer()
    keras_lora.load_adapter(model, combined, names=names)
    np.testing.assert_allclose(
        deltas(model)["attention/value"], expected, rtol=0, atol=1e-6
    )


def test_merged_dense_takes_the_sum(tmp_path):
    def build(rank):
        mask = (True, False, True)
        layer = keras_lora.LoRAMergedDense(12, enable_lora=mask, rank=rank, name="qkv")
        return keras.Sequential([keras.Input((6,)), layer])

    folders, expected = [tmp_path / "a", tmp_path / "b"], 0
    for rank, folder in zip((1, 2), folders, strict=True):
        model = build(rank)
        fill(model.layers[0].lora.b, rank, 0.3)
        keras_lora.save_adapter(model, folder)
        expected = expected + to_numpy(model.layers[0].lora.delta())
    model = build(3)
    keras_lora.load_adapter(model, keras_lora.combine_adapters(folders))
    delta = to_numpy(model.layers[0].lora.delta())
    np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-6)


def test_bad_input_to_combine(tmp_path):
    saved(sequential, tmp_path / "a", 1)
    saved(convolutional, tmp_path / "b", 1)
    combine = keras_lora.combine_adapters
    with pytest.raises(ValueError, match="is empty"):
        combine([])
    for weights in ([1, 2], ["1"], [float("nan")], []):
        with pytest.raises(ValueError, match="`weights` must be one finite"):
            combine([tmp_path / "a"], weights=weights)
    with pytest.raises(ValueError, match="whole number"):
        combine([tmp_path / "a"], rank=0)
    with pytest.raises(OSError):
        combine([tmp_path / "nowhere"])
    model, _ = adapt(sequential, also_train=["head"])
    keras_lora.save_adapter(model, tmp_path / "c")
    model.get_layer("head").bias.assign(np.ones(3))
    keras_lora.save_adapter(model, tmp_path / "d")
    with pytest.raises(ValueError, match=r"'head\.bias' in full"):
        combine([tmp_path / "c", tmp_path / "d"])
    one = keras_lora.Adapter.read(tmp_path / "a")
    wide = {
        key: np.concatenate([value] * 2, axis=1) if "lora_A" in key else value
        for key, value in one.tensors.items()
    }
    with pytest.raises(ValueError, match="belong to different models"):
        combine([one, keras_lora.Adapter(wide, one.config)])


def with_heads(folder, seed, paths=("head",)):
    """An adapter whose heads have values of their own."""
    model, _ = adapt(sequential, also_train=list(paths))
    for path in paths:
        for variable in model.get_layer(path).weights:
            fill(variable, seed)
    keras_lora.save_adapter(model, folder)
    return {v.name: to_numpy(v) for p in paths for v in model.get_layer(p).weights}


def heads_of(adapter):
    model = sequential()
    keras_lora.load_adapter(model, adapter)
    return {v.name: to_numpy(v) for v in model.get_layer("head").weights}


def test_heads_are_kept_or_averaged(tmp_path):
    folders = [tmp_path / name for name in ("french", "german", "plain")]
    first, second = (with_heads(x, seed) for seed, x in enumerate(folders[:2]))
    saved(sequential, folders[2], 5)
    combine = keras_lora.combine_adapters
    mean = {name: (first[name].astype("float64") + second[name]) / 2 for name in first}
    read = [keras_lora.Adapter.read(folder) for folder in folders]
    for adapters, heads, expected in (
        (folders, "average", mean),
        (folders, "french", first),
        (list(map(str, folders)), folders[1], second),
        (read, 0, first),
        (iter(read), 1, second),
    ):
        found = heads_of(combine(adapters, heads=heads))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-7)
    with pytest.raises(
        ValueError, match=r'heads="average".*one to keep: positions 0, 1'
    ):
        combine(folders)
    with pytest.raises(ValueError, match=r"'head\.\w+' in full"):
        combine(folders, heads="plain")  # which has none to keep
    for heads in ("italian", 3, -1, True, 0.0, ["average"], ""):
        with pytest.raises(ValueError, match='`heads` must be "average"'):
            combine(folders, heads=heads)
    with_heads(tmp_path / "more" / "french", 7)
    with pytest.raises(ValueError, match="the name of one folder"):
        combine([*folders, tmp_path / "more" / "french"], heads="french")
    assert heads_of(combine([folders[0]] * 2)).keys() == first.keys()
    other = keras_lora.Adapter.read(folders[1])
    other.tensors["head.bias"] = np.ones(4, "float32")
    with pytest.raises(ValueError, match=r"'head\.bias' has several shapes"):
        combine([read[0], other], heads="average")


@over_models
def test_extracted_adapter_is_the_difference(build, tmp_path):
    """Two adapters' worth of change is extracted exactly at a sufficient rank."""
    base, tuned = build(), build()
    tuned.set_weights(base.get_weights())
    keras_lora.apply_lora(tuned, rank=2, alpha=6)
    for seed, layer in enumerate(adapted_sites(tuned)):
        fill(layer.lora.b, seed, 0.3)
    updates = deltas(tuned)
    expected = predict(tuned)
    keras_lora.merge_lora(tuned)
    before, weights = flags(base), [to_numpy(w) for w in base.weights]
    outputs = predict(base)
    adapter = keras_lora.extract_adapter(base, tuned, rank=2)
    assert flags(base) == before and adapted_sites(base) == []
    for old, new in zip(weights, base.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))
    np.testing.assert_array_equal(predict(base), outputs)
    assert max(adapter.errors.values()) < 1e-5
    adapter.save(tmp_path / "adapter")
    keras_lora.load_adapter(base, tmp_path / "adapter")
    assert deltas(base).keys() == updates.keys()
    np.testing.assert_allclose(predict(base), expected, rtol=0, atol=1e-5)


def test_extraction_of_a_fully_trained_model():
    """What no factors can hold goes along in full; the error is that of the SVD."""
    base = transformer()
    tuned = transformer()
    tuned.set_weights(base.get_weights())
    for seed, weight in enumerate(tuned.weights):
        if "seed" not in weight.path:
            fill(weight, seed, 0.3)
    exact = keras_lora.extract_adapter(base, tuned, rank=64)
    assert max(exact.errors.values()) < 1e-12
    rough = keras_lora.extract_adapter(base, tuned, rank=1)
    delta = to_numpy(tuned.get_layer("shared").kernel).astype("float64")
    delta -= to_numpy(base.get_layer("shared").kernel)
    values = np.linalg.svd(delta, compute_uv=False)
    error = np.sqrt(sum(values[1:] ** 2) / sum(values**2))
    assert rough.errors["shared"] == pytest.approx(error)
    keras_lora.load_adapter(base, exact)
    np.testing.assert_allclose(predict(base), predict(tuned), rtol=0, atol=1e-5)


def test_bad_input_to_extract():
    base = sequential()
    with pytest.raises(ValueError, match="No kernel that can be adapted differs"):
        keras_lora.extract_adapter(base, base, rank=2)
    with pytest.raises(ValueError, match="have different layers"):
        keras_lora.extract_adapter(base, transformer(), rank=2)
    wider = keras.Sequential(
        [keras.Input((7,)), *(type(x).from_config(x.get_config()) for x in base.layers)]
    )
    with pytest.raises(ValueError, match="'first' differ in name or shape"):
        keras_lora.extract_adapter(base, wider, rank=2)
    tuned = sequential()
    keras_lora.apply_lora(tuned)
    with pytest.raises(ValueError, match="holds LoRA layers"):
        keras_lora.extract_adapter(base, tuned, rank=2)
