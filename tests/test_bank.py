"""AdapterBank: each row of a batch is what the model gives with that row's adapter."""

import dataclasses
import os

import keras
import numpy as np
import pytest
from keras import ops
from layer_cases import CASES, KINDS, fill, merged_kernels, over, slow_but, to_numpy
from pretrained import PRETRAINED, sequential, subclassed
from shared import EAGERLY, assert_close

import keras_lora
from keras_lora import AdapterBank
from keras_lora.files.save import adapter_of

BACKEND = keras.backend.backend()
ROWS = ["a", None, "b", "b", "a"]
SETTINGS = {"a": {"rank": 2, "alpha": 3}, "b": {"rank": 3, "use_rslora": True}}


def in_bank(bank, inputs, names):
    return to_numpy(bank({"inputs": inputs, "adapter": bank.ids(names)}))


def assert_rows(found, names, expected, tolerance=1e-5):
    """expected: name -> outputs of the model with that adapter for the whole batch."""
    wanted = np.stack([expected[name][i] for i, name in enumerate(names)])
    assert_close(found, wanted, tolerance)


# Layers.


def layer_model(case, **lora):
    """The case's layer alone; without settings a plain one."""
    if lora or {"enable_lora", "factorization"} & case.lora.keys():
        options = {"rank": 0, **case.lora, **(lora or {"rank": 0})}
        layer = case.layer_class(**case.arguments, **options, name="wide")
    else:
        layer = case.layer_class.plain_class(**case.arguments, name="wide")
    dtype = "int32" if case.vocabulary else "float32"
    return keras.Sequential([keras.Input(case.input_shape, dtype=dtype), layer])


