"""A call of a bank keeps the adapters that it began with, whatever is added."""

import itertools
import os
import threading

import keras
import numpy as np
import pytest
from layer_cases import fill, to_numpy
from seeds import set_seed
from shared import EAGERLY, assert_close

import keras_lora
from keras_lora import AdapterBank
from keras_lora.files.save import adapter_of
from keras_lora.serving import calls

BACKEND = keras.backend.backend()
ROWS = ["a", None, "b", "b", "a"]
VERSIONS = ["old", "new"]


class Pauses(keras.layers.Layer):
    """Stands for the many layers of a large model: changes come while it runs."""

    pause = None

    def call(self, inputs):
        if self.pause is not None:
            self.pause()
        return inputs


def network():
    set_seed(1)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, "tanh", name="first")(inputs)
    hidden = Pauses(name="middle")(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden))


def x(rows=5):
    return np.random.default_rng(1).standard_normal((rows, 6), "float32")


def tuned(model):
    """Adapters "a" and "b" in two versions each, and outputs: (name, version) ->."""
    adapters, expected = {}, {}
    for seed, key in enumerate(itertools.product("ab", VERSIONS)):
        report = keras_lora.apply_lora(model, rank=2, target=["first", "head"])
        for place, row in enumerate(report):
            fill(row.layer.lora.b, 20 * seed + place, 1.0)
        adapters[key], expected[key] = adapter_of(model), to_numpy(model(x()))
        keras_lora.remove_lora(model)
    for version in VERSIONS:
        expected[None, version] = to_numpy(model(x()))
    return adapters, expected


@pytest.fixture
def served():
    model = network()
    adapters, expected = tuned(model)
    old = {name: adapters[name, "old"] for name in "ab"}
    bank = AdapterBank(model, old)  # full

    def outputs(names, version):
        wanted = [expected[name, version][i] for i, name in enumerate(names)]
        return np.stack(wanted)

    def refresh(times=1):
        for version in ["new", *VERSIONS * times, "new"]:
            for name in "ab":
                bank.add(name, adapters[name, version])

    return bank, outputs, refresh, adapters


def changed_inside(run, change, pausing):
    """What `run` returns in a thread of its own if `change` comes during it.

    pausing: A function of what to do in the middle of the run.
    """
    inside, go, found = threading.Event(), threading.Event(), []

    def pause():
        inside.set()
        assert go.wait(60)

    pausing(pause)
    runner = threading.Thread(target=lambda: found.append(run()))
    runner.start()
    assert inside.wait(60)
    pausing(None)
    changer = threading.Thread(target=change)
    changer.start()
    changer.join(1)  # it may have to wait for the run
    go.set()
    for thread in (runner, changer):
        thread.join(60)
        assert not thread.is_alive()
    return found[0]


def in_call(bank):
    def pausing(pause):
        bank.model.get_layer("middle").pause = pause

    return pausing


class AfterFirstBatch(keras.callbacks.Callback):
    pause = None

    def on_predict_batch_end(self, batch, logs=None):
        if self.pause is not None:
            self.pause()

    on_test_batch_end = on_predict_batch_end


def dataset(data):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data).batch(2)


def generator(data):
    batches = range(0, 5, 2)
    return (({k: v[at : at + 2] for k, v in data.items()},) for at in batches)


class Sequence(keras.utils.PyDataset):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 3

    def __getitem__(self, at):
        return {k: v[2 * at : 2 * at + 2] for k, v in self.data.items()}


def test_a_call_of_the_bank_keeps_its_adapters(served):
    bank, outputs, refresh, _ = served
    data = {"inputs": x(), "adapter": bank.ids(ROWS)}
    run = lambda: to_numpy(bank(data))  # noqa: E731
    found = changed_inside(run, refresh, in_call(bank))
    assert_close(found, outputs(ROWS, "old"))
    assert_close(run(), outputs(ROWS, "new"))


@pytest.mark.parametrize("given", [dict, dataset, generator, Sequence])
def test_all_batches_of_a_prediction_keep_their_adapters(served, given):
    bank, outputs, refresh, _ = served
    callback = AfterFirstBatch()

    def run():
        data = given({"inputs": x(), "adapter": bank.ids(ROWS)})
        options = {dict: {"batch_size": 2}, generator: {"steps": 3}}.get(given, {})
        return bank.predict(data, callbacks=[callback], verbose=0, **options)

    pausing = lambda pause: setattr(callback, "pause", pause)  # noqa: E731
    found = changed_inside(run, refresh, pausing)
    assert_close(found, outputs(ROWS, "old"))
    assert_close(run(), outputs(ROWS, "new"))


def test_an_evaluation_keeps_its_adapters(served):
    bank, outputs, refresh, _ = served
    bank.compile(loss="mse", jit_compile=False)
    data, callback = {"inputs": x(), "adapter": bank.ids(ROWS)}, AfterFirstBatch()

    def run():
        targets = outputs(ROWS, "old")
        options = {"batch_size": 2, "callbacks": [callback], "verbose": 0}
        return bank.evaluate(data, targets, **options)

    pausing = lambda pause: setattr(callback, "pause", pause)  # noqa: E731
    assert changed_inside(run, refresh, pausing) < 1e-8
    assert run() > 0.1


