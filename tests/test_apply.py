"""apply_lora: the same model at first, an adapter everywhere asked, and back."""

import inspect
import itertools
import warnings

import keras
import numpy as np
import pytest
from layer_cases import CASES, KINDS, fill, slow_but, to_numpy
from models import x
from pretrained import PRETRAINED, Pretrained, convolutional, sequential, transformer
from seeds import set_seed
from shared import (
    HEADS,
    adapt,
    assert_close,
    assert_same,
    compile_,
    fit,
    flags,
    predict,
)

import keras_lora
from keras_lora import apply_lora
from keras_lora.models.sites import adapted_sites

over_models = pytest.mark.parametrize(
    "build", PRETRAINED, ids=lambda build: build.__name__
)


@over_models
def test_outputs_are_the_same_at_first(build):
    model = build()
    before, eager = predict(model), to_numpy(model(x()))
    trained = to_numpy(model(x(), training=True)) if build is not sequential else None
    apply_lora(model, rank=2, exclude=[HEADS[build]] if build in HEADS else None)
    assert_same(to_numpy(model(x())), eager)
    np.testing.assert_allclose(predict(model), before, rtol=0, atol=1e-6)
    if trained is not None:
        assert_same(to_numpy(model(x(), training=True)), trained)


@over_models
def test_every_adapter_trains_and_nothing_else(build):
    model, report = adapt(build)
    compile_(model)
    before = [(w, to_numpy(w)) for w in model.weights]
    fit(model)
    factors = {id(w) for row in report for w in row.layer.lora.weights}
    assert len(factors) == 2 * len(report) > 0
    for weight, value in before:
        moved = np.abs(to_numpy(weight) - value).max() > 0
        assert moved == (id(weight) in factors), weight.path


@over_models
def test_merged_agrees_with_training_path(build):
    model, report = adapt(build)
    for seed, row in enumerate(report):
        fill(row.layer.lora.b, seed, 0.3)
    merged = to_numpy(model(x()))
    for row in report:
        row.layer.merge_weights = False
    scale = np.abs(merged).max()
    np.testing.assert_allclose(to_numpy(model(x())), merged, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("build", "undo"),
    slow_but(
        (
            "sequential-remove_lora",
            "convolutional-remove_lora",
            "transformer-merge_lora",
            "subclassed-merge_lora",
        ),
        itertools.product(PRETRAINED, ["merge_lora", "remove_lora"]),
    ),
)
def test_undoing_gives_the_plain_model_back(build, undo, tmp_path):
    plain = compile_(build())
    plain.layers[1].trainable = False
    fit(plain, 1)
    plain.save_weights(tmp_path / "plain.weights.h5")
    before, outputs = flags(plain), predict(plain)
    apply_lora(plain, rank=2, exclude=[HEADS[build]] if build in HEADS else None)
    fit(plain)
    adapted = predict(plain)
    getattr(keras_lora, undo)(plain)
    assert flags(plain) == before
    if undo == "remove_lora":
        assert_same(predict(plain), outputs)
    else:
        assert_same(predict(plain), adapted)
    plain.load_weights(tmp_path / "plain.weights.h5")
    assert_same(predict(plain), outputs)
    fit(plain)


@pytest.mark.parametrize(
    ("build", "bias"),
    slow_but(
        ("sequential-none", "convolutional-all", "subclassed-all"),
        [*((build, "all") for build in PRETRAINED), (sequential, "none")],
    ),
)
def test_reload_goes_on_as_if_never_stopped(build, bias, tmp_path):
    model, report = adapt(build, bias=bias, dropout=0.3, also_train=["head"])
    compile_(model)
    fit(model)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert_same(predict(resumed), predict(model))
    again = keras_lora.summary(resumed)
    assert [row[2:] for row in again] == [row[2:] for row in report]
    assert [row.path for row in again] == [row.path for row in report]
    assert [w.trainable for w in resumed.weights] == [
        w.trainable for w in model.weights
    ]
    assert fit(resumed) == fit(model)
    keras_lora.remove_lora(resumed)
    keras_lora.remove_lora(model)
    assert [f[:2] for f in flags(resumed)] == [f[:2] for f in flags(model)]