def layer_adapters(case, model, **more):
    """Adapters for the one layer, and the outputs of plain layers that are merged."""
    kernel = to_numpy(getattr(model.layers[0], case.layer_class.kernel_name))
    inputs = case.inputs(len(ROWS))
    expected, adapters = {None: to_numpy(model(inputs))}, {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        tuned = layer_model(case, **settings, **more)
        layer = tuned.layers[0]
        layer.frozen_kernel.assign(kernel)
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(model.layers[0].bias)
        layer.lora.start_from_kernel()
        for place, factor in enumerate(layer.lora.named_factors().values()):
            value = np.random.default_rng(9 * seed + place).normal(0, 0.3, factor.shape)
            factor.assign(factor + value)
        adapters[name] = adapter_of(tuned)
        plain = case.plain_layer(layer, merged_kernels(layer))
        expected[name] = to_numpy(plain(inputs))
    return adapters, inputs, expected


over_cases = over(CASES)


@over_cases
def test_each_row_is_the_layer_with_its_adapter(case):
    model = layer_model(case)
    if getattr(model.layers[0], "bias", None) is not None:
        fill(model.layers[0].bias, seed=3)
    adapters, inputs, expected = layer_adapters(case, model)
    bank = AdapterBank(model, adapters)
    assert_rows(in_bank(bank, inputs, ROWS), ROWS, expected)
    bank.activate("b")
    assert_close(model(inputs), expected["b"])
    bank.activate(None)
    assert_close(model(inputs), expected[None])


@over(KINDS)
def test_each_kind_trains_with_rows_of_its_own(case):
    model = layer_model(case)
    adapters, inputs, expected = layer_adapters(case, model, dropout=0.0)
    start = {name: np.zeros_like(outputs) for name, outputs in expected.items()}
    bank = AdapterBank(model, adapters)
    how = {} if case is KINDS[0] else EAGERLY  # one is traced
    bank.compile(keras.optimizers.SGD(0.5), "mse", **how)
    kernel = to_numpy(getattr(model.layers[0], case.layer_class.kernel_name))
    bank.train_on_batch({"inputs": inputs, "adapter": bank.ids(ROWS)}, start["a"])
    for name, adapter in adapters.items():
        alone = layer_model(case, **SETTINGS[name], dropout=0.0)
        alone.layers[0].frozen_kernel.assign(kernel)
        keras_lora.load_adapter(alone, adapter)
        alone.compile(keras.optimizers.SGD(0.5), "mse", **EAGERLY)
        rows = [place for place, own in enumerate(ROWS) if own == name]
        alone.train_on_batch(inputs[rows], start["a"][rows])
        found, wanted = bank.adapter(name), adapter_of(alone)
        assert found != adapter
        for key, value in wanted.tensors.items():
            assert_close(found.tensors[key], value)
    np.testing.assert_array_equal(
        to_numpy(getattr(model.layers[0], case.layer_class.kernel_name)), kernel
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_rows_in_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = sequential()
    inputs = x().astype("float32")
    expected, adapters = {None: to_numpy(model(inputs))}, {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        keras_lora.apply_lora(model, **settings)
        for layer in model.layers:
            if getattr(layer, "lora", None) is not None:
                fill(layer.lora.a, seed, 0.5)
                fill(layer.lora.b, seed + 5, 0.5)
        adapters[name] = adapter_of(model)
        expected[name] = to_numpy(model(inputs))
        keras_lora.remove_lora(model)
    bank = AdapterBank(model, adapters)
    assert bank.stacks[0].a.dtype == "float32"
    names = (ROWS * 4)[: len(inputs)]
    found = in_bank(bank, inputs, names)
    expected = {name: values.astype("float32") for name, values in expected.items()}
    assert_rows(found.astype("float32"), names, expected, tolerance=2e-2)


DORA = ["dense-relu", "merged-dense-query-value", "embedding-two-axes", "conv2d-groups"]
DORA += ["einsum-dense-query", "einsum-dense-output", "einsum-dense-batch-axis"]


@pytest.mark.parametrize("name", DORA)
def test_a_row_has_the_lengths_of_its_dora_adapter(name):
    case = next(case for case in CASES if case.name == name)
    model = layer_model(case)
    adapters, inputs, expected = layer_adapters(case, model, use_dora=True)
    bank = AdapterBank(model, adapters)
    assert_rows(in_bank(bank, inputs, ROWS), ROWS, expected)
    bank.activate("a")
    assert_close(model(inputs), expected["a"])


def test_there_is_room_for_dora_if_one_of_the_first_adapters_has_it():
    case = next(case for case in CASES if case.name == "dense-relu")
    model = layer_model(case)
    adapters, inputs, expected = layer_adapters(case, model, use_dora=True)
    bank = AdapterBank(model, capacity=2, target=["wide"])
    with pytest.raises(ValueError, match=r"'wide': DoRA's magnitudes"):
        bank.add("a", adapters["a"])
    bank.release()
    bank = AdapterBank(model, {"x": adapters["b"]}, capacity=3)
    more, _, others = layer_adapters(case, model)
    bank.add("a", adapters["a"])
    bank.add("b", more["b"])
    assert_rows(in_bank(bank, inputs, ROWS), ROWS, {**expected, "b": others["b"]})


def reversible():
    layer = keras.layers.ReversibleEmbedding(9, 5, name="tokens")
    ids = keras.Input((4,), dtype="int32")
    return keras.Model(ids, layer(ops.tanh(layer(ids)), reverse=True))


@pytest.mark.skipif(
    not hasattr(keras.layers, "ReversibleEmbedding"), reason="since Keras 3.13"
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_both_directions_of_a_tied_embedding(use_dora):
    model = reversible()
    inputs = np.random.default_rng(0).integers(0, 9, (len(ROWS), 4), "int32")
    expected, adapters = {None: to_numpy(model(inputs))}, {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        tuned = reversible()
        layer = tuned.get_layer("tokens")
        layer.set_weights(model.get_layer("tokens").get_weights())
        settings = {"target": ["tokens"], "use_dora": use_dora, **settings}
        keras_lora.apply_lora(tuned, **settings)
        fill(layer.lora.a, seed, 0.3)
        fill(layer.lora.b, seed + 5, 0.3)
        adapters[name] = adapter_of(tuned)
        keras_lora.merge_lora(tuned)
        expected[name] = to_numpy(tuned(inputs))
    bank = AdapterBank(model, adapters)
    assert_rows(in_bank(bank, inputs, ROWS), ROWS, expected)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_kernels(mode):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, name="wide", activation="tanh")]
    )
    model.layers[0].quantize(mode)
    inputs = np.random.default_rng(0).standard_normal((len(ROWS), 8), "float32")
    expected, adapters = {None: to_numpy(model(inputs))}, {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        keras_lora.apply_lora(model, target=["wide"], **settings)
        fill(model.layers[0].lora.b, seed, 0.3)
        adapters[name], expected[name] = adapter_of(model), to_numpy(model(inputs))
        keras_lora.remove_lora(model)
    bank = AdapterBank(model, adapters)
    assert_rows(in_bank(bank, inputs, ROWS), ROWS, expected)


# Models.


def x(rows=5):
    return np.random.default_rng(1).standard_normal((rows, 6), "float32")


def tuned_adapters(model, exclude=None, settings=SETTINGS, **more):
    """Adapters of the model, trained as if, and the outputs of the merged copies."""
    expected, adapters = {None: to_numpy(model(x()))}, {}
    for seed, (name, options) in enumerate(settings.items()):
        report = keras_lora.apply_lora(model, exclude=exclude, **more, **options)
        for place, row in enumerate(report):
            fill(row.layer.lora.b, 20 * seed + place, 0.3)
        adapters[name] = adapter_of(model)
        expected[name] = to_numpy(model(x()))
        keras_lora.remove_lora(model)
    return adapters, expected


@pytest.fixture
def small():
    """A small model with adapters of different ranks and layers."""
    model = sequential()
    settings = {
        "a": {"rank": 2, "alpha": 3},
        "b": {"rank": 3, "use_rslora": True, "target": ["first", "head"]},
        "c": {"rank": 1, "target": ["dense"], "alpha": 7},
    }
    return model, *tuned_adapters(model, settings=settings)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "build",
    slow_but(("sequential", "transformer", "subclassed"), PRETRAINED),
)
def test_each_row_is_the_model_with_its_adapter(build):
    model = build()
    weights = model.get_weights()
    exclude = ["head"] if build is subclassed else None
    settings = {**SETTINGS, "c": {"rank": 1, "rank_pattern": {"first|.*y|.*0|.*a": 4}}}
    adapters, expected = tuned_adapters(model, exclude, settings)
    bank = AdapterBank(model, adapters, capacity=5)
    for names, size in ((ROWS, 2), (["c", "a", "c", None, "b"], 32)):
        data = {"inputs": x(), "adapter": bank.ids(names)}
        assert_rows(in_bank(bank, x(), names), names, expected)
        found = bank.predict(data, verbose=0, batch_size=size)
        assert_rows(found, names, expected)
    bank.release()
    assert not any(isinstance(x, keras_lora.LoRALayer) for x in model._flatten_layers())
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(to_numpy(model(x())), expected[None])
    with pytest.raises(ValueError, match="released"):
        in_bank(bank, x(), ROWS)


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles otherwise")
def test_compiled_by_xla(small):
    model, adapters, expected = small
    bank = AdapterBank(model, adapters)
    bank.compile(jit_compile=True)
    found = bank.predict({"inputs": x(), "adapter": bank.ids(ROWS)}, verbose=0)
    assert_rows(found, ROWS, expected)
    wrong = bank.predict({"inputs": x(), "adapter": bank.ids(ROWS) + 99}, verbose=0)
    assert np.isnan(wrong).all()


@keras.saving.register_keras_serializable(package="tests")
class CountsTraces(keras.layers.Layer):
    traces = 0

    def call(self, inputs):
        self.traces += 1
        return inputs


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is traced there")
def test_nothing_is_traced_anew():
    counter = CountsTraces()
    model = sequential()
    adapters, expected = tuned_adapters(model)
    model = keras.Sequential([*model.layers, counter])
    model.build((None, 6))
    bank = AdapterBank(model, capacity=3, max_rank=4, target=["first", "dense"])

    def check():
        for names in (ROWS, ["b", "a", None, None, "b"]):
            data = {"inputs": x(), "adapter": bank.ids(names)}
            assert_rows(bank.predict(data, verbose=0), names, expected)
            with bank.rows(names):
                assert_rows(model.predict(x(), verbose=0), names, expected)
        for name in ("a", None, "b", None):
            bank.activate(name)
            assert_close(model.predict(x(), verbose=0), expected[name])

    for name, adapter in adapters.items():
        bank.add(name, adapter)
    check()
    before = counter.traces
    bank.add("a", adapters["b"])
    bank.add("c", adapters["a"])
    bank.remove("b")
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    check()
    assert counter.traces == before


def test_ids_that_name_nothing_are_nan(small):
    model, adapters, expected = small
    bank = AdapterBank(model, {"a": adapters["a"], "b": adapters["b"]}, capacity=2)
    ids, removed = bank.ids(ROWS), bank.ids(["b"])[0]
    bank.remove("b")
    bank.add("c", adapters["c"])  # in the place of b, under another id
    assert removed not in bank.ids(["a", "c"])
    for wrong in (removed, 77, -1, -4, 2**31 - 1, -(2**31)):
        ids = np.array([bank.ids(["a"])[0], wrong, 0, bank.ids(["c"])[0], wrong])
        for dtype in ("int32", "int64"):
            data = {"inputs": x(), "adapter": ids.astype(dtype)}
            found = to_numpy(bank(data))
            assert np.isnan(found[[1, 4]]).all()
            names = ["a", None, None, "c", None]
            right = np.where(np.isnan(found), expected[None], found)
            assert_rows(right, names, expected)
    with pytest.raises(ValueError, match=r"no adapter 'aa'.*closest are .'a'"):
        bank.ids(["aa"])
    with pytest.raises(ValueError, match="list with the name"):
        bank.ids("a")
    with pytest.raises(ValueError, match="vector of whole numbers"):
        bank({"inputs": x(), "adapter": np.zeros(5, "float32")})
    with pytest.raises(ValueError, match=r'called with {"inputs"'):
        bank(x())
    with pytest.raises(ValueError, match="5 rows, 2 adapters"):
        in_bank(bank, x(), ["a", "c"])
    for names in (["a", None], ["a", "c"], np.array(["a", "c"])):
        data = {"inputs": x()[:2], "adapter": names}
        calls = bank, bank.predict, bank.evaluate, bank.predict_on_batch, bank.fit
        for call in calls:
            with pytest.raises(ValueError, match="must hold ids, not names"):
                call(data)


def test_a_wild_adapter_spoils_its_own_rows_alone(small):
    model, adapters, expected = small
    tensors = {key: value * 1e30 for key, value in adapters["b"].tensors.items()}
    adapters["b"] = dataclasses.replace(adapters["b"], tensors=tensors)
    bank = AdapterBank(model, adapters)
    found = in_bank(bank, x(), ROWS)
    found[[2, 3]] = expected["b"][[2, 3]]
    assert_rows(found, ROWS, expected)


def test_rows_and_activate(small):
    model, adapters, expected = small
    model.predict(x(), verbose=0)  # a compiled function that knows no bank
    bank = AdapterBank(model, adapters)
    assert bank.names == ["a", "b", "c"]
    with bank.rows(ROWS):
        assert_rows(model(x()), ROWS, expected)
        assert_rows(model.predict(x(), verbose=0), ROWS, expected)
        bank.add("a", adapters["c"])
        assert_rows(model(x()), ROWS, {**expected, "a": expected["c"]})
        bank.add("a", adapters["a"])
        other = ["c", "c", "b", "a", None]
        assert_rows(in_bank(bank, x(), other), other, expected)
        with pytest.raises(ValueError, match="2 rows, 5 adapters"):
            model(x(2))
        with pytest.raises(Exception, match="another number of rows"):
            model.predict(x(4), verbose=0, batch_size=4)
        with pytest.raises(ValueError, match="already"), bank.rows(["a"]):
            pass
    for name in "bacba":  # in slots that held layers which this one leaves out
        bank.add("a", adapters[name])
        now = {**expected, "a": expected[name]}
        assert_rows(in_bank(bank, x(), ROWS), ROWS, now)
    assert_close(model.predict(x(), verbose=0), expected[None])
    with bank.rows(["b"]):
        assert_close(model.predict(x()[:1], verbose=0), expected["b"][:1])
        with pytest.raises(ValueError, match="5 rows, 1 adapters"):
            model(x())
    bank.activate("c")
    assert_close(model.predict(x(), verbose=0), expected["c"])
    assert_rows(in_bank(bank, x(), ROWS), ROWS, expected)
    bank.add("c", adapters["a"])
    assert_close(model.predict(x(), verbose=0), expected["a"])
    with pytest.raises(ValueError, match="active"):
        bank.remove("c")
    bank.activate(None)
    bank.remove("c")
    for call in (bank.activate, bank.remove):
        with pytest.raises(ValueError, match="no adapter 'c'"):
            call("c")
    with pytest.raises(ValueError, match="training=True"):
        model(x(), training=True)
    for call in (bank.fit, bank.train_on_batch):
        with pytest.raises(ValueError, match=r"bank\.compile"):
            call(x())


# What is one row's own, and what cannot be.


def trained_beside(model, train, **options):
    """An adapter with what `train` names beside factors, and the tuned outputs."""
    report = keras_lora.apply_lora(model, target=["first"], **options)
    for place, row in enumerate(report):
        fill(row.layer.lora.b, place, 0.3)
    for seed, (layer, names) in enumerate(train.items()):
        for name in names:
            variable = getattr(model.get_layer(layer), name)
            variable.assign(
                variable + 0.3 * np.cos(seed + np.arange(variable.shape[-1]))
            )
    adapter, outputs = adapter_of(model), to_numpy(model(x()))
    keras_lora.remove_lora(model)
    return adapter, outputs


def test_biases_and_heads_are_each_adapters_own():
    model = sequential()
    fill(model.get_layer("head").bias, seed=1)
    expected, adapters = {None: to_numpy(model(x()))}, {}
    head = {"head": ["kernel", "bias"]}
    wide = {"first": ["bias"], "dense": ["kernel"]}
    for name, train, options in (
        ("a", head, {"also_train": ["head"]}),
        ("b", {"first": ["bias"]}, {"bias": "lora_only"}),
        ("c", {"head": ["bias"]}, {"bias": "all", "also_train": None}),
        ("d", wide, {"bias": "lora_only", "also_train": ["dense"]}),
    ):
        if name == "c":  # beta of batch normalization stays out
            options = {"bias": "all"}
        adapters[name], expected[name] = trained_beside(model, train, **options)
    bank = AdapterBank(model, adapters)
    for names in (ROWS, ["c", "d", "a", None, "d"]):
        assert_rows(in_bank(bank, x(), names), names, expected)
        data = {"inputs": x(), "adapter": bank.ids(names)}
        assert_rows(bank.predict(data, verbose=0), names, expected)
    bank.release()
    narrow = AdapterBank(model, {"b": adapters["b"]}, capacity=3)
    with pytest.raises(ValueError, match=r"no room.* 'head': the layer is not in"):
        narrow.add("a", adapters["a"])
    assert narrow.names == ["b"]
    narrow.release()
    settings = {"rank": 2, "also_train": ["head"]}
    adapter, _ = trained_beside(model, head, **settings)
    narrow = AdapterBank(model, capacity=3, max_rank=2, target=["first", "head"])
    with pytest.raises(ValueError, match=r"'head': rank 3, with room for 2"):
        narrow.add("a", adapter)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"also_train": ["head"]}])
