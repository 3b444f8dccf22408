"""bank.fit: each adapter goes the way that it goes alone with its rows."""

import keras
import numpy as np
import pytest
from layer_cases import slow_but
from seeds import set_seed
from shared import EAGERLY, assert_close

import keras_lora
from keras_lora import AdapterBank
from keras_lora.files.save import adapter_of

BACKEND = keras.backend.backend()
SETTINGS = {"a": {"rank": 2, "alpha": 3}, "b": {"rank": 3, "use_rslora": True}}
# The adapters of each batch's rows: in the second one "b" has none.
BATCHES = [["a", "b", None, "b", "a", "a"], ["a", None, "a", "a", None, "a"]]
BATCHES += [["b", "b", "a", None, "b", "b"]]
NAMES = [name for batch in BATCHES for name in batch]


def network(head=3, **arguments):
    set_seed(1)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", name="first", **arguments),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(5, "tanh", name="second", **arguments),
            keras.layers.Dense(head, name="head"),
        ]
    )


def data(head=3):
    random = np.random.default_rng(0)
    x = random.normal(size=(len(NAMES), 6)).astype("float32")
    return x, random.normal(size=(len(NAMES), head)).astype("float32")


def adapters_for(make, settings=SETTINGS, **more):
    """Adapters with values of their own in all that trains."""
    found = {}
    for seed, (name, own) in enumerate(settings.items()):
        model = make()
        keras_lora.apply_lora(model, target=["first", "second"], **own, **more)
        random = np.random.default_rng(seed)
        for variable in model.trainable_variables:
            variable.assign(variable + random.normal(0, 0.2, variable.shape))
        found[name] = adapter_of(model)
    return found


def alone(make, adapter, name, optimizer, loss, x, y, weights=None, epochs=1):
    """What an adapter is after its own rows of each batch."""
    model = make()
    keras_lora.load_adapter(model, adapter)
    model.compile(optimizer, loss, **EAGERLY)
    for _ in range(epochs):
        for start in range(0, len(NAMES), 6):
            names = NAMES[start : start + 6]
            rows = [start + place for place, own in enumerate(names) if own == name]
            if rows:
                own = None if weights is None else weights[rows]
                model.train_on_batch(x[rows], y[rows], sample_weight=own)
    return adapter_of(model)


def assert_same_adapter(found, expected, tolerance=1e-5):
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    for key, value in expected.tensors.items():
        assert_close(found.tensors[key], value, tolerance)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw, clipped": lambda: keras.optimizers.AdamW(
        0.05, weight_decay=0.1, clipnorm=0.5
    ),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    ),
    "average": lambda: keras.optimizers.Adam(
        0.05, use_ema=True, ema_overwrite_frequency=1
    ),
    "accumulated": lambda: keras.optimizers.Adam(0.05, gradient_accumulation_steps=2),
}


def how(name):
    """One optimizer and one loss are traced, which takes as long as ten steps."""
    return {} if name in ("adamw, clipped", "weighted") else EAGERLY


@pytest.mark.parametrize(
    "name", slow_but(("sgd", "adamw, clipped", "accumulated"), OPTIMIZERS)
)
def test_each_adapter_goes_its_own_way(name):
    x, y = data()
    adapters = adapters_for(network)
    bank = AdapterBank(network(), {**adapters, "idle": adapters["a"]})
    bank.compile(OPTIMIZERS[name](), "mse", **how(name))
    inputs = {"inputs": x, "adapter": bank.ids(NAMES)}
    bank.fit(inputs, y, batch_size=6, epochs=2, shuffle=False, verbose=0)
    for each, adapter in adapters.items():
        expected = alone(
            network, adapter, each, OPTIMIZERS[name](), "mse", x, y, epochs=2
        )
        assert_same_adapter(bank.adapter(each), expected)
        model = network()
        keras_lora.load_adapter(model, expected)
        rows = bank({"inputs": x, "adapter": bank.ids([each] * len(x))})
        assert_close(rows, model(x))
    assert bank.adapter("idle") == adapters["a"]


