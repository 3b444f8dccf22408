"""A compiled model stays compiled with the same optimizer, or says so."""

import keras
import numpy as np
import pytest
from layer_cases import slow_but, to_numpy
from models import x, y
from seeds import set_seed
from shared import EAGERLY

import keras_lora


class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Has no get_config, as in TensorFlow's tutorial on transformers."""

    def __call__(self, step):
        return 0.1 / (1 + keras.ops.cast(step, "float32"))


class Own(keras.optimizers.SGD):
    """Other arguments than its configuration has, and a variable of its own."""

    def __init__(self, table, **kwargs):
        super().__init__(momentum=0.5, **kwargs)
        self.table = table
        self.factor = keras.Variable(0.5, trainable=False, name="factor")

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.factor, variable, learning_rate)


def excluding():
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def scaled():
    inner = keras.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=0.1)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)


OPTIMIZERS = {
    "exclusions": excluding,
    "schedule": lambda: keras.optimizers.SGD(Warmup()),
    "callable": lambda: keras.optimizers.SGD(lambda: 0.1),
    "own": lambda: Own({1: 2}, learning_rate=0.1),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "averages": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, gradient_accumulation_steps=2, clipnorm=0.1
    ),
    "loss scale": scaled,
    "loss scale of its own": lambda: keras.optimizers.LossScaleOptimizer(
        Own({1: 2}, learning_rate=0.1), initial_scale=4.0
    ),
}
over_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network():
    set_seed(1)
    layers = [keras.layers.Dense(5, name="a"), keras.layers.Dense(3, name="head")]
    return keras.Sequential([keras.Input((6,)), *layers])


def fit(model, **kwargs):
    model.fit(x(), y(), batch_size=8, shuffle=False, verbose=0, **kwargs)


@pytest.mark.parametrize(
    "name",
    slow_but(OPTIMIZERS.keys() - {"callable", "loss scale", "nadam"}, OPTIMIZERS),
)
def test_an_optimizer_with_state_gets_a_successor_that_does_the_same(name):
    """As a new one does that the user makes and compiles with."""
    make = OPTIMIZERS[name]
    model, by_hand = network(), network()
    how = {"jit_compile": False} if make is excluding else EAGERLY  # one is traced
    model.compile(make(), "mse", **how)
    fit(model)
    old = model.optimizer
    keras_lora.apply_lora(model, rank=2, bias="all")
    keras_lora.apply_lora(by_hand, rank=2, bias="all")
    by_hand.set_weights(model.get_weights())
    by_hand.compile(make(), "mse", **how)
    by_hand.optimizer.build(by_hand.trainable_variables)
    assert type(model.optimizer) is type(by_hand.optimizer)
    assert model.optimizer is not old
    expected = [(v.path, v.shape) for v in by_hand.optimizer.variables]
    found = [(v.path, v.shape) for v in model.optimizer.variables]
    assert [v[1] for v in found] == [v[1] for v in expected]
    for network_ in (model, by_hand):
        fit(network_, epochs=3)
    for one, other in zip(model.weights, by_hand.weights, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-6, atol=0)
    # The old one has nothing in common with it, and is left as it was.
    assert not {id(v) for v in old.variables} & {
        id(v) for v in model.optimizer.variables
    }


@over_optimizers
def test_an_optimizer_without_state_stays_the_users_own_object(make):
    model, optimizer = network(), make()
    model.compile(optimizer, "mse", **EAGERLY)
    keras_lora.apply_lora(model, rank=2)
    assert model.optimizer is optimizer
    fit(model)
    assert model.optimizer is optimizer


def test_an_optimizer_whose_variables_stay_keeps_its_state():
    """Of a model beside it, which shares what is frozen already."""
    shared = keras.layers.Dense(6, name="shared", trainable=False)
    layers = [keras.layers.Dense(5, name="a"), keras.layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input((6,)), shared, *layers])
    beside = keras.Sequential([keras.Input((6,)), shared, keras.layers.Dense(3)])
    beside.compile(keras.optimizers.Adam(0.1), "mse", **EAGERLY)
    fit(beside)
    optimizer = beside.optimizer
    keras_lora.apply_lora(model, rank=2, target=["a"])
    assert beside.optimizer is optimizer
    assert to_numpy(optimizer.iterations)
    fit(beside)


