"""initialize_lora: against PEFT on torch run live, against NumPy, and its promises."""

import keras
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from layer_cases import CASES, to_numpy
from peft.tuners.lora import eva
from peft.utils.incremental_pca import IncrementalPCA
from seeds import set_seed
from shared import EAGERLY, assert_close

import keras_lora
from keras_lora.models.sites import adapted_sites
from keras_lora.models.start_values import (
    LOFTQ_STEPS,
    allocate_ranks,
    largest_singular_values,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Layer .* does not have a `quantize`",
    "ignore:[\\s\\S]*PiSSA",
)
SIZES = (6, 8, 8, 3)
X = np.random.default_rng(0).standard_normal((32, SIZES[0])).astype("float32")
Y = np.random.default_rng(1).standard_normal((32, SIZES[-1])).astype("float32")
NAMES = {"one": "0", "two": "2", "three": "4"}
over_methods = pytest.mark.parametrize(
    "method", ["pissa", "olora", "orthogonal", "eva"]
)
over_lora_and_dora = pytest.mark.parametrize(
    "use_dora", [False, True], ids=["lora", "dora"]
)


def mlp(dtype=None):
    set_seed(3)
    return keras.Sequential(
        [
            keras.Input((SIZES[0],)),
            keras.layers.Dense(SIZES[1], "tanh", name="one", dtype=dtype),
            keras.layers.Dense(SIZES[2], "tanh", name="two", dtype=dtype),
            keras.layers.Dense(SIZES[3], name="three", dtype=dtype),
        ]
    )


def adapted(method, build=mlp, **settings):
    model = build()
    settings = {"rank": 2, "alpha": 5, "target": list(NAMES), **settings}
    keras_lora.apply_lora(model, **settings)
    data = X if method == "eva" else None
    keras_lora.initialize_lora(model, method, data=data)
    return model


def torch_twin(model):
    linears = [torch.nn.Linear(*SIZES[i : i + 2]) for i in range(3)]
    for linear, layer in zip(linears, model.layers, strict=True):
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(to_numpy(layer.kernel).T))
            linear.bias.copy_(torch.tensor(to_numpy(layer.bias)))
    tanh = torch.nn.Tanh()
    return torch.nn.Sequential(linears[0], tanh, linears[1], tanh, linears[2])


def adapted_by_peft(model, start, **settings):
    """use_dora: m starts at the length of W, and so does PEFT's."""
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 5, "target_modules": list(NAMES.values())},
        init_lora_weights=start,
        **settings,
    )
    return peft.get_peft_model(torch_twin(model), config)


def factors_of_peft(model, name):
    module = model.base_model.model[int(name)]
    a, b = (getattr(module, x)["default"].weight for x in ("lora_A", "lora_B"))
    return a.detach().numpy().T, b.detach().numpy().T


def signed(factor, other, axis):
    """A factor with the signs of another's, rank by rank."""
    signs = np.sign(np.sum(factor * other, axis=axis, keepdims=True))
    return factor * signs


def train(model, steps=5, **how):
    """Losses of plain gradient descent, each before its step."""
    model.compile(keras.optimizers.SGD(0.1), "mse", **(how or EAGERLY))
    fitted = model.fit(X, Y, epochs=steps, batch_size=len(X), verbose=0, shuffle=False)
    return fitted.history["loss"]


# Against PEFT.