@pytest.mark.parametrize("way", ["set", "file", "assign"])
def test_other_weights_are_refused_where_adapters_depend_on_them(
    settings, way, tmp_path
):
    model, other = sequential(), sequential()
    train = {"head": ["kernel"]} if "also_train" in settings else {}
    adapter, wanted = trained_beside(model, train, rank=3, **settings)
    plain, _ = trained_beside(model, {}, rank=2)
    other.save_weights(tmp_path / "other.weights.h5")

    def load():
        if way == "set":
            model.set_weights(other.get_weights())
        elif way == "file":
            model.load_weights(tmp_path / "other.weights.h5")
        else:
            model.get_layer("first").kernel.assign(other.get_layer("first").kernel)

    bank = AdapterBank(model, {"a": adapter, "b": plain})
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"'a'.*bank\.release"):
        load()
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(now, old)
    data = {"inputs": x(), "adapter": bank.ids(["a"] * 5)}
    assert_close(bank.predict(data, verbose=0), wanted)
    bank.remove("a")  # what is left goes with any weights
    load()
    found = in_bank(bank, x(), ["b"] * 5)
    bank.release()
    keras_lora.load_adapter(model, plain)
    assert_close(found, to_numpy(model(x())))


def normalized():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(6, name="first")(inputs)
    hidden = keras.layers.LayerNormalization(name="norm")(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden))


