"""LoRAPlus: two plain optimizers in one, and in all else the optimizer it was."""

import copy
import json
import pickle
import zipfile

import keras
import numpy as np
import peft
import pytest
import torch
from layer_cases import to_numpy
from peft.optimizers import create_loraplus_optimizer
from shared import EAGERLY

import keras_lora

RATIO = 4.0  # a power of two: rates times it are exact
WRAPPERS = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
OPTIMIZERS = [
    cls
    for name, cls in sorted(vars(keras.optimizers).items())
    if isinstance(cls, type)
    and issubclass(cls, keras.optimizers.Optimizer)
    and name not in WRAPPERS
]
over_optimizers = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS, ids=lambda cls: cls.__name__
)
only = {
    name: pytest.mark.skipif(keras.backend.backend() != name, reason=f"on {name} only")
    for name in ("tensorflow", "jax")
}


def layer():
    """A, B and a bias that train, with values of which none is zero."""
    made = keras_lora.LoRADense(5, rank=2, name="mine", b_initializer="random_normal")
    made.build((None, 4))
    made.bias.assign(np.arange(1, 6) / 5)
    return made


def gradients(variables, seed):
    random = np.random.default_rng(seed)
    return [random.standard_normal(v.shape).astype("float32") for v in variables]


def steps(optimizer, variables, gradients, count=6):
    optimizer.build(variables)
    for step in range(count):
        tensors = [keras.ops.convert_to_tensor(g) for g in gradients(step)]
        optimizer.apply(tensors, variables)
    optimizer.finalize_variable_values(variables)


def assert_two_in_one(
    make, faster, lora_plus=None, all_gradients=gradients, scale=1.0, steps_count=6
):
    """LoRAPlus(make()) on A, B and bias; make() on A and bias; faster() on B alone."""
    one, two, unchanged = layer(), layer(), layer()
    for other in (two, unchanged):
        other.set_weights(one.get_weights())
    start = to_numpy(one.lora.b)
    variables = one.trainable_variables
    is_b = [v is one.lora.b for v in variables]
    optimizer = (lora_plus or (lambda: keras_lora.LoRAPlus(make(), RATIO)))()
    steps(
        optimizer,
        variables,
        lambda step: [g * scale for g in gradients(variables, step)],
        steps_count,
    )
    for made, chosen in ((make(), False), (faster(), True)):
        steps(
            made,
            [
                v
                for v, b in zip(two.trainable_variables, is_b, strict=True)
                if b == chosen
            ],
            lambda step, chosen=chosen: [
                g
                for g, b in zip(all_gradients(variables, step), is_b, strict=True)
                if b == chosen
            ],
            steps_count,
        )
    steps(
        make(),
        unchanged.trainable_variables,
        lambda step: all_gradients(variables, step),
        steps_count,
    )
    for ours, theirs in zip(variables, two.trainable_variables, strict=True):
        np.testing.assert_allclose(
            to_numpy(ours), to_numpy(theirs), rtol=2e-6, atol=2e-6, err_msg=ours.path
        )
    # The law says something: at A's rate B would be elsewhere.
    b = to_numpy(one.lora.b)
    assert np.abs(b - start).max() > 1e-4
    assert np.abs(b - to_numpy(unchanged.lora.b)).max() > 1e-4
    return optimizer


@over_optimizers
def test_equals_two_plain_optimizers(optimizer):
    old = keras.version().startswith("3.12.")
    if old and optimizer.__name__ == "Muon" and keras.backend.backend() == "tensorflow":
        pytest.skip("Keras 3.12's own Muon fails on TensorFlow")
    options = {"weight_decay": 0.1}
    assert_two_in_one(
        lambda: optimizer(0.01, **options), lambda: optimizer(0.01 * RATIO, **options)
    )


def decay(rate):
    return keras.optimizers.schedules.ExponentialDecay(rate, 2, 0.5)


