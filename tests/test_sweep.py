"""sweep: many settings of an adapter in one fit."""

import keras
import numpy as np
import pytest
from pretrained import sequential
from shared import assert_close

import keras_lora

SETTINGS = {
    "slow": {"rank": 2, "learning_rate": 1e-3, "also_train": ["head"]},
    "fast": {"rank": 3, "alpha": 6, "learning_rate": 3e-2, "use_dora": True},
    "wild": {"rank": 1, "learning_rate": 1e20, "target": ["first"]},
}


def data(count=40):
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 6)).astype("float32")
    return x, np.tanh(x[:, :3])


def swept(model, x, y, **more):
    arguments = {"epochs": 3, "batch_size": 8, "loss": "mse", "verbose": 0}
    return keras_lora.sweep(model, (x, y), SETTINGS, **arguments | more)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow")
def test_the_best_setting_is_found_and_the_model_left_alone(tmp_path):
    model, (x, y) = sequential(), data()
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    optimizer, state = model.optimizer, [np.array(v) for v in model.optimizer.variables]
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    flags = [v.trainable for v in model.variables]
    result = swept(model, x, y, loss=None)
    assert model.optimizer is optimizer
    for variable, value in zip(optimizer.variables, state, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    assert [v.trainable for v in model.variables] == flags
    assert type(model.get_layer("first")) is keras.layers.Dense
    assert [row.name for row in result][-1] == "wild"
    assert result.best.name == "fast" and len(result.best.losses) == 3
    assert result.best.loss < result[1].losses[0]
    assert result.adapter == result.adapters["fast"]
    assert "wild" in str(result) and "<td>0.03</td>" in result._repr_html_()
    result.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    # The loss is that of the model with the adapter, on the last fifth.
    for name in ("slow", "fast"):
        keras_lora.load_adapter(model, result.adapters[name])
        outputs = model.predict(x[32:], verbose=0)
        loss = next(row.loss for row in result if row.name == name)
        assert_close(np.array(loss), np.mean((outputs - y[32:]) ** 2))
        keras_lora.remove_lora(model)


def test_a_setting_trains_as_it_does_alone():
    model, (x, y) = sequential(), data(16)
    result = keras_lora.sweep(
        model,
        (x, y),
        [{"rank": 2, "learning_rate": 0.1}, {"rank": 2, "learning_rate": 0.01}],
        validation_data=(x, y),
        loss="mse",
        optimizer="sgd",
        batch_size=16,
        epochs=2,
        verbose=0,
    )
    names = {row.settings["learning_rate"]: row.name for row in result}
    assert sorted(names.values()) == ["1", "2"]
    for rate, name in names.items():
        adapter = result.adapters[name]
        # A's gradient is zero in the first step, as B is: A there is the start's.
        keras_lora.load_adapter(model, adapter)
        model.compile(keras.optimizers.SGD(rate), "mse")
        assert_close(model.evaluate(x, y, verbose=0), losses(result, name)[-1])
        keras_lora.remove_lora(model)
    assert losses(result, names[0.1])[-1] < losses(result, names[0.01])[-1]


def losses(result, name):
    return next(np.array(row.losses) for row in result if row.name == name)


def test_what_is_wrong_is_refused_and_the_model_left_alone():
    model, (x, y) = sequential(), data()
    for settings in ([], "rank=3", [3], [{"rank": 2, "dry_run": True}]):
        with pytest.raises(ValueError, match=r"settings|A setting"):
            keras_lora.sweep(model, (x, y), settings, loss="mse")
    with pytest.raises(ValueError, match=r"no `lr`; the keyword here is `learning_r"):
        keras_lora.sweep(model, (x, y), [{"lr": 0.1}], loss="mse")
    for call in (
        lambda: keras_lora.sweep(model, (x, y), SETTINGS, loss="mse", lr=0.1),
        lambda: keras_lora.apply_lora(model, learning_rate=0.1),
    ):
        with pytest.raises(ValueError, match="`learning_rate` of the optimizer, or"):
            call()
    for rate in ("1e-3", None, [0.1], True, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"`learning_rate` must be a finite"):
            keras_lora.sweep(model, (x, y), [{"learning_rate": rate}], loss="mse")
    with pytest.raises(ValueError, match="not compiled"):
        keras_lora.sweep(model, (x, y), SETTINGS)
    for wrong in (x, (x,), (x, y[:3])):
        with pytest.raises(ValueError, match="`data`"):
            keras_lora.sweep(model, wrong, SETTINGS, loss="mse")
    with pytest.raises(ValueError, match="too few"):
        keras_lora.sweep(model, (x[:4], y[:4]), SETTINGS, loss="mse")
    with pytest.raises(ValueError, match="alpha"):
        keras_lora.sweep(model, (x, y), [{"alpha": -1}], loss="mse")
    optimizer = keras.optimizers.Adam()
    optimizer.build([keras.Variable(1.0)])
    with pytest.raises(ValueError, match="is built"):
        keras_lora.sweep(model, (x, y), SETTINGS, loss="mse", optimizer=optimizer)
    with pytest.raises(ValueError, match="one number for the whole batch"):
        swept(model, x, y, loss=lambda y, outputs: keras.ops.mean(y - outputs))
    assert type(model.get_layer("first")) is keras.layers.Dense
    keras_lora.apply_lora(model)
    with pytest.raises(ValueError, match="has an adapter"):
        swept(model, x, y)