def test_what_rows_share_is_refused_by_name():
    model = normalized()
    before = to_numpy(model(x()))
    adapter, _ = trained_beside(model, {"norm": ["gamma"]}, also_train=["norm"])
    with pytest.raises(
        ValueError, match=r"'a': .* trained 'gamma' of 'norm', a LayerN"
    ):
        AdapterBank(model, {"a": adapter})
    assert not any(isinstance(x, keras_lora.LoRALayer) for x in model.layers)
    np.testing.assert_array_equal(to_numpy(model(x())), before)


def test_nothing_else_changes_a_banked_model(small, tmp_path):
    model, adapters, expected = small
    adapters["a"].save(tmp_path / "a")
    bank = AdapterBank(model, {"a": str(tmp_path / "a")})
    for call in (
        lambda: keras_lora.apply_lora(model),
        lambda: keras_lora.merge_lora(model),
        lambda: keras_lora.remove_lora(model),
        lambda: keras_lora.load_adapter(model, tmp_path / "a"),
        lambda: keras_lora.save_adapter(model, tmp_path / "b"),
        lambda: keras_lora.export(model, tmp_path / "c", format="onnx"),
        lambda: keras_lora.mark_only_lora_as_trainable(model),
        lambda: keras_lora.merged(model).__enter__(),
        lambda: AdapterBank(model, adapters),
    ):
        with pytest.raises(ValueError, match=r"AdapterBank|release\(\) on the bank"):
            call()
    with pytest.raises(ValueError, match="quantize"):
        model.get_layer("first").quantize("int8")
    names = ["a", None, "a", "a", None]
    assert_rows(in_bank(bank, x(), names), names, expected)
    bank.release()
    keras_lora.apply_lora(model)
    with pytest.raises(ValueError, match=r"has an adapter\. Call merge_lora"):
        AdapterBank(model, adapters)