@pytest.mark.parametrize("build", slow_but(["sequential", "subclassed"], PRETRAINED))
def test_export_of_an_adapted_model(build, tmp_path):
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    model, report = adapt(build)
    for seed, row in enumerate(report):
        fill(row.layer.lora.b, seed, 0.3)
    before = flags(model)
    keras_lora.export(model, tmp_path / "artifact")
    artifact = tf.saved_model.load(tmp_path / "artifact")
    assert_same(artifact.serve(x()).numpy(), model.predict(x(), verbose=0))
    assert flags(model) == before


@over_models
def test_dry_run_changes_nothing(build):
    model = compile_(build())
    fit(model, 1)
    before = flags(model), [to_numpy(w) for w in model.weights]
    optimizer = model.optimizer
    kwargs = {"exclude": [HEADS[build]] if build in HEADS else None}
    planned = apply_lora(model, rank=2, dry_run=True, **kwargs)
    assert flags(model) == before[0]
    assert model.optimizer is optimizer
    for old, new in zip(before[1], model.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))
    real = apply_lora(model, rank=2, **kwargs)
    title, *lines = str(planned).splitlines()
    assert [title.partition(" (dry run")[0], *lines] == str(real).splitlines()
    assert "dry run: nothing was changed" in title
    assert repr(planned).startswith("<dry run of ")
    assert "dry run" not in repr(real)


def test_compiled_model_is_compiled_again():
    model = compile_(sequential())
    fit(model, 1)
    apply_lora(model, rank=2)
    kernel = to_numpy(model.layers[0].kernel)
    fit(model, 1)  # without compiling
    np.testing.assert_array_equal(to_numpy(model.layers[0].kernel), kernel)
    assert np.abs(to_numpy(model.layers[0].lora.b)).max() > 0
    assert float(model.optimizer.learning_rate) == pytest.approx(0.02)


def test_all_linear_leaves_the_head_out():
    expected = {
        sequential: ["first", "dense"],
        convolutional: ["conv1d_a", "conv2d_a", "conv3d_a"],
    }
    for build, paths in expected.items():
        assert [row.path for row in apply_lora(build())] == paths
    paths = [row.path for row in apply_lora(transformer())]
    assert "head" not in paths
    assert "tokens" not in paths
    assert {"attention/query", "grouped/query", "shared", "inner/up"} <= set(paths)
    assert any(path.startswith("steps/") for path in paths)


@pytest.mark.parametrize(
    "target, expected",
    [
        (["query"], ["attention/query", "grouped/query"]),
        (["attention/query", "up"], ["attention/query", "inner/up"]),
        (["attention.query"], ["attention/query"]),
        (r"attention/(query|value)", ["attention/query", "attention/value"]),
        (keras.layers.Embedding, ["tokens"]),
        ([keras.layers.Embedding, "shared"], ["tokens", "shared"]),
        (lambda path, layer: path.endswith("key"), ["attention/key", "grouped/key"]),
    ],
)
def test_targets(target, expected):
    assert [row.path for row in apply_lora(transformer(), target=target)] == expected


def test_exclude():
    report = apply_lora(transformer(), target=r".*(query|key)", exclude=r"grouped/.*")
    assert [row.path for row in report] == ["attention/query", "attention/key"]


def test_patterns():
    report = apply_lora(
        transformer(),
        rank=4,
        target=r".*(query|key)",
        rank_pattern={"attention/query": 2, "query": 3},
        alpha_pattern={r"grouped.key": 7},
    )
    assert {row.path: (row.rank, row.alpha) for row in report} == {
        "attention/query": (2, 2),
        "attention/key": (4, 4),
        "grouped/query": (3, 3),
        "grouped/key": (4, 7),
    }


def test_shared_layer_is_adapted_once():
    report = apply_lora(transformer(), target=["shared"])
    assert len(report) == 1


def test_also_train():
    model, _ = adapt(transformer, also_train=["head", "tokens"])
    names = {w.path for w in model.trainable_weights if "lora" not in w.path}
    assert names == {"head/kernel", "head/bias", "tokens/embeddings"}


def test_bias():
    model, report = adapt(transformer, target=["query"], bias="lora_only")
    assert {w.path for w in model.trainable_weights if "lora" not in w.path} == {
        "attention/query/bias",
        "grouped/query/bias",
    }
    assert len(report) == 2