def test_all_else_stays_to_the_bit():
    x, y = data()
    adapters = adapters_for(network)
    model = network()
    variables = model.variables  # without the bank's, which JAX lists among them
    before = [keras.ops.convert_to_numpy(v) for v in variables]
    flags = [v.trainable for v in variables]
    bank = AdapterBank(model, {**adapters, "idle": adapters["a"]})
    bank.compile("adam", "mse")
    idle = {"inputs": x, "adapter": bank.ids(["idle", None] * (len(x) // 2))}
    outputs = bank.predict(idle, verbose=0)
    bank.fit({"inputs": x, "adapter": bank.ids(NAMES)}, y, epochs=2, verbose=0)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    assert [v.trainable for v in variables] == flags
    np.testing.assert_array_equal(bank.predict(idle, verbose=0), outputs)
    assert bank.adapter("idle") == adapters["a"]


def test_an_adapter_without_rows_takes_no_step():
    x, y = data()
    adapters = adapters_for(network)
    bank = AdapterBank(network(), adapters)
    bank.compile(keras.optimizers.Adam(0.1, weight_decay=0.1), "mse")
    bank.train_on_batch({"inputs": x, "adapter": bank.ids(NAMES)}, y)
    before = bank.adapter("b")
    assert before != adapters["b"]
    for _ in range(2):  # momenta would go on moving it
        bank.train_on_batch({"inputs": x, "adapter": bank.ids(["a"] * len(x))}, y)
    assert bank.adapter("b") == before


def test_dora_bias_and_head_are_each_adapters_own():
    def with_head(settings, **more):
        return adapters_for(network, settings, also_train=["head"], **more)

    x, y = data()
    adapters = {
        "a": with_head({"a": SETTINGS["a"]}, bias="lora_only")["a"],
        "b": with_head({"b": SETTINGS["b"]}, use_dora=True)["b"],
    }
    bank = AdapterBank(network(), adapters)
    optimizer = OPTIMIZERS["adamw, clipped"]
    bank.compile(optimizer(), "mse", **EAGERLY)
    inputs = {"inputs": x, "adapter": bank.ids(NAMES)}
    bank.fit(inputs, y, batch_size=6, epochs=2, shuffle=False, verbose=0)
    for each, adapter in adapters.items():
        expected = alone(network, adapter, each, optimizer(), "mse", x, y, epochs=2)
        assert_same_adapter(bank.adapter(each), expected)


LOSSES = {
    "weighted": lambda: keras.losses.MeanSquaredError(),
    "sum": lambda: keras.losses.MeanAbsoluteError(reduction="sum"),
    "mean_with_sample_weight": lambda: keras.losses.MeanSquaredError(
        reduction="mean_with_sample_weight"
    ),
    "a function": lambda: lambda y, outputs: keras.ops.mean((y - outputs) ** 4, -1),
    "its name": lambda: "mae",
}


@pytest.mark.parametrize(
    "name", slow_but(("weighted", "mean_with_sample_weight", "its name"), LOSSES)
)
def test_a_loss_is_that_of_an_adapters_own_rows(name):
    x, y = data()
    weights = np.random.default_rng(3).uniform(0.1, 2, len(x)).astype("float32")
    adapters = adapters_for(network)
    bank = AdapterBank(network(), adapters)
    bank.compile(keras.optimizers.SGD(0.05), LOSSES[name](), **how(name))
    inputs = {"inputs": x, "adapter": bank.ids(NAMES)}
    arguments = {"sample_weight": weights, "batch_size": 6, "shuffle": False}
    bank.fit(inputs, y, **arguments, verbose=0)
    for each, adapter in adapters.items():
        optimizer = keras.optimizers.SGD(0.05)
        expected = alone(
            network, adapter, each, optimizer, LOSSES[name](), x, y, weights
        )
        assert_same_adapter(bank.adapter(each), expected)


def token_network():
    set_seed(1)
    ids = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(9, 6, mask_zero=True, name="first")(ids)
    x = keras.layers.Dense(6, name="second")(x)
    return keras.Model(ids, keras.layers.Dense(4, name="head")(x))


def test_masked_parts_do_not_count():
    random = np.random.default_rng(0)
    x = random.integers(1, 9, (len(NAMES), 5)).astype("int32")
    x[np.arange(5) >= random.integers(1, 6, (len(x), 1))] = 0
    y = random.integers(0, 4, (len(NAMES), 5))
    adapters = adapters_for(token_network)
    bank = AdapterBank(token_network(), adapters)

    def loss():
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    bank.compile(keras.optimizers.SGD(0.5), loss())
    inputs = {"inputs": x, "adapter": bank.ids(NAMES)}
    bank.fit(inputs, y, batch_size=6, shuffle=False, verbose=0)
    for each, adapter in adapters.items():
        optimizer = keras.optimizers.SGD(0.5)
        expected = alone(token_network, adapter, each, optimizer, loss(), x, y)
        assert_same_adapter(bank.adapter(each), expected)


def test_optimizers_by_name_and_a_rate_for_all():
    x, y = data()
    adapters = adapters_for(network)
    rates = {"a": 0.3, "b": 0.01}
    bank = AdapterBank(network(), adapters)
    bank.compile({k: keras.optimizers.SGD(rate) for k, rate in rates.items()}, "mse")
    inputs = {"inputs": x, "adapter": bank.ids(NAMES)}
    arguments = {"batch_size": 6, "shuffle": False, "verbose": 0}
    bank.fit(inputs, y, **arguments)
    for each, adapter in adapters.items():
        optimizer = keras.optimizers.SGD(rates[each])
        expected = alone(network, adapter, each, optimizer, "mse", x, y)
        assert_same_adapter(bank.adapter(each), expected)
    before = bank.adapter("a")
    stop = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.0)
    bank.fit(inputs, y, callbacks=[stop], **arguments)
    assert_same_adapter(bank.adapter("a"), before, 1e-7)


def test_another_fit_goes_on_and_a_callback_sees_what_was_trained():
    x, y = data()
    adapters = adapters_for(network)
    seen = []
    make = OPTIMIZERS["adamw, clipped"]
    bank = AdapterBank(network(), adapters)
    bank.compile(make(), "mse")
    inputs = {"inputs": x, "adapter": bank.ids(NAMES)}
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(bank.adapter("a"))
    )
    arguments = {"batch_size": 6, "shuffle": False, "verbose": 0}
    history = bank.fit(
        inputs, y, callbacks=look, validation_data=(inputs, y), **arguments
    )
    outputs = bank.predict(inputs, verbose=0)
    rows = {own: np.flatnonzero(np.array(NAMES) == own) for own in adapters}
    expected = sum(np.mean((outputs[at] - y[at]) ** 2) for at in rows.values())
    loss = bank.evaluate(inputs, y, batch_size=len(x), verbose=0)
    assert_close(np.array(loss), np.array(expected))
    assert "val_loss" in history.history
    assert seen[0] == bank.adapter("a")
    rows = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: rows.append(bank.predict(inputs, verbose=0))
    )
    bank.fit(inputs, y, callbacks=[look], **arguments)
    np.testing.assert_array_equal(rows[0], bank.predict(inputs, verbose=0))
    expected = alone(network, adapters["a"], "a", make(), "mse", x, y, epochs=2)
    assert_same_adapter(bank.adapter("a"), expected)