def test_what_is_saved_of_compiling_is_the_optimizer_that_there_is():
    model = network()
    model.compile(keras.optimizers.SGD(0.5), "mse", **EAGERLY)
    fit(model)
    keras_lora.apply_lora(model, rank=2)
    model.optimizer.learning_rate = 0.25
    saved = model.get_compile_config()["optimizer"]["config"]
    assert saved["learning_rate"] == 0.25


def test_exclusions_are_not_remembered_of_variables_that_are_no_more():
    """Keras keeps them by `id`, which Python gives to another variable then."""
    model = network()
    model.compile(excluding(), "mse", **EAGERLY)
    fit(model)
    old = model.optimizer
    keras_lora.apply_lora(model, rank=2)
    new = vars(model.optimizer).get("_exclude_from_weight_decay_cache", {})
    assert new == {}
    assert new is not vars(old).get("_exclude_from_weight_decay_cache")


def test_keras_does_not_warn_of_flags_that_changed_since_compiling():
    model = network()
    model.compile("sgd", "mse")
    warn = getattr(model, "_warn_if_trainable_state_changed", None)
    if warn is None:
        pytest.skip("this Keras has no such warning")
    for change in (CHANGES["apply"], CHANGES["mark"], CHANGES["merge"]):
        change(model)
        warn()
    model.layers[0].trainable = False
    with pytest.warns(UserWarning, match="state has changed"):
        warn()


def test_mixed_precision_is_not_scaled_twice():
    keras.config.set_dtype_policy("mixed_float16")
    for auto in (True, False):
        model, optimizer = network(), keras.optimizers.SGD(0.01, momentum=0.9)
        model.compile(optimizer, "mse", auto_scale_loss=auto, **EAGERLY)
        fit(model)
        keras_lora.apply_lora(model, rank=2)
        fit(model)
        found = model.optimizer
        if auto:
            assert type(found) is keras.optimizers.LossScaleOptimizer
            found = found.inner_optimizer
        assert type(found) is type(optimizer)
        assert found.momentum == 0.9
        saved = model.get_compile_config()["optimizer"]
        assert saved["class_name"] == "SGD"


def test_what_compile_was_told_stays():
    model, metric = network(), keras.metrics.MeanAbsoluteError(name="error")
    steps = 1 if keras.backend.backend() == "torch" else 2  # which has no other
    model.compile("sgd", "mae", metrics=[metric], steps_per_execution=steps)
    fit(model)
    before = model.loss, model.metrics, model.jit_compile, model.steps_per_execution
    keras_lora.apply_lora(model, rank=2)
    after = model.loss, model.metrics, model.jit_compile, model.steps_per_execution
    assert after == before
    assert metric in model._compile_metrics.metrics
    fit(model)