@over_lora_and_dora
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_factors_and_trajectory_are_those_of_peft(method, use_dora):
    model = adapted(method, use_dora=use_dora)
    theirs = adapted_by_peft(mlp(), method, use_dora=use_dora)
    for layer in adapted_sites(model):
        a, b = factors_of_peft(theirs, NAMES[layer.name])
        assert_close(signed(to_numpy(layer.lora.a), a, 0), a)
        assert_close(signed(to_numpy(layer.lora.b), b, 1), b)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(theirs(torch.tensor(X)), torch.tensor(Y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(train(model), losses, rtol=1e-5)
    if use_dora:
        for layer in adapted_sites(model):
            module = theirs.base_model.model[int(NAMES[layer.name])]
            m = module.lora_magnitude_vector["default"].weight.detach().numpy()
            assert_close(layer.lora.magnitude, m.ravel())


def test_an_orthogonal_start_has_peft_s_sizes_and_no_product():
    build = lambda: keras.Sequential(  # noqa: E731
        [keras.Input((64,)), keras.layers.Dense(64, name="one")]
    )
    model = adapted("orthogonal", build, target=["one"], rank=4)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
    lora = model.layers[0].lora
    for own, other in zip((lora.a, lora.b), factors_of_peft(theirs, "0"), strict=True):
        assert to_numpy(own).std() == pytest.approx(other.std(), rel=0.3)
        assert own.shape == other.shape
    assert np.abs(to_numpy(lora.a) @ to_numpy(lora.b)).max() < 1e-7


@pytest.fixture
def exact(monkeypatch):
    """PEFT's principal components without the random shortcut that it takes."""

    def components(n_components, **options):
        return IncrementalPCA(n_components=n_components)

    monkeypatch.setattr(eva, "IncrementalPCA", components)


def of_peft_eva(rho, x=X):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=list(NAMES.values()),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho),
    )
    loader = [{"input": torch.tensor(x)}]
    return eva.get_eva_state_dict(
        torch_twin(mlp()),
        loader,
        config,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )


def test_eva_starts_at_the_directions_that_peft_finds(exact):
    model = adapted("eva")
    theirs = of_peft_eva(rho=1.0)
    for layer in adapted_sites(model):
        expected = theirs[NAMES[layer.name]].numpy().T
        actual = signed(to_numpy(layer.lora.a), expected, 0)
        np.testing.assert_allclose(actual, expected, atol=1e-4)
        assert not to_numpy(layer.lora.b).any()


def test_eva_moves_ranks_as_peft_does(exact):
    model = mlp()
    plain = model.predict(X, verbose=0)
    keras_lora.apply_lora(model, rank=2, alpha=5, target=list(NAMES))
    x = X[:, :1] @ X[:1]  # on a line: the first layer's inputs have one direction
    report = keras_lora.initialize_lora(model, "eva", data=[(x, Y)], budget=6)
    expected = {name: len(found) for name, found in of_peft_eva(2.0, x).items()}
    actual = {NAMES[row.path]: row.rank for row in report}
    assert actual == {name: rank for name, rank in expected.items() if rank}
    assert sum(actual.values()) == 6
    assert len(set(actual.values())) > 1
    assert {row.scaling for row in report} == {2.5}
    np.testing.assert_array_equal(model.predict(X, verbose=0), plain)


def test_a_layer_without_a_rank_is_a_plain_frozen_one():
    def build():
        set_seed(3)
        inputs = keras.Input((6,))
        flat = keras.layers.Rescaling(0.0, offset=0.5)(inputs)  # nothing varies
        outputs = [keras.layers.Dense(4, name="one")(inputs)]
        outputs.append(keras.layers.Dense(4, name="two")(flat))
        return keras.Model(inputs, keras.layers.Add()(outputs))

    model = build()
    keras_lora.apply_lora(model, rank=2, target=["one", "two"])
    keras_lora.initialize_lora(model, "eva", data=X, budget=3)
    assert model.get_layer("one").lora.rank == 3
    assert type(model.get_layer("two")) is keras.layers.Dense
    assert [v.path for v in model.trainable_variables] == ["one/lora/a", "one/lora/b"]
    assert allocate_ranks({"a": [0.5, 0.1], "b": [0.4, 0.3]}, 3) == {"a": 1, "b": 2}


# What it promises.


@over_methods
def test_nothing_changes_at_the_start_and_w_never_moves(method):
    model, plain = mlp(), mlp()
    before = plain.predict(X, verbose=0)
    keras_lora.apply_lora(model, rank=2, target=list(NAMES))
    model.compile("adam", "mse")
    model.predict(X, verbose=0)  # traced with the first adapters
    keras_lora.initialize_lora(model, method, data=X if method == "eva" else None)
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    np.testing.assert_array_equal(to_numpy(model(X, training=True)), to_numpy(plain(X)))
    losses = train(model)
    assert losses[-1] < losses[0]
    for layer, other in zip(model.layers, plain.layers, strict=True):
        np.testing.assert_array_equal(to_numpy(layer.kernel), to_numpy(other.kernel))