def test_a_model_in_a_bank_is_saved_as_the_plain_one(small, tmp_path):
    model, adapters, expected = small
    bank = AdapterBank(model, adapters)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "plain.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in loaded.layers] == [
        type(layer) for layer in sequential().layers
    ]
    np.testing.assert_array_equal(to_numpy(loaded(x())), expected[None])
    other = sequential()
    other.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_array_equal(to_numpy(other(x())), expected[None])
    with pytest.raises(ValueError, match="cannot be saved as a Keras model"):
        bank.save(tmp_path / "bank.keras")


def test_what_does_not_fit_changes_nothing(small, tmp_path):
    model, adapters, expected = small
    bank = AdapterBank(model, {"a": adapters["a"]}, capacity=2, max_rank=2)
    other = normalized()
    keras_lora.apply_lora(other, rank=2, target=["first"])
    foreign = adapter_of(other)
    nan = {**adapters["a"].tensors}
    nan[next(iter(nan))] = np.full_like(nan[next(iter(nan))], np.nan)
    (tmp_path / "empty").mkdir()
    bad = [
        (foreign, "shape"),
        (dataclasses.replace(adapters["a"], tensors=nan), "not finite"),
        (adapters["b"], "rank 3 at 'first'.*max_rank=3"),
        (adapters["a"].__class__({}, adapters["a"].config), "no factors"),
    ]
    for adapter, message in bad:
        for name in ("a", "new"):
            with pytest.raises(ValueError, match=message):
                bank.add(name, adapter)
    with pytest.raises((ValueError, OSError)):
        bank.add("new", tmp_path / "empty")
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="name of an adapter"):
            bank.add(name, adapters["a"])
    names = ["a", None, "a", None, "a"]
    assert bank.names == ["a"]
    assert_rows(in_bank(bank, x(), names), names, expected)
    bank.add("more", adapters["c"])
    with pytest.raises(ValueError, match="no room for 'd'"):
        bank.add("d", adapters["a"])
    bank.add("more", adapters["a"])  # a name that is there is replaced, full or not
    bank.release()
    for arguments, message in (
        ({}, "needs `adapters`"),
        ({"adapters": [adapters["a"]]}, "must be a dict"),
        ({"adapters": {"a": adapters["a"]}, "capacity": 0}, "capacity=0"),
        ({"target": "all-linear", "capacity": True}, "capacity=True"),
        ({"target": "all-linear", "max_rank": 0}, "rank=0"),
        ({"target": ["nowhere"]}, "matches no layer"),
        ({"adapters": {"a": adapters["a"], "x": foreign}}, "'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterBank(model, **arguments)
        assert not any(isinstance(x, keras_lora.LoRALayer) for x in model.layers)


# The leading axis.


def steps_in_rows():
    """(batch * time, d), and back."""
    inputs = keras.Input((6,))
    hidden = keras.layers.Reshape((2, 3))(inputs)
    hidden = ops.reshape(hidden, (-1, 3))
    hidden = keras.layers.Dense(4, name="folded", activation="tanh")(hidden)
    hidden = ops.reshape(hidden, (-1, 8))
    return keras.Model(inputs, keras.layers.Dense(3, name="dense")(hidden))


def tiled():
    """All rows twice, one after the other, as guidance in diffusion does."""
    inputs = keras.Input((6,))
    twice = ops.concatenate([inputs, -inputs], axis=0)
    twice = keras.layers.Dense(4, name="tiled", activation="tanh")(twice)
    first, second = ops.split(twice, 2, axis=0)
    return keras.Model(inputs, keras.layers.Dense(3, name="dense")(first * 2 - second))


def in_steps():
    inputs = keras.Input((6,))
    hidden = keras.layers.Reshape((2, 3))(inputs)
    dense = keras.layers.Dense(4, name="inner")
    hidden = keras.layers.TimeDistributed(dense, name="steps")(hidden)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(hidden)))


