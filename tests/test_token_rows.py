"""trainable_token_indices: rows of a frozen table that train by themselves."""

import keras
import numpy as np
import pytest
from layer_cases import fill, to_numpy
from shared import assert_close, assert_equal_bits

import keras_lora

L = keras.layers
IDS = [7, 3, 11]
X = np.array([[1, 2, 3, 7, 5], [7, 7, 9, 0, 11]], "int32")


def tied(vocabulary=12, dtype="float32"):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,), dtype="int32")
    table = L.ReversibleEmbedding(vocabulary, 6, name="token_embedding", dtype=dtype)
    hidden = L.Dense(6, name="middle", dtype=dtype)(table(inputs))
    return keras.Model(inputs, table(hidden, reverse=True))


def untied(dtype="float32"):
    keras.utils.set_random_seed(4)
    inputs = keras.Input((5,), dtype="int32")
    hidden = L.Embedding(12, 6, name="table", dtype=dtype)(inputs)
    return keras.Model(inputs, L.Dense(12, name="head", dtype=dtype)(hidden))


def with_rows(model, name, rows, ids=IDS):
    """A plain model of which some rows of a table are others."""
    table = model.get_layer(name).embeddings
    values = to_numpy(table)
    values[ids] = rows
    table.assign(values)
    return model


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("build, name", [(tied, "token_embedding"), (untied, "table")])
def test_rows_take_the_place_of_the_tables_own(build, name, dtype):
    model, before = build(dtype=dtype), to_numpy(build(dtype=dtype)(X))
    report = keras_lora.apply_lora(model, target=None, trainable_token_indices=IDS)
    (row,) = report
    assert (row.path, row.rank, row.parameters) == (name, None, 3 * 6)
    lora = model.get_layer(name).lora
    assert lora.indices == tuple(IDS)
    assert lora.rows.dtype == "float32"
    assert report.trained == 3 * 6
    for training in (True, False):
        assert_equal_bits(model(X, training=training), before)
    rows = np.random.default_rng(1).standard_normal((3, 6)).astype("float32")
    lora.rows.assign(rows)
    expected = to_numpy(with_rows(build(dtype=dtype), name, rows)(X))
    assert np.abs(expected - before).max() > 0.1
    for training in (True, False):
        assert_equal_bits(model(X, training=training), expected)
    with keras_lora.disabled(model):
        assert_equal_bits(model(X), before)
    with keras_lora.merged(model):
        assert_equal_bits(model(X), expected)
    keras_lora.merge_lora(model)
    assert type(model.get_layer(name)) in (L.ReversibleEmbedding, L.Embedding)
    assert_equal_bits(model(X), expected)


def test_only_these_rows_move():
    model = tied()
    keras_lora.apply_lora(model, target=None, trainable_token_indices=IDS)
    layer = model.get_layer("token_embedding")
    table, rows = to_numpy(layer.embeddings), to_numpy(layer.lora.rows)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss, jit_compile=False)
    model.fit(X, X, epochs=2, verbose=0)
    assert_equal_bits(layer.embeddings, table)
    assert (np.abs(to_numpy(layer.lora.rows) - rows).max(axis=1) > 1e-3).all()
    trained = [v.path for v in model.trainable_weights]
    assert trained == [layer.lora.rows.path]


def test_gradients_are_those_of_the_whole_tables_rows():
    """A step of SGD over rows alone, and over the whole table of a plain model."""
    model, plain = tied(), tied()
    keras_lora.apply_lora(model, target=None, trainable_token_indices=IDS)
    plain.get_layer("middle").trainable = False
    for each in (model, plain):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        each.compile(keras.optimizers.SGD(0.5), loss, jit_compile=False)
        each.fit(X, X, verbose=0)
    rows = to_numpy(model.get_layer("token_embedding").lora.rows)
    assert_close(rows, to_numpy(plain.get_layer("token_embedding").embeddings)[IDS])


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="there steps have a way of their own",
)
@pytest.mark.parametrize("xla", [True, False])
def test_a_compiled_step_touches_what_is_chosen(xla):
    import tensorflow as tf

    model = untied()
    keras_lora.apply_lora(model, target=None, trainable_token_indices=IDS)
    layer = model.get_layer("table")
    fill(layer.lora.rows, 1)
    weights = np.random.default_rng(2).standard_normal((2, 5, 6)).astype("float32")

    @tf.function(
        jit_compile=xla, input_signature=[tf.TensorSpec((None, None), "int32")]
    )
    def step(ids):
        with tf.GradientTape() as tape:
            outputs = layer(ids, training=True)
            loss = tf.reduce_sum(outputs * weights)
        return outputs, tape.gradient(loss, layer.lora.rows.value)

    outputs, gradient = step(X)
    expected = to_numpy(layer.embeddings)
    expected[IDS] = to_numpy(layer.lora.rows)
    assert_equal_bits(outputs, expected[X])
    for place, index in enumerate(IDS):
        assert_close(gradient[place], weights[index == X].sum(axis=0))
    kinds = {op.type for op in step.get_concrete_function().graph.get_operations()}
    assert ("ScatterNdNonAliasingAdd" in kinds) == (not xla)
    assert "TensorScatterUpdate" not in kinds  # which copies all outputs
    with keras_lora.disabled(model):
        assert_equal_bits(step(X)[0], to_numpy(layer.embeddings)[X])


