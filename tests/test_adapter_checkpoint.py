"""AdapterCheckpoint writes what the model had at that epoch, and the best if asked."""

import keras
import numpy as np
import pytest
from models import x, y
from pretrained import sequential
from shared import EAGERLY, adapt, compile_, predict, same_base

import keras_lora


def compile_eagerly(model):
    model.compile(keras.optimizers.Adam(0.02), "mse", **EAGERLY)


class Remember(keras.callbacks.Callback):
    """The outputs at the end of every epoch."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def on_epoch_end(self, epoch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.outputs.append(keras.ops.convert_to_numpy(self.model(x())))


class Worse(keras.callbacks.Callback):
    """Makes the monitored value best in the second epoch of three."""

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = [0.5, 0.9, 0.7][epoch]


@pytest.mark.parametrize(
    "options, epoch",
    [
        ({}, 2),
        ({"save_best_only": True, "monitor": "score", "mode": "max"}, 1),
        ({"save_best_only": True, "monitor": "score"}, 0),
    ],
)
def test_writes_the_adapter_of_the_epoch(options, epoch, tmp_path):
    model, _ = adapt(sequential)
    compile_eagerly(model)
    remember = Remember()
    checkpoint = keras_lora.AdapterCheckpoint(tmp_path / "adapter", **options)
    model.fit(x(), y(), epochs=3, verbose=0, callbacks=[Worse(), remember, checkpoint])
    plain = same_base(model, sequential)
    keras_lora.load_adapter(plain, tmp_path / "adapter")
    expected = remember.outputs[epoch]
    np.testing.assert_allclose(predict(plain), expected, rtol=0, atol=1e-5)
    others = [outputs for n, outputs in enumerate(remember.outputs) if n != epoch]
    assert all(np.abs(outputs - expected).max() > 1e-4 for outputs in others)


class Instead(keras.callbacks.Callback):
    """Values of a metric, whatever it was."""

    def __init__(self, name, values):
        super().__init__()
        self.name, self.values = name, values

    def on_epoch_end(self, epoch, logs=None):
        logs[self.name] = self.values[epoch]


METRICS = [
    keras.metrics.R2Score(name="fit"),
    keras.metrics.CosineSimilarity(name="angle"),
    keras.metrics.F1Score(name="f1"),
    keras.metrics.MeanAbsoluteError(name="precision_lost"),
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@pytest.mark.parametrize("values", [[0.5, 0.9, 0.2], [0.5, 0.2, 0.9]])
def test_auto_is_what_keras_takes_it_for(metric, values, tmp_path, monkeypatch):
    """Its EarlyStopping goes back to the epoch that it takes for the best."""
    model, _ = adapt(sequential)
    model.compile("sgd", "mse", metrics=[metric], **EAGERLY)
    written = []
    monkeypatch.setattr(
        "keras_lora.files.save.save_adapter", lambda *a, **k: written.append(a)
    )
    checkpoint = keras_lora.AdapterCheckpoint(tmp_path, True, metric.name)
    stop = keras.callbacks.EarlyStopping(metric.name, patience=9)
    callbacks = [Instead(metric.name, values), checkpoint, stop]
    for _ in range(2):  # what was best stays so in another fit
        model.fit(x(), y(), epochs=3, verbose=0, callbacks=callbacks)
    rises = stop.best == 0.9
    assert checkpoint.best == stop.best
    assert len(written) == 2
    assert rises == (metric.name != "precision_lost")


@pytest.mark.parametrize("name, best", [("my_accuracy", 0.9), ("my_cost", 0.2)])
def test_the_name_tells_of_a_value_that_is_no_metric(name, best, tmp_path):
    model, _ = adapt(sequential)
    compile_eagerly(model)
    checkpoint = keras_lora.AdapterCheckpoint(tmp_path / "adapter", True, name)
    callbacks = [Instead(name, [0.5, 0.9, 0.2]), checkpoint]
    model.fit(x(), y(), epochs=3, verbose=0, callbacks=callbacks)
    assert checkpoint.best == best


@pytest.mark.parametrize("mode", ["min", "max", "auto"])
def test_what_is_no_number_is_never_best(mode, tmp_path):
    model, _ = adapt(sequential)
    compile_eagerly(model)
    values = [float("nan"), 0.5, float("nan")]
    remember = Remember()
    checkpoint = keras_lora.AdapterCheckpoint(
        tmp_path / "adapter", save_best_only=True, monitor="loss", mode=mode
    )
    callbacks = [Instead("loss", values), remember, checkpoint]
    model.fit(x(), y(), epochs=3, verbose=0, callbacks=callbacks)
    plain = same_base(model, sequential)
    keras_lora.load_adapter(plain, tmp_path / "adapter")
    np.testing.assert_allclose(predict(plain), remember.outputs[1], rtol=0, atol=1e-5)


def test_an_adapter_that_is_saved_after_a_step_is_that_of_the_step(tmp_path):
    """On JAX the state lies outside of the model then."""
    model, _ = adapt(sequential)
    compile_(model)
    step = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: keras_lora.save_adapter(
            model, tmp_path / str(batch)
        )
    )
    keras_lora.save_adapter(model, tmp_path / "start")
    model.fit(x(), y(), batch_size=8, verbose=0, callbacks=[step])
    keras_lora.save_adapter(model, tmp_path / "end")
    start, first, last, end = (
        keras_lora.Adapter.read(tmp_path / name) for name in ("start", "0", "1", "end")
    )
    assert start != first
    assert first != last
    assert last == end


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="mode='best'"):
        keras_lora.AdapterCheckpoint(tmp_path, mode="best")
    model, _ = adapt(sequential)
    compile_eagerly(model)
    checkpoint = keras_lora.AdapterCheckpoint(tmp_path / "x", save_best_only=True)
    with pytest.raises(ValueError, match="'val_loss' is not in the logs"):
        model.fit(x(), y(), verbose=0, callbacks=[checkpoint])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("best", [False, True])
def test_epoch_and_metrics_in_the_path_are_those_of_keras(best, tmp_path, capsys):
    model, _ = adapt(sequential)
    compile_eagerly(model)
    place = "{epoch:02d}-{score:.1f}"
    options = {"monitor": "score", "mode": "max", "save_best_only": best, "verbose": 1}
    theirs = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "theirs" / f"{place}.weights.h5"),
        save_weights_only=True,
        **options,
    )
    ours = keras_lora.AdapterCheckpoint(tmp_path / "ours" / place, **options)
    remember = Remember()
    callbacks = [Worse(), remember, theirs, ours]
    model.fit(x(), y(), epochs=3, verbose=0, callbacks=callbacks)
    folders = sorted(path.name for path in (tmp_path / "ours").iterdir())
    written = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert [f"{folder}.weights.h5" for folder in folders] == written
    assert folders == ["01-0.5", "02-0.9"] + ([] if best else ["03-0.7"])
    printed = capsys.readouterr().out
    for folder in folders:
        assert f"adapter saved to {tmp_path / 'ours' / folder}\n" in printed
    assert ("\nEpoch 3: score did not improve from 0.9\n" in printed) == best
    assert ("score improved from 0.5 to 0.9, adapter" in printed) == best
    plain = same_base(model, sequential)
    for epoch, folder in enumerate(folders):
        keras_lora.load_adapter(plain, tmp_path / "ours" / folder)
        expected = remember.outputs[epoch]
        np.testing.assert_allclose(predict(plain), expected, rtol=0, atol=1e-5)


def test_a_path_that_asks_for_no_log_writes_nothing(tmp_path, capsys):
    with pytest.raises(ValueError, match="`directory` is not a valid format"):
        keras_lora.AdapterCheckpoint("{epoch")
    model, _ = adapt(sequential)
    compile_eagerly(model)
    for place in ("{los}", "{}", "{loss:d}", "{epoch.x}"):
        checkpoint = keras_lora.AdapterCheckpoint(tmp_path / "new" / place)
        with pytest.raises(ValueError, match=r"Possible are \['epoch', 'loss'\]"):
            model.fit(x(), y(), verbose=0, callbacks=[checkpoint])
    assert not (tmp_path / "new").exists()
    checkpoint = keras_lora.AdapterCheckpoint(tmp_path / "{{run}}")
    model.fit(x(), y(), verbose=0, callbacks=[checkpoint])
    assert [path.name for path in tmp_path.iterdir()] == ["{run}"]
    assert capsys.readouterr().out == ""