@over_lora_and_dora
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "mixed_float16"])
def test_nothing_changes_at_the_start_in_any_precision(dtype, use_dora):
    model = adapted("pissa", lambda: mlp(dtype), use_dora=use_dora)
    plain = mlp(dtype)
    np.testing.assert_array_equal(
        to_numpy(model(X, training=True)), to_numpy(plain(X, training=True))
    )
    np.testing.assert_array_equal(to_numpy(model(X)), to_numpy(plain(X)))


MATRICES = [case for case in CASES if case.layer_class.kernel_is_matrix]
OTHERS = [case for case in CASES if not case.layer_class.kernel_is_matrix]


@pytest.mark.parametrize("case", MATRICES, ids=lambda case: case.name)
def test_delta_is_the_difference_of_the_products(case):
    """A @ B - A0 @ B0 in float64, also where the kernel is a stack of matrices."""
    inputs = case.inputs()
    model = keras.Sequential([case.layer(rank=2, alpha=3)])
    model(inputs)
    keras_lora.initialize_lora(model, "pissa")
    lora = model.layers[0].lora
    a, b, a_start, b_start = (to_numpy(v).astype("float64") for v in lora.weights)
    a, b = a + 0.01, b - 0.02
    lora.a.assign(a)
    lora.b.assign(b)
    compose = lora.form.compose
    expected = lora.scaling * (
        to_numpy(compose(a, b)) - to_numpy(compose(a_start, b_start))
    )
    assert_close(lora.delta(), expected, 1e-4)


@over_lora_and_dora
def test_losses_go_on_after_every_kind_of_file(tmp_path, use_dora):
    settings = {"dropout": 0.2, "use_dora": use_dora}
    model = adapted("pissa", **settings)
    train(model, 2)
    model.save(tmp_path / "model.keras")
    keras_lora.save_adapter(model, tmp_path / "adapter")
    model.save_weights(tmp_path / "model.weights.h5")
    again = keras.models.load_model(tmp_path / "model.keras")
    loaded = mlp()
    keras_lora.load_adapter(loaded, tmp_path / "adapter")
    same = adapted("olora", **settings)
    same.load_weights(tmp_path / "model.weights.h5")
    over = adapted("olora", use_dora=use_dora)
    keras_lora.load_adapter(over, tmp_path / "adapter")
    outputs = model.predict(X, verbose=0)
    for other in (again, loaded, same, over):
        assert_close(other.predict(X, verbose=0), outputs, 1e-6)
        assert [r.rank for r in keras_lora.summary(other)] == [2] * 3
        for name in ("a", "b", "a_start", "b_start", *["magnitude"] * use_dora):
            for layer, own in zip(
                adapted_sites(other), adapted_sites(model), strict=True
            ):
                assert_close(getattr(layer.lora, name), getattr(own.lora, name), 1e-6)
    assert again.optimizer.iterations == model.optimizer.iterations


@over_lora_and_dora
def test_peft_reads_it_as_a_plain_adapter_of_twice_the_rank(tmp_path, use_dora):
    settings = {"use_rslora": True, "use_dora": use_dora}
    model = adapted("pissa", rank_pattern={"two": 3}, **settings)
    train(model, 3)
    keras_lora.save_adapter(model, tmp_path, names=NAMES)
    loaded = peft.PeftModel.from_pretrained(torch_twin(mlp()), tmp_path).eval()
    assert_close(loaded(torch.tensor(X)).detach().numpy(), model.predict(X, verbose=0))
    assert loaded.peft_config["default"].r == 4
    assert loaded.peft_config["default"].rank_pattern == {"^2": 6}
    assert "pissa" not in (tmp_path / "adapter_config.json").read_text()