class Table(keras.optimizers.SGD):
    """Keeps a variable where nobody finds it to make it anew."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = {"factor": keras.Variable(1.0, trainable=False)}
        self._track_variable(self.table["factor"])


def test_an_optimizer_that_cannot_be_had_again_leaves_the_model_uncompiled():
    model = network()
    model.compile(Table(), "mse", **EAGERLY)
    fit(model)
    report = keras_lora.apply_lora(model, rank=2)
    assert not model.compiled
    *_, note = report.notes  # after that of the output layers
    assert "its Table cannot be created again" in note
    assert note in str(report)
    kernel = to_numpy(model.layers[0].kernel)
    with pytest.raises(ValueError, match="compile"):
        fit(model)
    model.compile(Table(), "mse", **EAGERLY)
    fit(model)
    np.testing.assert_array_equal(to_numpy(model.layers[0].kernel), kernel)
    with pytest.warns(UserWarning, match="its Table cannot be created again"):
        keras_lora.merge_lora(model)


def test_loading_and_marking_say_so_too(tmp_path):
    first, model = network(), network()
    keras_lora.apply_lora(first, rank=2)
    keras_lora.save_adapter(first, tmp_path)
    for trainable in (True, False):
        model.compile(Table(), "mse", **EAGERLY)
        fit(model)
        report = keras_lora.load_adapter(model, tmp_path, trainable=trainable)
        assert not model.compiled
        [note] = report.notes
        assert "its Table cannot be created again" in note
    first.compile(Table(), "mse", **EAGERLY)
    fit(first)
    with pytest.warns(UserWarning, match="its Table cannot be created again"):
        keras_lora.mark_only_lora_as_trainable(first, bias="all")
    assert not first.compiled


def test_merging_after_training_keeps_what_predict_says():
    model = network()
    keras_lora.apply_lora(model, rank=2, alpha=64)
    model.compile(keras.optimizers.Adam(Warmup()), "mse", jit_compile=False)
    fit(model, epochs=3)
    before = model.predict(x(), verbose=0)
    keras_lora.merge_lora(model)
    np.testing.assert_allclose(model.predict(x(), verbose=0), before, atol=1e-5)
    fit(model)


def test_compiled_without_an_optimizer():
    model = network()
    model.compile(optimizer=None, loss="mse")
    keras_lora.apply_lora(model, rank=2)
    assert model.compiled
    assert model.optimizer is None
    model.evaluate(x(), y(), verbose=0)
    keras_lora.merge_lora(model)
    assert type(model.layers[0]) is keras.layers.Dense


CHANGES = {
    "apply": lambda model: keras_lora.apply_lora(model, rank=2),
    "merge": keras_lora.merge_lora,
    "remove": keras_lora.remove_lora,
    "mark": keras_lora.mark_only_lora_as_trainable,
}


@pytest.mark.parametrize("loop", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_loop_goes_on_with_what_a_callback_has_made_of_its_layers(name, loop):
    """As when the loop is left, the change is made, and another loop begins."""

    def made():
        set_seed(3)
        inner = network()
        inputs = keras.Input((6,))
        outer = keras.Model(inputs, inner(inputs))
        if name != "apply":
            keras_lora.apply_lora(inner, rank=2)
        outer.compile(keras.optimizers.SGD(0.1), "mse")
        return inner, outer

    class Change(keras.callbacks.Callback):
        def change(self, *args, logs=None):
            if args[0] == 0:
                set_seed(5)
                CHANGES[name](inner)

        on_epoch_end = on_test_batch_end = on_predict_batch_end = change

    inner, outer = made()
    if loop == "fit":
        fit(outer, epochs=3, callbacks=[Change()])
    elif loop == "evaluate":
        outer.evaluate(x(), y(), batch_size=4, callbacks=[Change()], verbose=0)
    else:
        outer.predict(x(), batch_size=4, callbacks=[Change()], verbose=0)
    changed = inner
    inner, outer = made()
    if loop == "fit":
        fit(outer, epochs=1)
    Change().change(0)
    if loop == "fit":
        fit(outer, epochs=2)
    assert [type(z) for z in changed.layers] == [type(z) for z in inner.layers]
    for one, other in zip(changed.weights, inner.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


def test_another_model_may_change_while_one_is_fitted():
    model, other = network(), network()
    other.compile("sgd", "mse", **EAGERLY)
    change = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: CHANGES["apply"](model)
    )
    fit(other, callbacks=[change])
    assert type(model.layers[0]) is keras_lora.LoRADense


def test_a_loop_that_predicts_goes_on_with_what_is_loaded(tmp_path):
    trained, model = network(), network()
    head = trained.layers[-1].name
    others = [layer.name for layer in model.layers if layer.name != head]
    model.set_weights(trained.get_weights())
    keras_lora.apply_lora(trained, rank=2, target=others, also_train=[head])
    trained.compile(keras.optimizers.SGD(0.5), "mse", **EAGERLY)
    fit(trained)
    keras_lora.apply_lora(model, rank=2, target=others)
    keras_lora.save_adapter(trained, tmp_path)
    model.compile("sgd", "mse")
    before = sum(v.trainable for v in model.variables)
    callback = keras.callbacks.LambdaCallback()
    callback.on_predict_batch_end = lambda batch, logs: keras_lora.load_adapter(
        model, tmp_path
    )
    found = model.predict(x(), batch_size=8, callbacks=[callback], verbose=0)
    np.testing.assert_allclose(
        found[8:], trained.predict(x(), verbose=0)[8:], atol=1e-6
    )
    assert sum(v.trainable for v in model.variables) > before  # the head trains


def test_a_failure_while_compiling_again_leaves_all_as_it_was(monkeypatch):
    model = network()
    model.compile(keras.optimizers.Adam(), "mse", jit_compile=False)
    fit(model)
    before = [(type(layer), layer.trainable) for layer in model._flatten_layers()]
    weights, names = model.get_weights(), [w.path for w in model.weights]
    optimizer, function = model.optimizer, model.train_function

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr("keras_lora.keras_internals.compiled.compile_again", fail)
    with pytest.raises(MemoryError):
        keras_lora.apply_lora(model, rank=2)
    assert before == [(type(z), z.trainable) for z in model._flatten_layers()]
    assert names == [w.path for w in model.weights]
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.optimizer is optimizer
    assert model.train_function is function
    fit(model)