def test_batch_normalization_is_frozen_as_a_layer():
    model, _ = adapt(sequential)
    assert not model.layers[1].trainable


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target": ["querry"]}, "`target` 'querry'.*Did you mean.*'query'"),
        ({"target": "querry"}, "`target` 'querry' matches no layer"),
        ({"target": ["query", "kee"]}, "'kee'"),
        ({"target": "("}, "not a regular expression"),
        ({"target": []}, "`target` must be"),
        ({"target": 7}, "`target` must be"),
        ({"target": keras.layers.Conv2D}, "'Conv2D' matches no layer"),
        (
            {"target": ["layer_normalization"]},
            "a LayerNormalization, which has no weight",
        ),
        ({"exclude": ["nothing"]}, "`exclude` 'nothing' matches no layer"),
        ({"exclude": ".*"}, "leaves nothing"),
        ({"rank_pattern": {"nothing": 2}}, "`rank_pattern` key 'nothing'"),
        ({"alpha_pattern": {"nothing": 2}}, "`alpha_pattern` key 'nothing'"),
        ({"rank_pattern": [2]}, "`rank_pattern` must be a dict"),
        ({"rank_pattern": {"query": 0}}, "whole number >= 1"),
        ({"alpha_pattern": {"query": -1}}, "finite number"),
        ({"also_train": ["nothing"]}, "`also_train` 'nothing'"),
        ({"target": ["head"], "also_train": ["head"]}, "in `also_train`"),
        ({"rank": 0}, "whole number >= 1"),
        ({"alpha": 0}, "finite number"),
        ({"dropout": 1}, r"in \[0, 1\)"),
        ({"bias": "some"}, "bias='some'"),
    ],
)
def test_what_matches_nothing_is_an_error_and_changes_nothing(arguments, message):
    model = transformer()
    before, outputs = flags(model), to_numpy(model(x()))
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **arguments)
    assert flags(model) == before
    np.testing.assert_array_equal(to_numpy(model(x())), outputs)


def test_applying_twice_is_an_error():
    model, _ = adapt(sequential)
    with pytest.raises(ValueError, match="'first' has an adapter"):
        apply_lora(model)


def test_constraint_is_passed_over_and_named():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4, kernel_constraint="non_neg", name="bound"),
            keras.layers.Dense(4, name="free"),
            keras.layers.Dense(3),
        ]
    )
    with pytest.raises(ValueError, match="kernel_constraint"):
        apply_lora(model, target=["bound"])
    report = apply_lora(model)
    assert [row.path for row in report] == ["free"]
    assert "kernel_constraint" in report.skipped["bound"]
    assert "Skipped bound" in str(report)


@pytest.mark.filterwarnings("ignore:`build")
def test_layer_that_was_never_built_is_passed_over():
    model = Pretrained()
    model.spare = keras.layers.Dense(3)
    model(np.zeros((1, 6), "float32"))
    report = apply_lora(model, exclude=["head"])
    assert report.skipped == {"spare": "it was never built."}
    with pytest.raises(ValueError, match="spare: it was never built"):
        keras_lora.remove_lora(model)
        apply_lora(model, target=["spare"])