def test_a_folder_that_changed_is_not_trained(tmp_path):
    adapters = adapters_for(network)
    adapters["a"].save(tmp_path / "a")
    bank = AdapterBank(network(), {"a": tmp_path / "a"})
    assert bank.adapter("a") == adapters["a"]
    adapters["b"].save(tmp_path / "a")
    with pytest.raises(ValueError, match="a different adapter than when"):
        bank.adapter("a")


def test_what_cannot_be_trained_apart_is_refused():
    x, y = data()
    adapters = adapters_for(network)
    bank = AdapterBank(network(), adapters)
    inputs = {"inputs": x, "adapter": bank.ids(NAMES)}
    with pytest.raises(ValueError, match=r"bank\.compile"):
        bank.fit(inputs, y)
    with pytest.raises(ValueError, match="without a loss scale"):
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
        bank.compile(scaled, "mse")
    with pytest.raises(ValueError, match="reduction='none'"):
        bank.compile("sgd", keras.losses.MeanSquaredError(reduction="none"))
    bank.compile("sgd", lambda y, outputs: keras.ops.mean((y - outputs) ** 2))
    with pytest.raises(ValueError, match="one number for the whole batch"):
        bank.fit(inputs, y, verbose=0)
    bank = AdapterBank(network(), adapters)
    bank.compile({"a": "sgd"}, "mse")
    with pytest.raises(ValueError, match=r"optimizers for \['a'\], but with none"):
        bank.fit(inputs, y)
    bank.compile("sgd", "mse")
    with pytest.raises(ValueError, match="No row names an adapter"):
        bank.fit({"inputs": x, "adapter": bank.ids([None] * len(x))}, y)
    with pytest.raises(ValueError, match="ids of no adapter"):
        bank.fit({"inputs": x, "adapter": np.full(len(x), 77)}, y)
    with pytest.raises(ValueError, match="has no adapter"):
        bank.adapter("c")
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match="trains in `fit` and `train_on_batch`"):
            bank.train_step((inputs, y))
    norm = adapters_for(network, {"a": {"rank": 2}}, also_train=["norm"])["a"]
    for key in [key for key in norm.tensors if key.startswith("norm.")]:
        value = norm.tensors[key]  # it trains, and is still the base model's
        norm.tensors[key] = np.full_like(value, key.endswith(("weight", "var")))
    bank = AdapterBank(network(), {"a": norm})
    bank.compile("sgd", "mse")
    with pytest.raises(ValueError, match="'gamma' of 'norm', a BatchNorm"):
        bank.fit({"inputs": x, "adapter": bank.ids(["a"] * len(x))}, y)
    bank = AdapterBank(network(activity_regularizer="l2"), adapters)
    bank.compile("sgd", "mse")
    with pytest.raises(ValueError, match="activity regularizer"):
        bank.fit(inputs, y)