def test_beside_lora_and_in_keras_files(tmp_path):
    model = tied()
    report = keras_lora.apply_lora(
        model,
        rank=2,
        target=["middle"],
        trainable_token_indices={"token_embedding": IDS},
    )
    assert [row.rank for row in report] == [None, 2]
    assert "token_embedding" in str(report)
    fill(model.get_layer("token_embedding").lora.rows, 1)
    fill(model.get_layer("middle").lora.b, 2)
    expected = to_numpy(model(X))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_equal_bits(loaded(X), expected)
    assert loaded.get_layer("token_embedding").lora.indices == tuple(IDS)
    keras_lora.remove_lora(model)
    assert_equal_bits(model(X), tied()(X))


def test_a_checkpoint_of_tensorflow_keeps_rows(tmp_path):
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    model = tied()
    keras_lora.apply_lora(model, target=None, trainable_token_indices=IDS)
    rows = model.get_layer("token_embedding").lora.rows
    fill(rows, 1)
    expected = to_numpy(model(X))
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    fill(rows, 2)
    tf.train.Checkpoint(model=model).restore(path)
    assert_equal_bits(model(X), expected)


def test_columns_of_a_head():
    model, before = untied(), to_numpy(untied()(X))
    ids = {"head": [2, 0]}
    keras_lora.apply_lora(model, target=None, trainable_token_indices=ids)
    head = model.get_layer("head")
    assert_equal_bits(model(X), before)
    fill(head.lora.rows, 5)
    kernel = to_numpy(head.kernel)
    kernel[:, [2, 0]] = to_numpy(head.lora.rows).T
    plain = untied()
    plain.get_layer("head").kernel.assign(kernel)
    for training in (True, False):
        assert_equal_bits(model(X, training=training), plain(X))


@pytest.mark.filterwarnings("ignore:.*x.T")  # Keras's own, on torch
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_rows_beside_a_quantized_table(mode):
    model = tied()
    for name in ("token_embedding", "middle"):
        model.get_layer(name).quantize(mode)
    before = to_numpy(model(X))
    keras_lora.apply_lora(model, target=None, trainable_token_indices=IDS)
    lora = model.get_layer("token_embedding").lora
    fill(lora.rows, 3)
    for training in (True, False):
        found = to_numpy(model(X, training=training))
        assert found.shape == before.shape
        hidden = keras.Model(model.input, model.get_layer("middle").output)
        columns = to_numpy(hidden(X)) @ to_numpy(lora.rows).T
        assert_close(found[..., IDS], columns)
    with keras_lora.disabled(model):
        assert_close(model(X), before, 1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ([3, 3], r"\[3\] more than once"),
        ([12], "12 rows"),
        ([-1], "whole numbers >= 0"),
        ([], "whole numbers >= 0"),
        ([1.5], "whole numbers >= 0"),
        ([True], "whole numbers >= 0"),
        (7, "whole numbers >= 0"),
        ({"middle2": [1]}, "matches no layer"),
        ({"flat": [1]}, "neither an embedding nor a Dense head"),
        ({}, "`trainable_token_indices` must name tokens"),
        (None, "`trainable_token_indices` must name tokens"),
    ],
)
def test_ids_that_are_none(given, message):
    model = tied()
    model = keras.Model(model.input, L.Flatten(name="flat")(model.output))
    before = to_numpy(model(X))
    with pytest.raises(ValueError, match=message):
        keras_lora.apply_lora(model, target=None, trainable_token_indices=given)
    assert_equal_bits(model(X), before)
    assert not [v for v in model.weights if "lora" in v.path]