def test_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = transformer()
    before = flags(model)
    build, calls = keras_lora.LoRALayer.build_adapter, []

    def fail_at_third(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        build(layer)

    monkeypatch.setattr(keras_lora.LoRALayer, "build_adapter", fail_at_third)
    with pytest.raises(MemoryError):
        apply_lora(model)
    assert flags(model) == before


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's own register")
def test_torch_knows_the_parameters_of_what_there_is():
    model = transformer()
    before = [id(parameter) for parameter in model.parameters()]
    apply_lora(model, dry_run=True)
    assert [id(parameter) for parameter in model.parameters()] == before
    apply_lora(model)
    expected = {id(variable.value) for variable in model.weights}
    assert expected <= {id(parameter) for parameter in model.parameters()}


@keras.saving.register_keras_serializable(package="tests")
class NamedDense(keras.layers.Dense):
    """A subclass that leaves `call` as it is."""


@keras.saving.register_keras_serializable(package="tests")
class DoubledDense(keras.layers.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


def with_subclass(cls):
    return keras.Sequential(
        [keras.Input((6,)), cls(4, name="own"), keras.layers.Dense(3, name="head")]
    )


def test_subclass_with_the_same_call_is_adapted(tmp_path):
    model = with_subclass(NamedDense)
    apply_lora(model)
    assert isinstance(model.layers[0], NamedDense)
    assert isinstance(model.layers[0], keras_lora.LoRADense)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(loaded), predict(model))
    keras_lora.merge_lora(model)
    assert type(model.layers[0]) is NamedDense


def test_subclass_with_another_call_is_adapted_where_it_is_named():
    with pytest.raises(ValueError, match=r"matches no layer.*DoubledDense"):
        apply_lora(with_subclass(DoubledDense))
    model = with_subclass(DoubledDense)
    apply_lora(model, rank=2, target=["own"])
    own = model.layers[0]
    assert isinstance(own, DoubledDense)
    fill(own.lora.b, 1)
    outputs = predict(model)
    plain = with_subclass(DoubledDense)
    values = [own.merged_kernel("float32"), own.bias, *model.layers[1].weights]
    plain.set_weights([*map(to_numpy, values)])
    assert_close(outputs, predict(plain))
    keras_lora.merge_lora(model)
    assert type(own) is DoubledDense
    assert_close(predict(model), outputs, 1e-6)


@keras.saving.register_keras_serializable(package="tests.apply")
class Block(keras.layers.Layer):
    """Multiplies with one layer's kernel by itself, and calls the other."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gate = keras.layers.Dense(6, name="gate")
        self.up = keras.layers.Dense(6, name="up")

    def build(self, shape):
        self.gate.build(shape)
        self.up.build(shape)

    def call(self, inputs):
        return self.up(keras.ops.matmul(inputs, self.gate.kernel))


def test_kernel_that_the_parent_reads_itself_is_passed_over():
    """Its adapter would train nothing and show only once merged, as in Gemma 4."""
    model = keras.Sequential(
        [keras.Input((6,)), Block(name="block"), keras.layers.Dense(3, name="head")]
    )
    report = apply_lora(model)
    assert [row.path for row in report] == ["block/up"]
    assert "Block reads the kernel of this layer itself" in report.skipped["block/gate"]
    keras_lora.remove_lora(model)
    with pytest.warns(UserWarning, match="'block/gate': Block reads the kernel"):
        apply_lora(model, target=["gate"])


def prefixed(name=None):
    """As KerasHub's: a model puts its name before those of its layers."""
    prefix = "" if name is None else f"{name}_"
    inputs = keras.Input((6,))
    inner_inputs = keras.Input((6,))
    hidden = keras.layers.Dense(6, name=f"{prefix}up")(inner_inputs)
    inner = keras.Model(inner_inputs, hidden, name=name)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(inner(inputs)))


def test_a_model_that_got_a_name_has_the_same_paths(tmp_path):
    assert [row.path for row in apply_lora(prefixed())] == ["functional/up"]
    model = prefixed("encoder")
    assert [row.path for row in apply_lora(model)] == ["encoder/up"]
    keras_lora.save_adapter(model, tmp_path / "adapter")
    again = prefixed("encoder")
    keras_lora.load_adapter(again, tmp_path / "adapter")


@keras.saving.register_keras_serializable(package="tests")
class Renaming(keras.Model):
    """Its layers have other names once it is loaded."""

    def __init__(self, prefix="first", **kwargs):
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(6, name=f"{prefix}_up")(inputs)
        outputs = keras.layers.Dense(3, name=f"{prefix}_head")(hidden)
        super().__init__(inputs, outputs, **kwargs)

    def get_config(self):
        return {"prefix": "second"}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def test_a_model_whose_layers_get_other_names_is_loaded(tmp_path):
    model = Renaming()
    apply_lora(model)
    for layer in adapted_sites(model):
        fill(layer.lora.b, 1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [row.path for row in keras_lora.summary(loaded)] == ["second_up"]
    trained = [[v.name for v in m.trainable_variables] for m in (model, loaded)]
    assert trained[0] == trained[1] == ["a", "b"]
    assert_same(predict(loaded), predict(model))


def test_a_class_can_be_registered(monkeypatch):
    from keras_lora.layers import kinds

    monkeypatch.setattr(kinds, "LORA_CLASSES", dict(kinds.LORA_CLASSES))

    @keras_lora.register_lora_layer
    class LoRADoubledDense(keras_lora.LoRADense, DoubledDense):
        plain_class = DoubledDense

        def finish(self, outputs):
            return 2 * super().finish(outputs)

    model = with_subclass(DoubledDense)
    outputs = to_numpy(model(x()))
    apply_lora(model, target=["own"])
    np.testing.assert_array_equal(to_numpy(model(x())), outputs)
    kinds.lora_class_of.cache_clear()
    with pytest.raises(ValueError, match="plain_class"):
        keras_lora.register_lora_layer(keras.layers.Dense)


@pytest.mark.skipif(
    not hasattr(keras.layers, "ReversibleEmbedding"), reason="came with Keras 3.13"
)
@pytest.mark.parametrize("reverse_dtype", [None, "float32"])
@pytest.mark.parametrize("how", ["target", "rows"])
def test_a_tied_head_over_float32_inputs_keeps_their_dtype(how, reverse_dtype):
    """Keras casts an embedding's table, and not its inputs."""
    layer = keras.layers.ReversibleEmbedding(
        9, 6, dtype="mixed_bfloat16", reverse_dtype=reverse_dtype, name="table"
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 6)).astype("float32")
    layer(np.zeros((2, 3), "int32"))
    before = layer(x, reverse=True)
    rows = {"target": None, "trainable_token_indices": {"table": [2, 4]}}
    chosen = {"target": "table", "rank": 2} if how == "target" else rows
    keras_lora.apply_lora(layer, **chosen)
    for training in (False, True):
        after = layer(x, reverse=True, training=training)
        assert after.dtype == before.dtype
        assert_close(after, before, 1e-6)