@over_lora_and_dora
def test_merging_removing_and_exporting(tmp_path, use_dora):
    model = adapted("pissa", use_dora=use_dora)
    train(model, 3, jit_compile=False)
    outputs = model.predict(X, verbose=0)
    with keras_lora.disabled(model):
        base, off = mlp().predict(X, verbose=0), model.predict(X, verbose=0)
    if keras.backend.backend() == "jax":  # XLA fuses the two programs differently
        assert_close(off, base, 1e-6)
    else:
        np.testing.assert_array_equal(off, base)
    with keras_lora.merged(model):
        assert_close(model.predict(X, verbose=0), outputs)
    adapter = tmp_path / "adapter"
    keras_lora.save_adapter(model, adapter)
    keras_lora.merge_lora(model)
    assert_close(model.predict(X, verbose=0), outputs)
    if use_dora:  # of which no sum is an adapter
        return
    # Sums are of updates: there is no start in them any more.
    total = keras_lora.combine_adapters([adapter], rank=4)
    plain = mlp()
    keras_lora.load_adapter(plain, total)
    assert_close(plain.predict(X, verbose=0), outputs, 1e-4)


def test_a_function_is_a_method():
    model = mlp()
    plain = model.predict(X, verbose=0)
    keras_lora.apply_lora(model, rank=2, target=list(NAMES))
    keras_lora.initialize_lora(
        model, lambda layer: (np.ones(layer.lora.a.shape), np.ones(layer.lora.b.shape))
    )
    np.testing.assert_array_equal(model.predict(X, verbose=0), plain)
    np.testing.assert_array_equal(to_numpy(model.layers[0].lora.a), 1)


def test_the_largest_singular_values_are_numpy_s():
    random = np.random.default_rng(0)
    for shape in ((9, 5), (5, 9), (3, 6, 4)):
        matrix = random.standard_normal(shape)
        left, values, right = largest_singular_values(matrix, 3)
        expected = np.linalg.svd(matrix, full_matrices=False)
        np.testing.assert_allclose(values, expected[1][..., :3])
        product = (left * values[..., None, :]) @ right
        best = expected[0][..., :3] * expected[1][..., None, :3]
        np.testing.assert_allclose(product, best @ expected[2][..., :3, :], atol=1e-9)
    flat = np.outer(np.ones(6), np.arange(1.0, 5))  # of rank 1
    left, values, right = largest_singular_values(flat, 3)
    np.testing.assert_allclose((left * values) @ right, flat, atol=1e-9)
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-9)


# LoftQ.


def wide():
    set_seed(3)
    return keras.Sequential(
        [keras.Input((96,)), keras.layers.Dense(64, name="one", use_bias=False)]
    )


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_loftq_brings_a_quantized_model_nearer_to_the_float_one(mode):
    float_model, model = wide(), wide()
    model.quantize(mode)
    kernel = to_numpy(float_model.layers[0].kernel)
    keras_lora.apply_lora(model, rank=8, alpha=4, target=["one"])
    report = keras_lora.initialize_lora(model, "loftq", data=float_model)
    layer, (before, after) = model.layers[0], report.errors["one"]
    found = to_numpy(layer.base_kernel("float32")) + to_numpy(layer.lora.delta())
    assert after == pytest.approx(
        np.linalg.norm(found - kernel) / np.linalg.norm(kernel), rel=1e-3
    )
    errors = loftq_errors(kernel.astype("float64"), mode, rank=8)
    assert after == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.99 * max(errors)  # it matters which step is taken
    assert after < 0.9 * before
    assert layer.quantization_mode == mode


def loftq_errors(kernel, mode, rank) -> list:
    """The error of each of LoftQ's steps: Keras quantizes, and NumPy does the rest."""
    nearest, errors = 0.0, []
    for _ in range(LOFTQ_STEPS):
        model = wide()
        model.layers[0].kernel.assign(kernel - nearest)
        model.quantize(mode)
        lost = kernel - to_numpy(model(np.eye(len(kernel), dtype="float32")))
        left, values, right = np.linalg.svd(lost)
        nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
        errors.append(np.linalg.norm(lost - nearest) / np.linalg.norm(kernel))
    return errors