class HalfEachStep:
    """A learning rate that is a function, and counts its calls nowhere."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self):
        return self.rate / 2


SETTINGS = {
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.3},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema-overwrites": {"use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_settings_are_those_of_the_optimizer(name, settings):
    def make(rate=0.01):
        optimizer = getattr(keras.optimizers, name)
        return optimizer(rate, weight_decay=0.1, **settings)

    assert_two_in_one(make, lambda: make(0.01 * RATIO))


@pytest.mark.parametrize("rate", [decay, HalfEachStep])
def test_a_rate_that_changes(rate):
    def make(factor=1.0):
        return keras.optimizers.AdamW(rate(0.01 * factor), weight_decay=0.1)

    assert_two_in_one(make, lambda: make(RATIO))


@pytest.mark.parametrize(
    "excluded", [["^b"], ["^a", "^b", "^bias"], ["lora"], ["bias"]], ids="-".join
)
def test_variables_without_weight_decay(excluded):
    def make(rate=0.01):
        optimizer = keras.optimizers.SGD(rate, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=excluded)
        return optimizer

    def none(rate=0.01):
        """On torch plain Keras refuses a list without a variable that decays."""
        return keras.optimizers.SGD(rate)

    decays = [[name for name in ("a", "bias") if f"^{name}" not in excluded], "b"]
    slow, fast = make, make
    if keras.backend.backend() == "torch":
        slow = make if decays[0] else none
        fast = none if "^b" in excluded else make
    assert_two_in_one(
        slow, lambda: fast(0.01 * RATIO), lambda: keras_lora.LoRAPlus(make(), RATIO)
    )


def test_clipping_by_the_norm_of_all():
    def clipped(variables, step):
        found = gradients(variables, step)
        norm = np.sqrt(sum((g.astype("float64") ** 2).sum() for g in found))
        assert norm > 0.5
        return [(g * (0.5 / norm)).astype("float32") for g in found]

    def whole():
        return keras_lora.LoRAPlus(keras.optimizers.SGD(0.1, global_clipnorm=0.5), 4)

    def make(rate=0.1):
        return keras.optimizers.SGD(rate)

    assert_two_in_one(make, lambda: make(0.1 * RATIO), whole, clipped)


@pytest.mark.parametrize("how", ["factor", "LossScaleOptimizer"])
def test_scaled_losses(how):
    if how == "LossScaleOptimizer" and keras.backend.backend() == "jax":
        pytest.skip("Keras applies it only within `fit` there: test_mixed_float16")

    def scaled():
        if how == "factor":
            adam = keras.optimizers.Adam(0.01, loss_scale_factor=8.0)
            return keras_lora.LoRAPlus(adam, RATIO)
        return keras.optimizers.LossScaleOptimizer(
            keras_lora.LoRAPlus(keras.optimizers.Adam(0.01), RATIO), initial_scale=8.0
        )

    def make(rate=0.01):
        return keras.optimizers.Adam(rate)

    optimizer = assert_two_in_one(make, lambda: make(0.01 * RATIO), scaled, scale=8.0)
    assert float(optimizer.scale_loss(1.0)) == 8.0


@only["jax"]
def test_stateless_apply_under_jit():
    import jax

    one, two = layer(), layer()
    two.set_weights(one.get_weights())
    variables = one.trainable_variables
    stateless, stateful = (
        keras_lora.LoRAPlus(keras.optimizers.AdamW(0.01, weight_decay=0.1), RATIO)
        for _ in range(2)
    )
    stateless.build(variables)
    apply = jax.jit(stateless.stateless_apply)
    values = [v.value for v in variables]
    state = [v.value for v in stateless.variables]
    for step in range(6):
        values, state = apply(state, gradients(variables, step), values)
    steps(stateful, two.trainable_variables, lambda step: gradients(variables, step))
    for ours, theirs in zip(values, two.trainable_variables, strict=True):
        np.testing.assert_allclose(ours, to_numpy(theirs), rtol=1e-5)


# Against NumPy and PEFT: whole models, through `fit`.

X = np.random.default_rng(0).standard_normal((16, 6)).astype("float32")
Y = np.random.default_rng(1).standard_normal((16, 3)).astype("float32")


def model(b="random_normal", **options):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras_lora.LoRADense(
                3, use_bias=False, rank=2, alpha=3, b_initializer=b, name="x", **options
            ),
        ]
    )


def fit(model, epochs=5, initial_epoch=0, **options):
    fitted = model.fit(
        X,
        Y,
        epochs=epochs,
        initial_epoch=initial_epoch,
        batch_size=16,
        verbose=0,
        **options,
    )
    return fitted.history["loss"]


def numpy_losses(layer, rates, momentum, weight_decay):
    """SGD in float64, with B's rate four times A's; one loss per rate."""
    kernel, a, b = (to_numpy(v) for v in (layer.kernel, layer.lora.a, layer.lora.b))
    kernel, a, b = (v.astype("float64") for v in (kernel, a, b))
    scaling, velocities, losses = layer.lora.scaling, [0.0, 0.0], []
    for rate in rates:
        error = X @ (kernel + scaling * a @ b) - Y
        losses.append((error**2).mean())
        delta = X.T @ error * (2 / error.size)
        grads = [scaling * delta @ b.T, scaling * a.T @ delta]
        for i, (v, g, r) in enumerate(
            zip((a, b), grads, (rate, RATIO * rate), strict=True)
        ):
            velocities[i] = momentum * velocities[i] - r * g
            v *= 1 - r * weight_decay
            v += velocities[i]
    return losses


RATES = {
    "fixed": (lambda: [], [0.05] * 5),
    "LearningRateScheduler": (
        lambda: [
            keras.callbacks.LearningRateScheduler(lambda epoch: 0.05 / (epoch + 1))
        ],
        [0.05 / (epoch + 1) for epoch in range(5)],
    ),
    "ReduceLROnPlateau": (
        lambda: [
            keras.callbacks.ReduceLROnPlateau(
                monitor="loss", factor=0.5, patience=1, min_delta=1e9
            )
        ],
        # The first epoch is the best, the second and each later one a plateau.
        [0.05, 0.05, 0.025, 0.0125, 0.00625],
    ),
}


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", RATES)
def test_fit_against_numpy(kind, jit_compile):
    if jit_compile and keras.backend.backend() == "torch":
        pytest.skip("torch's compiler is not under test")
    callbacks, rates = RATES[kind]
    ours = model()
    expected = numpy_losses(ours.layers[0], rates, momentum=0.9, weight_decay=0.1)
    sgd = keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.1)
    ours.compile(keras_lora.LoRAPlus(sgd, RATIO), "mse", jit_compile=jit_compile)
    losses = fit(ours, callbacks=callbacks())
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    last = float(keras.ops.convert_to_numpy(ours.optimizer.learning_rate))
    if kind != "ReduceLROnPlateau":  # which has halved it for the next epoch
        np.testing.assert_allclose(last, rates[-1], rtol=1e-6)


def test_learning_rate_is_the_one_of_a():
    optimizer = keras_lora.LoRAPlus(keras.optimizers.SGD(0.5), 16)
    assert float(keras.ops.convert_to_numpy(optimizer.learning_rate)) == 0.5
    optimizer.learning_rate = 0.25
    made = layer()
    before = [to_numpy(v) for v in (made.lora.a, made.lora.b)]
    steps(
        optimizer,
        made.trainable_variables,
        lambda step: [np.ones(v.shape, "float32") for v in made.trainable_variables],
        count=1,
    )
    np.testing.assert_allclose(before[0] - to_numpy(made.lora.a), 0.25, rtol=1e-5)
    np.testing.assert_allclose(before[1] - to_numpy(made.lora.b), 4.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_against_peft(name):
    # In float64: what Adam divides by is small. TensorFlow rounds its betas to float32.
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    options = {"epsilon": 1e-20} if name == "AdamW" else {}
    sizes = (6, 5, 3)
    linears = [torch.nn.Linear(*sizes[i : i + 2]) for i in range(2)]
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(
        torch.nn.Sequential(linears[0], torch.nn.Tanh(), linears[1]), config
    ).double()
    ours = keras.Sequential([keras.Input((6,))])
    for units, activation in ((5, "tanh"), (3, None)):
        ours.add(keras_lora.LoRADense(units, activation=activation, rank=2, alpha=3))
    modules = [theirs.base_model.model[i] for i in (0, 2)]

    def tensors(module):
        factors = (module.lora_A, module.lora_B)
        return [f["default"].weight.detach().numpy().T for f in factors]

    for layer, module in zip(ours.layers, modules, strict=True):
        layer.kernel.assign(module.base_layer.weight.detach().numpy().T)
        layer.bias.assign(module.base_layer.bias.detach().numpy())
        layer.bias.trainable = False
        for factor, value in zip(
            (layer.lora.a, layer.lora.b), tensors(module), strict=True
        ):
            factor.assign(value)
    optimizer = create_loraplus_optimizer(
        theirs,
        getattr(torch.optim, name),
        lr=0.01,
        loraplus_lr_ratio=8.0,
        loraplus_weight_decay=0.3,
        **({"eps": 1e-20} if options else {}),
    )
    x, y = torch.tensor(X).double(), torch.tensor(Y).double()
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(theirs(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    made = getattr(keras.optimizers, name)(0.01, weight_decay=0.3, **options)
    ours.compile(keras_lora.LoRAPlus(made, 8.0), "mse", jit_compile=False)
    np.testing.assert_allclose(fit(ours, epochs=10), losses, rtol=1e-5)
    for layer, module in zip(ours.layers, modules, strict=True):
        for factor, value in zip(
            (layer.lora.a, layer.lora.b), tensors(module), strict=True
        ):
            np.testing.assert_allclose(to_numpy(factor), value, rtol=1e-5, atol=1e-5)


def test_mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    ours = model()
    ours.compile(keras_lora.LoRAPlus(keras.optimizers.SGD(0.05), RATIO), "mse")
    assert isinstance(ours.optimizer, keras.optimizers.LossScaleOptimizer)
    expected = numpy_losses(ours.layers[0], [0.05] * 5, 0.0, 0.0)
    np.testing.assert_allclose(fit(ours), expected, rtol=2e-3)
    keras_lora.merge_lora(ours)
    assert not isinstance(ours.optimizer.inner_optimizer, keras_lora.LoRAPlus)
    fit(ours, epochs=1)


# Files and copies.


@pytest.mark.parametrize("name", ["AdamW", "Nadam", "SGD"])
def test_resumed_from_a_file_the_losses_are_equal(name, tmp_path):
    def made():
        return getattr(keras.optimizers, name)(decay(0.05), weight_decay=0.1)

    ours = model()
    ours.compile(keras_lora.LoRAPlus(made(), RATIO), "mse", jit_compile=False)
    fit(ours, epochs=3)
    ours.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(resumed.optimizer, keras_lora.LoRAPlus)
    rest = fit(ours, initial_epoch=3, epochs=6)
    np.testing.assert_allclose(fit(resumed, initial_epoch=3, epochs=6), rest, rtol=1e-6)
    assert rest[0] > rest[-1]


COPIES = {
    "serialize": lambda o: keras.optimizers.deserialize(keras.optimizers.serialize(o)),
    "json": lambda o: keras.optimizers.deserialize(
        json.loads(json.dumps(keras.optimizers.serialize(o)))
    ),
    "from_config": lambda o: type(o).from_config(o.get_config()),
    "LoRAPlus.from_config": lambda o: keras_lora.LoRAPlus.from_config(o.get_config()),
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "deepcopy": copy.deepcopy,
}


@over_optimizers
@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_same_settings(again, optimizer):
    made = keras_lora.LoRAPlus(optimizer(0.125, clipnorm=0.5), 3)
    new = again(made)
    assert new is not made
    assert isinstance(new, keras_lora.LoRAPlus) and isinstance(new, optimizer)
    assert new.get_config() == made.get_config()
    plain = optimizer.from_config(new.get_config()["optimizer"]["config"])
    assert type(plain) is type(optimizer(0.125))
    expected = optimizer(0.125, clipnorm=0.5).get_config()
    assert plain.get_config() == {**expected, "name": plain.name}
    assert new.lora_plus_ratio == 3.0


class Mine(keras.optimizers.SGD):
    """An optimizer of the user's."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * 2, variable, learning_rate)