def test_dropout_is_each_adapters_own():
    x, y = np.ones((400, 6), "float32"), np.zeros((400, 8), "float32")

    def make():
        set_seed(1)
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, name="only")])

    adapters = {}
    for name, dropout in (("none", 0.0), ("half", 0.5)):
        model = make()
        keras_lora.apply_lora(model, target="only", rank=1, dropout=dropout)
        factors = model.get_layer("only").lora
        factors.a.assign(np.ones(factors.a.shape))
        factors.b.assign(np.ones(factors.b.shape))
        adapters[name] = adapter_of(model)
    bank = AdapterBank(make(), adapters)
    bank.compile(keras.optimizers.SGD(0.0), "mse")
    inputs = {"inputs": x, "adapter": bank.ids(["none", "half"] * 200)}
    bank.fit(inputs, y, batch_size=400, verbose=0)
    base = make()(x)
    outputs = bank(inputs, training=True) - base
    outputs = keras.ops.convert_to_numpy(outputs)
    assert_close(outputs[::2], np.full((200, 8), 6.0))
    dropped = outputs[1::2, 0]
    steps = np.round(dropped / 2)
    assert_close(dropped, steps * 2)  # of six ones each is 0 or 2
    assert set(steps) <= set(range(7)) and len(set(steps)) > 3
    assert abs(np.mean(dropped) - 6) < 0.6
    assert bank.adapter("half").config["lora_dropout"] == 0.5
    dora = make()
    keras_lora.apply_lora(dora, target="only", rank=1, dropout=0.5, use_dora=True)
    bank = AdapterBank(make(), {"dora": adapter_of(dora)})
    bank.compile("sgd", "mse")
    with pytest.raises(ValueError, match="DoRA with dropout"):
        bank.fit({"inputs": x, "adapter": bank.ids(["dora"] * 400)}, y)


def test_adapters_with_a_start_that_is_subtracted_are_one_of_many(tmp_path):
    x, y = data()
    adapters = {}
    for name, (method, rank, rslora) in {
        "a": ("pissa", 2, True),
        "b": ("orthogonal", 4, False),
    }.items():
        model = network()
        keras_lora.apply_lora(
            model,
            target=["first", "second"],
            rank=rank,
            alpha=3,
            use_rslora=rslora,
        )
        keras_lora.initialize_lora(model, method)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.train_on_batch(x, y)
        keras_lora.save_adapter(model, tmp_path / name)
        adapters[name] = tmp_path / name
    bank = AdapterBank(network(), adapters)
    assert bank.max_rank == 8
    for name in adapters:
        model = network()
        keras_lora.load_adapter(model, adapters[name])
        ids = bank.ids([name] * len(x))
        rows = bank.predict({"inputs": x, "adapter": ids}, verbose=0)
        assert_close(rows, model.predict(x, verbose=0))
    bank.compile(keras.optimizers.SGD(0.1), "mse")
    inputs = {"inputs": x, "adapter": bank.ids(NAMES)}
    bank.fit(inputs, y, batch_size=6, shuffle=False, verbose=0)
    for name, adapter in adapters.items():
        expected = alone(network, adapter, name, keras.optimizers.SGD(0.1), "mse", x, y)
        assert_same_adapter(bank.adapter(name), expected)
    with pytest.raises(ValueError, match="Create the bank with max_rank=4"):
        AdapterBank(network(), {"a": adapters["a"]}, max_rank=2)