def test_a_table_is_a_target_or_has_rows():
    with pytest.raises(ValueError, match="a table cannot have both an update and rows"):
        keras_lora.apply_lora(
            tied(), target=["token_embedding"], trainable_token_indices=IDS
        )
    with pytest.raises(ValueError, match="in `also_train`"):
        keras_lora.apply_lora(
            untied(), also_train=["head"], trainable_token_indices={"head": [1]}
        )
    inputs = keras.Input((5,), dtype="int32")
    outputs = L.Add()([L.Embedding(9, 3)(inputs), L.Embedding(9, 3)(inputs)])
    two = keras.Model(inputs, outputs)
    with pytest.raises(ValueError, match=r"2 embeddings, .*as a dict"):
        keras_lora.apply_lora(two, target=None, trainable_token_indices=[1])
    plain = keras.Sequential([keras.Input((5,)), L.Dense(3)])
    with pytest.raises(ValueError, match="0 embeddings"):
        keras_lora.apply_lora(plain, target=None, trainable_token_indices=[1])


def test_adapter_files_come_back(tmp_path):
    model = tied()
    keras_lora.apply_lora(model, rank=2, target=["middle"], trainable_token_indices=IDS)
    fill(model.get_layer("token_embedding").lora.rows, 1)
    fill(model.get_layer("middle").lora.b, 2)
    expected = to_numpy(model(X))
    keras_lora.save_adapter(model, tmp_path / "adapter")
    plain = tied()
    report = keras_lora.load_adapter(plain, tmp_path / "adapter")
    assert [row.rank for row in report] == [None, 2]
    assert_equal_bits(plain(X), expected)
    fill(plain.get_layer("token_embedding").lora.rows, 7)
    keras_lora.load_adapter(plain, tmp_path / "adapter")  # over adapters
    assert_equal_bits(plain(X), expected)
    other = tied()
    keras_lora.apply_lora(other, rank=2, target=["middle"], trainable_token_indices=[1])
    with pytest.raises(ValueError, match=r"trainable_token_indices=.*\(1,\).*remove"):
        keras_lora.load_adapter(other, tmp_path / "adapter")
    with pytest.raises(ValueError, match="which a bank cannot hold"):
        keras_lora.AdapterBank(tied(), {"one": tmp_path / "adapter"})


def test_rows_alone_in_a_file(tmp_path):
    model = untied()
    tokens = {"table": [4, 2], "head": [1]}
    keras_lora.apply_lora(model, target=None, trainable_token_indices=tokens)
    for seed, name in enumerate(tokens):
        fill(model.get_layer(name).lora.rows, seed)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    plain = untied()
    keras_lora.load_adapter(plain, tmp_path / "adapter")
    assert_equal_bits(plain(X), model(X))
    small = keras.Sequential(
        [keras.Input((5,), dtype="int32"), L.Embedding(3, 6, name="table")]
    )
    small.add(L.Dense(12, name="head"))
    with pytest.raises(ValueError, match="the table has 3 rows"):
        keras_lora.load_adapter(small, tmp_path / "adapter")
    assert not [v for v in small.weights if "lora" in v.path]


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("ties", [True, False])
def test_the_file_is_pefts(ties, tmp_path):
    """Live: PEFT's rows are what its table gives here, and ours are merged there."""
    import peft
    import torch
    from families import DECODER
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**DECODER, tie_word_embeddings=ties)
    theirs = LlamaForCausalLM(config).eval()
    base = theirs.model.embed_tokens.weight.detach().numpy().copy()
    tuned = peft.get_peft_model(
        theirs,
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[9, 3]),
    ).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.tensor([[1, 9, 3, 4]])
    tuned.save_pretrained(tmp_path / "theirs")
    inputs = keras.Input((4,), dtype="int32")
    embedded = L.Embedding(*base.shape, name="embed_tokens")(inputs)
    query = theirs.model.layers[0].self_attn.q_proj
    outputs = L.Dense(query.out_features, use_bias=False, name="query")(embedded)
    table, model = keras.Model(inputs, embedded), keras.Model(inputs, outputs)
    table.layers[1].embeddings.assign(base)
    names = {"embed_tokens": "model.embed_tokens"}
    names["query"] = "model.layers.0.self_attn.q_proj"
    found = keras_lora.Adapter.read(tmp_path / "theirs")
    rows = found.tensors["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    keras_lora.apply_lora(
        model, rank=2, target=["query"], trainable_token_indices=[9, 3]
    )
    table.layers[1].lora.rows.assign(rows)
    with torch.no_grad():
        embedded = tuned.get_input_embeddings()(ids).numpy()
    assert_equal_bits(table(ids.numpy()), embedded)
    keras_lora.save_adapter(model, tmp_path / "ours", names=names)
    torch.manual_seed(0)
    again = LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=ties)).eval()
    loaded = peft.PeftModel.from_pretrained(again, str(tmp_path / "ours")).eval()
    merged = loaded.merge_and_unload()
    assert_equal_bits(merged.model.embed_tokens.weight[[9, 3]].detach().numpy(), rows)