@pytest.mark.parametrize(
    ("build", "layer", "leading"),
    [
        (steps_in_rows, "folded", "repeat"),
        (tiled, "tiled", "tile"),
        (in_steps, "steps/inner", "rows"),
    ],
)
def test_another_leading_axis_gets_the_right_ids(build, layer, leading):
    model = build()
    adapters, expected = tuned_adapters(model)
    bank = AdapterBank(model, adapters)
    assert bank.hosts.layers[layer].lora.leading == leading
    assert_rows(in_bank(bank, x(), ROWS), ROWS, expected)
    data = {"inputs": x(), "adapter": bank.ids(ROWS)}
    assert_rows(bank.predict(data, verbose=0, batch_size=2), ROWS, expected)


def time_first():
    inputs = keras.Input((6,))
    hidden = ops.transpose(keras.layers.Reshape((3, 2))(inputs), (1, 0, 2))
    hidden = keras.layers.Dense(4, name="wrong")(hidden)
    hidden = keras.layers.Flatten()(ops.transpose(hidden, (1, 0, 2)))
    return keras.Model(inputs, keras.layers.Dense(3)(hidden))


def rows_mixed():
    inputs = keras.Input((6,))
    hidden = inputs - ops.mean(inputs, axis=0, keepdims=True)
    hidden = keras.layers.Dense(4, name="wrong")(hidden)
    return keras.Model(inputs, keras.layers.Dense(3)(hidden))