def test_token_rows_stay_as_they_are():
    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(9, 6, name="table")(inputs)
    outputs = keras.layers.Dense(6, name="dense")(hidden)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(outputs))
    ids = np.arange(10).reshape(2, 5) % 9
    settings = {"trainable_token_indices": [7, 2], "rank": 2}
    keras_lora.apply_lora(model, target=["dense"], **settings)
    rows = model.get_layer("table").lora.rows
    rows.assign(rows + 1.5)
    outputs, values = to_numpy(model(ids)), to_numpy(rows)
    report = keras_lora.initialize_lora(model, "pissa")
    assert [row.path for row in report] == ["table", "dense"]
    assert np.abs(to_numpy(model.get_layer("dense").lora.b)).max() > 0
    np.testing.assert_array_equal(to_numpy(model.get_layer("table").lora.rows), values)
    assert_close(to_numpy(model(ids)), outputs)
    only = keras.Model(inputs, keras.layers.Embedding(9, 6)(inputs))
    keras_lora.apply_lora(only, target=None, trainable_token_indices=[7, 2])
    unchanged(only, "only token rows", "pissa")


# What is refused, and leaves the model as it was.


def unchanged(model, error, *args, **kwargs):
    before = [(v.path, to_numpy(v)) for v in model.weights]
    with pytest.raises(ValueError, match=error):
        keras_lora.initialize_lora(model, *args, **kwargs)
    for (path, value), now in zip(before, model.weights, strict=True):
        assert path == now.path
        np.testing.assert_array_equal(value, to_numpy(now))


def test_refusals():
    model = mlp()
    keras_lora.apply_lora(model, rank=3, target=list(NAMES))
    unchanged(model, "'pisa'", "pisa")
    unchanged(model, "needs `data`", "eva")
    unchanged(model, "leave out `data`", "pissa", data=X)
    unchanged(model, "`budget` is for 'eva'", "pissa", budget=4)
    unchanged(model, "whole number > 0", "eva", data=X, budget=0)
    unchanged(model, "`budget` is 40", "eva", data=X, budget=40)
    unchanged(model, "even rank", "orthogonal")
    unchanged(model, "only 2 directions", "eva", data=X[:2])
    unchanged(model, "quantized layers", "loftq", data=mlp())
    unchanged(model, "A of 'one' must have shape", lambda layer: (np.ones(2), 0 * X))
    nan = lambda x: (np.full(x.lora.a.shape, np.nan), to_numpy(x.lora.b))  # noqa: E731
    unchanged(model, "finite", nan)
    train(model, 1)
    unchanged(model, "has trained", "pissa")
    unchanged(adapted("pissa"), "was initialized already", "pissa")
    unchanged(adapted("pissa", use_dora=True), "was initialized already", "olora")
    high = mlp()
    keras_lora.apply_lora(high, rank=7, target=["one"])
    unchanged(high, "only 6 directions", "pissa")


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_kinds_that_are_not_reached(case):
    model = keras.Sequential([case.layer()])
    model(case.inputs())
    unchanged(model, "does not support", "pissa")


def test_an_optimizer_s_failure_leaves_the_adapters(monkeypatch):
    model = mlp()
    keras_lora.apply_lora(model, rank=2, target=list(NAMES))
    adapters = [layer.lora for layer in model.layers]
    calls = iter(range(9))

    def fails(self):
        if next(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(keras_lora.LoRALayer, "build_adapter", fails)
    with pytest.raises(MemoryError):
        keras_lora.initialize_lora(model, "pissa")
    assert [layer.lora for layer in model.layers] == adapters
    model.predict(X, verbose=0)


def test_files_of_a_start_that_do_not_fit(tmp_path):
    model = adapted("pissa")
    train(model, 1)
    keras_lora.save_adapter(model, tmp_path)
    plain = adapted(lambda layer: (to_numpy(layer.lora.a), to_numpy(layer.lora.b)))
    with pytest.raises(ValueError, match="frozen_start"):
        keras_lora.load_adapter(plain, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    for starts in ('["elsewhere"]', '{"one": 2}', "[1]"):
        metadata["starts"] = starts
        del metadata["sha256"]
        safetensors.numpy.save_file(tensors, path, metadata)
        metadata["sha256"] = ""
        with pytest.raises(ValueError, match=r"start|initial values"):
            keras_lora.load_adapter(mlp(), tmp_path)