@pytest.mark.skipif(
    not hasattr(keras.layers, "ReversibleEmbedding"), reason="came with Keras 3.13"
)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_reversible_embedding_shares_one_update(cap, policy):
    ids = keras.Input((5,), dtype="int32")
    layer = keras.layers.ReversibleEmbedding(
        11, 6, logit_soft_cap=cap, name="tied", dtype=policy
    )
    model = keras.Model(ids, layer(layer(ids), reverse=True))
    data = np.random.default_rng(1).integers(0, 11, (3, 5))
    before = to_numpy(model(data))
    report = apply_lora(model, target=["tied"], rank=2)
    np.testing.assert_array_equal(to_numpy(model(data)), before)
    fill(layer.lora.a, 1, 0.5)
    merged = to_numpy(model(data))
    assert np.abs(merged - before).max() > 0.1
    tolerance = 1e-5 if policy == "float32" else 0.03
    scale = np.abs(merged).max()
    trained = to_numpy(model(data, training=True))
    np.testing.assert_allclose(trained, merged, rtol=0, atol=tolerance * scale)
    with keras_lora.merged(model):
        inside = to_numpy(model(data))
    keras_lora.merge_lora(model)
    assert type(layer) is keras.layers.ReversibleEmbedding
    np.testing.assert_array_equal(inside, to_numpy(model(data)))
    np.testing.assert_allclose(
        merged, to_numpy(model(data)), rtol=0, atol=tolerance * scale
    )
    assert len(report) == 1


@pytest.mark.slow
def test_two_hundred_layers_and_their_report():
    inputs = keras.Input((4,))
    outputs = inputs
    for _ in range(200):
        outputs = keras.layers.Dense(4)(outputs)
    model = keras.Model(inputs, outputs)
    report = apply_lora(model, rank=1)
    assert len(report) == 199
    assert len({row.path for row in report}) == 199


@pytest.mark.parametrize(
    "keyword, ours",
    [
        ("r", "rank"),
        ("lora_rank", "rank"),
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
        ("target_modules", "target"),
        ("modules_to_save", "also_train"),
        ("exclude_modules", "exclude"),
        ("init_lora_weights", "method` of `initialize_lora"),
        ("dora_rank", "rank` beside `use_dora=True"),
    ],
)
def test_words_of_other_libraries_are_answered_with_ours(keyword, ours):
    model = sequential()
    before = flags(model)
    message = f"apply_lora has no `{keyword}`; the keyword here is `{ours}`"
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **{keyword: 4})
    assert flags(model) == before