class Positions(keras.Model):
    def __init__(self):
        super().__init__()
        self.wrong = keras.layers.Embedding(6, 6, name="wrong")
        self.head = keras.layers.Dense(3)

    def call(self, inputs):
        return self.head(inputs + ops.mean(self.wrong(ops.arange(6)[None]), axis=-1))


def test_a_leading_axis_of_one_is_refused_in_the_first_call():
    model = Positions()
    model(x())
    bank = AdapterBank(model, target=["wrong"])
    for call in (bank, bank.predict):
        with pytest.raises(ValueError, match=r"apart.*'wrong': 1 in size whatever"):
            call({"inputs": x(), "adapter": bank.ids([None] * 5)})


@pytest.mark.parametrize("build", [time_first, rows_mixed])
def test_a_leading_axis_that_is_not_the_rows_is_refused(build):
    model = build()
    with pytest.raises(
        ValueError, match=r"apart.*'wrong': 3 in size for 3 rows, which"
    ):
        AdapterBank(model, target=["wrong"])
    assert not any(isinstance(x, keras_lora.LoRALayer) for x in model.layers)


def test_a_subclassed_model_is_looked_at_in_its_first_call():
    model = subclassed()
    adapters, expected = tuned_adapters(model, ["head"])
    bank = AdapterBank(model, adapters)
    with pytest.raises(ValueError, match="Call the bank once"), bank.rows(ROWS):
        model(x())
    data = {"inputs": x(), "adapter": bank.ids(ROWS)}
    assert_rows(bank.predict(data, verbose=0), ROWS, expected)
    with bank.rows(ROWS):
        assert_rows(model(x()), ROWS, expected)