def test_an_optimizer_of_the_users():
    assert_two_in_one(lambda: Mine(0.01), lambda: Mine(0.01 * RATIO))
    made = keras_lora.LoRAPlus(Mine(0.01))
    with keras.saving.custom_object_scope({"Mine": Mine}):
        new = keras.optimizers.deserialize(keras.optimizers.serialize(made))
    assert isinstance(new, Mine)


def test_a_copy_of_a_model_takes_over_the_optimizers_state():
    ours = model()
    ours.compile(keras_lora.LoRAPlus(keras.optimizers.Adam(0.05), RATIO), "mse")
    fit(ours, epochs=2)
    new = pickle.loads(pickle.dumps(ours))
    np.testing.assert_allclose(fit(new), fit(ours), rtol=1e-6)


# Models that change.


def plain_model():
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, name="mine"), keras.layers.Dense(3)]
    )


def test_compiled_again_with_the_same_settings():
    ours = plain_model()
    ours.compile(keras_lora.LoRAPlus(keras.optimizers.SGD(0.01, momentum=0.5), 3))
    config = ours.optimizer.get_config()
    keras_lora.apply_lora(ours, rank=2)
    assert isinstance(ours.optimizer, keras_lora.LoRAPlus)
    assert ours.optimizer.get_config() == config
    keras_lora.mark_only_lora_as_trainable(ours)
    assert ours.optimizer.get_config() == config
    assert isinstance(ours.optimizer, keras_lora.LoRAPlus)