def around(model):
    """Another model that holds the layers."""
    return keras.Model(model.input, model.output)


@pytest.mark.parametrize("before", [True, False], ids=["before", "since"])
@pytest.mark.parametrize("inside_rows", [False, True])
@pytest.mark.parametrize("way", ["call", "predict"])
def test_a_call_of_the_model_keeps_its_adapters(served, way, inside_rows, before):
    bank, outputs, refresh, _ = served
    outer = bank.model
    if not before:  # is it known in the bank?
        outer = around(bank.model)
        outer(x())
    callback, names = AfterFirstBatch(), ROWS[:2] if way == "predict" else ROWS
    if not inside_rows:
        names = ["a"] * 5
        bank.activate("a")

    def run():
        if way == "call":
            return to_numpy(outer(x()))
        rows = x()[:2] if inside_rows else x()
        rows = np.tile(rows, (3, 1))
        options = {"batch_size": len(rows) // 3, "callbacks": [callback], "verbose": 0}
        return outer.predict(rows, **options)[-len(rows) // 3 :]

    def pausing(pause):
        callback.pause = pause
        if way == "call":
            in_call(bank)(pause)

    def check():
        found = changed_inside(run, refresh, pausing)
        assert_close(found, outputs(names, "old"))
        assert_close(run(), outputs(names, "new"))

    if inside_rows:
        with bank.rows(names):
            check()
    else:
        check()


def test_another_name_is_active_from_the_next_call_on(served):
    bank, outputs, _, _ = served
    run = lambda: to_numpy(bank.model(x()))  # noqa: E731
    bank.activate("a")
    change = lambda: bank.activate("b")  # noqa: E731
    found = changed_inside(run, change, in_call(bank))
    assert_close(found, outputs(["a"] * 5, "old"))
    assert_close(run(), outputs(["b"] * 5, "old"))
    found = changed_inside(run, lambda: bank.rows(ROWS).__enter__(), in_call(bank))
    assert_close(found, outputs(["b"] * 5, "old"))


@pytest.mark.skipif(
    BACKEND == "jax" and os.environ.get("JAX_ENABLE_X64") == "1",
    reason="KerasHub's cache mixes integers of 64 and 32 bits there",
)
def test_a_generation_keeps_its_adapters():
    keras_hub = pytest.importorskip("keras_hub")

    class Greedy(keras_hub.samplers.GreedySampler):
        pause = None

        def get_next_token(self, probabilities):
            if self.pause is not None:
                self.pause()
            return super().get_next_token(probabilities)

    sampler = Greedy()
    backbone = keras_hub.models.GPT2Backbone(50, 1, 2, 16, 16, max_sequence_length=12)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    prompt = {
        "token_ids": np.array([[3, 4, 5] + [0] * 9] * 2, "int32"),
        "padding_mask": np.array([[1, 1, 1] + [0] * 9] * 2, "int32"),
    }
    model.compile(sampler=sampler, run_eagerly=True)

    def run():
        return to_numpy(model.generate(prompt, stop_token_ids=None)["token_ids"])

    adapters, expected = {}, {}
    for seed, version in enumerate(VERSIONS):
        report = keras_lora.apply_lora(backbone, rank=2, target=["query", "value"])
        for place, row in enumerate(report):
            fill(row.layer.lora.b, 20 * seed + place, 3.0)
        adapters[version], expected[version] = adapter_of(backbone), run()
        keras_lora.remove_lora(backbone)
    assert not np.array_equal(expected["old"], expected["new"])
    bank = AdapterBank(backbone, {"a": adapters["old"]})
    bank.activate("a")

    def change():
        for version in ("new", "old", "new"):
            bank.add("a", adapters[version])

    def pausing(pause):
        sampler.pause = pause

    np.testing.assert_array_equal(changed_inside(run, change, pausing), expected["old"])
    np.testing.assert_array_equal(run(), expected["new"])


class Does(keras.callbacks.Callback):
    def __init__(self, action):
        super().__init__()
        self.action = action

    def on_predict_batch_end(self, batch, logs=None):
        if batch == 0:
            self.action()


def test_changes_from_inside_a_call_work_or_say_why_not(served):
    bank, outputs, refresh, adapters = served
    data = {"inputs": x(), "adapter": bank.ids(ROWS)}

    def add():
        try:
            bank.add("a", adapters["a", "new"])
        except ValueError as error:
            errors.append(str(error))

    def changes():
        for change in (
            lambda: bank.activate("b"),
            lambda: bank.rows(ROWS).__enter__(),
            bank.release,
        ):
            with pytest.raises(ValueError, match=r"inside a call|cannot change while"):
                change()
        add()

    errors = []
    bank.activate("a")
    options = {"batch_size": 2, "callbacks": [Does(changes)], "verbose": 0}
    assert_close(bank.model.predict(x(), **options), outputs(["a"] * 5, "old"))
    assert len(errors) == (BACKEND == "jax")
    refresh()
    assert_close(bank.model.predict(x(), verbose=0), outputs(["a"] * 5, "new"))
    options["callbacks"] = [Does(lambda: [add() for _ in range(9)])]
    assert_close(bank.predict(data, **options), outputs(ROWS, "new"))
    bank.release()
    for call in (bank, bank.predict, bank.predict_on_batch, bank.evaluate):
        with pytest.raises(ValueError, match="was released"):
            call(data)
    with pytest.raises(ValueError, match="was released"):
        bank.add("a", adapters["a", "new"])
    assert_close(bank.model.predict(x(), verbose=0), outputs([None] * 5, "old"))


def test_a_change_waits_for_calls_and_not_for_ever(served, monkeypatch):
    bank, outputs, _, adapters = served
    monkeypatch.setattr(calls, "PATIENCE", 0.2)
    data = {"inputs": x(), "adapter": bank.ids(["a"] * 5)}
    go, found = threading.Event(), []
    threads = []
    for _ in range(bank.id_table.slot_count):
        inside = threading.Event()
        bank.model.get_layer("middle").pause = lambda own=inside: (
            own.set(),
            go.wait(60),
        )
        run = lambda: found.append(to_numpy(bank(data)))  # noqa: E731
        threads.append(threading.Thread(target=run))
        threads[-1].start()
        assert inside.wait(60)
        try:
            bank.add("a", adapters["a", "old"])
        except ValueError as error:
            assert "has waited 0.2 s for calls" in str(error)
            break
    else:
        raise AssertionError("slots were written that calls read")
    with pytest.raises(ValueError, match=r"bank\.release has waited"):
        bank.release()
    bank.model.get_layer("middle").pause = None
    assert_close(to_numpy(bank(data)), outputs(["a"] * 5, "old"))
    go.set()
    for thread in threads:
        thread.join(60)
    for each in found:
        assert_close(each, outputs(["a"] * 5, "old"))
    bank.add("a", adapters["a", "new"])
    assert_close(to_numpy(bank(data)), outputs(["a"] * 5, "new"))


class Fails(keras.callbacks.Callback):
    def on_predict_batch_end(self, batch, logs=None):
        raise KeyError("batch")

    on_test_batch_end = on_train_batch_end = on_predict_batch_end


def test_an_error_inside_a_loop_costs_no_weights(served):
    """On JAX, Keras takes them out of the variables meanwhile."""
    bank, outputs, _, _ = served
    model = bank.model
    model.compile("sgd", "mse", **EAGERLY)
    bank.compile("sgd", "mse", **EAGERLY)
    y, data = x()[:, :3], {"inputs": x(), "adapter": bank.ids(ROWS)}
    fails = {"callbacks": [Fails()], "batch_size": 2, "verbose": 0}

    def batches():
        yield (data,)
        yield ({**data, "adapter": np.zeros(5, "float32")},)

    def in_rows(call, *args, **kwargs):
        with bank.rows(["a", "b"]):
            call(*args, **kwargs)

    for call in (
        lambda: bank.predict(data, **fails),
        lambda: bank.evaluate(data, y, **fails),
        lambda: bank.fit(data, y, **fails),
        lambda: bank.predict(batches(), steps=2, verbose=0),
        lambda: bank.predict(x(), verbose=0),
        lambda: bank.predict({"inputs": x(), "adapter": x()}, verbose=0),
        lambda: model.predict(x(), **fails),
        lambda: model.fit(x(), y, verbose=0),
        lambda: model.train_on_batch(x(), y),
        lambda: in_rows(model.predict, x(), batch_size=2, verbose=0),
        lambda: in_rows(model.predict, x(), verbose=0),
        lambda: in_rows(model.predict_on_batch, x()),
    ):
        with pytest.raises(Exception):  # noqa: B017  # each backend its own
            call()
        found = model.predict(x(), verbose=0)
        assert_close(found, outputs([None] * 5, "old"))
        base = {"inputs": x(), "adapter": bank.ids([None] * 5)}
        assert_close(bank.predict(base, verbose=0), outputs([None] * 5, "old"))


def test_threads_get_the_old_adapters_or_the_new_ones(served):
    bank, outputs, refresh, _ = served
    data = {"inputs": x(), "adapter": bank.ids(ROWS)}
    bank.activate("a")
    calls = [
        (lambda: to_numpy(bank(data)), ROWS),
        (lambda: bank.predict_on_batch(data), ROWS),
        (lambda: bank.predict(data, verbose=0), ROWS),
        (lambda: to_numpy(bank.model(x())), ["a"] * 5),
        (lambda: bank.model.predict_on_batch(x()), ["a"] * 5),
    ]
    for call, _ in calls:
        call()  # compiled once
    found, stop = [[] for _ in calls], threading.Event()

    def work(place):
        while not stop.is_set() or not found[place]:
            found[place].append(calls[place][0]())

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    refresh(8)
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for place, (_, names) in enumerate(calls):
        old, new = outputs(names, "old"), outputs(names, "new")
        for each in found[place]:
            off = np.minimum(*(np.abs(each - w).max(axis=1) for w in (old, new)))
            assert off.max() < 1e-4