# A language model.


@pytest.mark.slow
@pytest.mark.skipif(
    BACKEND == "jax" and os.environ.get("JAX_ENABLE_X64") == "1",
    reason="KerasHub's cache mixes integers of 64 and 32 bits there",
)
@pytest.mark.filterwarnings("ignore")
def test_each_row_generates_with_its_adapter():
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=50,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
        max_sequence_length=8,
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy", run_eagerly=True)
    prompt = {
        "token_ids": np.array([[3, 4, 5] + [0] * 5] * 3, "int32"),
        "padding_mask": np.array([[1, 1, 1] + [0] * 5] * 3, "int32"),
    }

    def generated():
        found = model.generate(prompt, stop_token_ids=None)["token_ids"]
        return to_numpy(found)

    before = generated()
    report = keras_lora.apply_lora(model, rank=2, target=["query", "value"])
    for place, row in enumerate(report):
        fill(row.layer.lora.b, place, 3.0)
    adapter, tuned = adapter_of(model), generated()
    keras_lora.remove_lora(model)
    assert not np.array_equal(before, tuned)
    model.compile(sampler="greedy", jit_compile=False)
    bank = AdapterBank(model, {"a": adapter})
    expected = {None: before, "a": tuned}
    for names in (["a", None, "a"], [None, "a", None]):
        with bank.rows(names):
            found = generated()
        for place, name in enumerate(names):
            np.testing.assert_array_equal(found[place], expected[name][place])
    for name in ("a", None):
        bank.activate(name)
        np.testing.assert_array_equal(generated(), expected[name])


def test_names_of_transformers_are_read_slices_and_all(tmp_path):
    """GPT-2's query, key and value are one module there."""
    keras_hub = pytest.importorskip("keras_hub")
    model = keras_hub.models.GPT2Backbone(
        vocabulary_size=12,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=6,
    )
    ids = np.random.default_rng(0).integers(0, 12, (2, 5))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    keras_lora.apply_lora(model, rank=2, target="all-linear")
    for seed, variable in enumerate(model.trainable_variables):
        fill(variable, seed, 0.3)
    expected = model.predict(inputs, verbose=0)
    keras_lora.save_adapter(model, tmp_path, names="transformers")
    keras_lora.remove_lora(model)
    bank = keras_lora.AdapterBank(model, {"it": tmp_path}, names="transformers")
    outputs = bank.predict(
        {"inputs": inputs, "adapter": bank.ids(["it", None])}, verbose=0
    )
    bank.release()
    assert_close(outputs[:1], expected[:1])
    assert_close(outputs[1:], model.predict(inputs, verbose=0)[1:])