def test_our_words_are_all_that_an_editor_shows():
    parameters = inspect.signature(apply_lora).parameters
    assert list(parameters)[:4] == ["model", "rank", "alpha", "dropout"]
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    with pytest.raises(TypeError, match="rnak"):
        apply_lora(sequential(), rnak=4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target": "all_linear"}, r"Did you mean 'all-linear'\?$"),
        ({"target": ["all_linear"]}, "Did you mean 'all-linear'"),
        ({"target": ["all-linear"]}, 'not in a list: target="all-linear"'),
        ({"target": "frist"}, r"Did you mean 'first'\?$"),
        ({"target": "dnse"}, r"Did you mean 'dense'(, '\w+')*\?$"),
        ({"exclude": "all_linear"}, "There are: "),
    ],
)
def test_what_is_suggested_is_suggested_once(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        apply_lora(sequential(), **arguments)
    words = str(error.value).partition("Did you mean ")[2].rstrip("?").split(", ")
    assert len(words) == len(set(words))


def test_a_rank_that_no_update_can_have_is_warned_of_once(tmp_path):
    model = convolutional()
    with pytest.warns(UserWarning, match="The rank is higher") as caught:
        apply_lora(model, rank=5, rank_pattern={"conv2d_a": 4}, target=".*")
    (warning,) = caught
    assert warning.filename == __file__
    # Kernels of 3 x 4, 16 x 2 and 24 x 3; conv2d_a has 8 x 4.
    assert "in 'conv1d_a' (3), 'conv3d_a' (2), 'head' (3). Give" in str(warning.message)
    keras_lora.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        keras_lora.load_adapter(convolutional(), tmp_path)
        keras_lora.load_adapter(model, tmp_path)
        apply_lora(convolutional(), rank=2)
        apply_lora(transformer(), rank=8)  # each of 8 x 8 at least
    keras_lora.remove_lora(model)
    before = flags(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="The rank is higher"):
            apply_lora(model, rank=5)
    assert flags(model) == before


def test_a_warning_of_a_kernel_that_its_owner_reads_names_the_callers_line():
    model = keras.Sequential([keras.Input((6,)), Block(name="block")])
    with pytest.warns(UserWarning, match="Block reads the kernel") as caught:
        apply_lora(model, target=["gate"], rank=1)
    assert caught[0].filename == __file__


# What apply_lora gives; without a name a layer is called after its kind.
ALONE = [x for x in CASES if not {"enable_lora", "factorization"} & x.lora.keys()]
ALONE = [(x, True) for x in ALONE] + [(x, False) for x in ALONE if x in KINDS]


@pytest.mark.parametrize(("case", "named"), ALONE, ids=lambda x: getattr(x, "name", x))
def test_one_layer_by_itself(case, named, tmp_path):
    def build():
        set_seed(1)
        cls = case.layer_class.plain_class
        layer = cls(**case.arguments, **({"name": "alone"} if named else {}))
        layer(case.inputs(2))
        return layer

    layer, other, inputs = build(), build(), case.inputs(3)
    plain = to_numpy(layer(inputs))
    report = apply_lora(layer, rank=2, target=".*")
    (row,) = report
    assert row.layer is layer
    assert row.path == (keras_lora.summary(layer)[0].path) != ""
    assert report.trained == sum(v.size for v in map(to_numpy, layer.trainable_weights))
    assert f"Trained: {report.trained:,} of {report.total:,}" in str(report)
    fill(layer.lora.a, seed=1)
    fill(layer.lora.b, seed=2)
    tuned = to_numpy(layer(inputs))
    keras_lora.save_adapter(layer, tmp_path / "adapter")
    (loaded,) = keras_lora.load_adapter(other, tmp_path / "adapter")
    assert loaded.path == row.path
    np.testing.assert_array_equal(to_numpy(other(inputs)), tuned)
    with keras_lora.merged(other), keras_lora.disabled(other):
        assert_close(other(inputs), plain)
    keras_lora.mark_only_lora_as_trainable(layer)
    assert len(keras_lora.analyze(layer)) == 1
    keras_lora.remove_lora(other)
    bank = keras_lora.AdapterBank(other, {"it": tmp_path / "adapter"})
    ids = bank.ids(["it", None, "it"])
    found = to_numpy(bank({"inputs": inputs, "adapter": ids}))
    assert_close(found[[0, 2]], tuned[[0, 2]])
    assert_close(found[1], plain[1])
    bank.release()
    keras_lora.merge_lora(layer)
    assert type(layer) is type(other)
    assert_close(layer(inputs), tuned)


def test_a_layer_without_weights_is_refused_as_what_it_is():
    inputs = keras.Input((4, 6))
    hidden = keras.layers.Flatten(name="flat")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    for target in ("flat", ["flat"]):
        with pytest.raises(ValueError, match="the layer 'flat', a Flatten, which"):
            apply_lora(model, target=target)


def test_export_of_a_plain_model_names_the_function_for_it(tmp_path):
    model = sequential()
    apply_lora(model, rank=2)
    keras_lora.merge_lora(model)
    with pytest.raises(
        ValueError, match=r"merged\. Export a plain .* model\.export\(path\)"
    ):
        keras_lora.export(model, tmp_path / "served")