@pytest.mark.parametrize(
    ("undo", "wrapped"),
    [(keras_lora.merge_lora, False), (keras_lora.remove_lora, True)],
)
def test_without_an_adapter_left_the_optimizer_is_plain(undo, wrapped, tmp_path):
    def compiled(model, wrap):
        optimizer = wrap(keras.optimizers.Adam(0.05))
        if wrapped:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer, "mse", **EAGERLY)

    ours = plain_model()
    keras_lora.apply_lora(ours, rank=2)
    compiled(ours, keras_lora.LoRAPlus)
    fit(ours, epochs=2)
    undo(ours)
    ours.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert b"keras_lora" not in archive.read("config.json")
    expected = plain_model()
    expected.set_weights(ours.get_weights())
    compiled(expected, lambda optimizer: optimizer)
    losses = fit(expected)
    np.testing.assert_allclose(fit(ours), losses, rtol=1e-6)
    resumed = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(fit(resumed), losses, rtol=1e-6)


# What is refused.


def test_no_b_among_the_variables():
    ours = plain_model()
    ours.compile(keras_lora.LoRAPlus("adam"), "mse", jit_compile=False)
    with pytest.raises(ValueError, match="no B of an adapter among 4"):
        fit(ours, epochs=1)
    frozen = model()
    frozen.layers[0].lora.b.trainable = False
    with pytest.raises(ValueError, match="no B of an adapter among 1"):
        keras_lora.LoRAPlus("adam").build(frozen.trainable_variables)


@pytest.mark.parametrize("ratio", [0, -1.0, float("inf"), float("nan"), "16", True])
def test_a_ratio_out_of_range(ratio):
    optimizer = keras.optimizers.Adam()
    with pytest.raises(ValueError, match="`ratio` must be"):
        keras_lora.LoRAPlus(optimizer, ratio)
    assert not isinstance(optimizer, keras_lora.LoRAPlus)


def test_optimizers_that_cannot_be_wrapped():
    def refused(optimizer, reason):
        kept = type(optimizer)
        with pytest.raises(ValueError, match=reason):
            keras_lora.LoRAPlus(optimizer)
        assert type(optimizer) is kept

    adam = keras.optimizers.Adam
    refused(
        keras.optimizers.LossScaleOptimizer(adam()),
        r"LossScaleOptimizer\(LoRAPlus\(optimizer\)\)",
    )
    refused(keras_lora.LoRAPlus(adam()), "is a LoRAPlus")
    built = adam()
    built.build(layer().trainable_variables)
    refused(built, "is already built")
    refused(None, "Received: None")
    refused(3, "Could not interpret")