def test_names_of_transformers(tmp_path):
    from backbones import backbone

    model = backbone("Llama3Backbone")
    keras_lora.apply_lora(model, rank=2, target=["query"], trainable_token_indices=IDS)
    rows = model.get_layer("token_embedding").lora.rows
    fill(rows, 1)
    keras_lora.save_adapter(model, tmp_path / "adapter", names="transformers")
    found = keras_lora.Adapter.read(tmp_path / "adapter")
    assert found.config["trainable_token_indices"] == {"embed_tokens": IDS}
    key = "embed_tokens.token_adapter.trainable_tokens_delta"
    np.testing.assert_array_equal(found.tensors[key], to_numpy(rows))
    plain = backbone("Llama3Backbone")
    keras_lora.load_adapter(plain, tmp_path / "adapter", names="transformers")
    assert_equal_bits(plain.get_layer("token_embedding").lora.rows, rows)


def test_a_file_whose_parts_disagree(tmp_path):
    model = untied()
    keras_lora.apply_lora(model, target=None, trainable_token_indices={"table": IDS})
    keras_lora.save_adapter(model, tmp_path / "adapter")
    found = keras_lora.Adapter.read(tmp_path / "adapter")
    (key,) = found.tensors
    for ids, tensors, message in (
        ({"table": [1, 2]}, found.tensors, "do not belong together"),
        ({"table": IDS, "head": [1]}, found.tensors, "no rows"),
        ({"table": [1, 1, 2]}, found.tensors, "more than once"),
        ({"other": IDS}, found.tensors, "do not belong together"),
    ):
        config = {**found.config, "trainable_token_indices": ids}
        with pytest.raises(ValueError, match=message):
            keras_lora.load_adapter(untied(), keras_lora.Adapter(tensors, config))
    wide = {key: np.zeros((3, 7), "float32")}
    with pytest.raises(ValueError, match=r"shape \(3, 7\).*needs \(3, 6\)"):
        keras_lora.load_adapter(untied(), keras_lora.Adapter(wide, found.config))


def test_rows_are_combined_as_what_trained_in_full_is(tmp_path):
    def adapter(seed, ids):
        model = untied()
        keras_lora.apply_lora(
            model, rank=2, target=["head"], trainable_token_indices={"table": ids}
        )
        fill(model.get_layer("head").lora.b, seed)
        fill(model.get_layer("table").lora.rows, seed + 1)
        keras_lora.save_adapter(model, tmp_path / f"{seed}")
        return model, tmp_path / f"{seed}"

    (one, first), (two, second), (_, other) = (
        adapter(seed, ids) for seed, ids in ((1, IDS), (2, IDS), (3, IDS[::-1]))
    )
    with pytest.raises(ValueError, match=r"'table.*' in full.*average"):
        keras_lora.combine_adapters([first, second])
    with pytest.raises(ValueError, match="different rows of 'table'"):
        keras_lora.combine_adapters([first, other], heads="average")
    rows = [to_numpy(model.get_layer("table").lora.rows) for model in (one, two)]
    for heads, expected in (("average", sum(rows) / 2), (1, rows[1])):
        both = keras_lora.combine_adapters([first, second], [0.5, 2], heads=heads)
        model = untied()
        keras_lora.load_adapter(model, both)
        lora = model.get_layer("table").lora
        assert lora.indices == tuple(IDS)
        assert_close(lora.rows, expected, 1e-6)
        deltas = [to_numpy(x.get_layer("head").lora.delta()) for x in (one, two)]
        expected = 0.5 * deltas[0] + 2 * deltas[1]
        assert_close(model.get_layer("head").lora.delta(), expected)
    assert "3 rows of table" in str(both)
    for source in (first, one):
        report = keras_lora.analyze(source)
        assert [row.path for row in report] == ["head"]
        assert "Not shown: table, where only some rows train." in str(report)


def test_adapters_of_rows_alone_are_combined(tmp_path):
    model = untied()
    keras_lora.apply_lora(model, target=None, trainable_token_indices={"table": IDS})
    fill(model.get_layer("table").lora.rows, 1)
    keras_lora.save_adapter(model, tmp_path / "rows")
    loaded = untied()
    both = keras_lora.combine_adapters([tmp_path / "rows"] * 2)  # and no warning
    keras_lora.load_adapter(loaded, both)
    assert_equal_bits(loaded(X), to_numpy(model(X)))
