"""summary(): rows that programs read, and a table that people read."""

import keras
from models import MODELS
from models import functional
from models import nested
from models import sequential
from models import subclassed

import keras_lora
from keras_lora.models.paths import layer_paths


def test_rows_and_table(capsys):
    model = sequential()
    report = keras_lora.summary(model)
    assert [(row.path, row.layer, row.rank, row.alpha) for row in report] == [
        ("dense", model.layers[0], 2, 6),
        ("last", model.layers[3], 3, 3),
    ]
    assert [row.parameters for row in report] == [2 * (6 + 8), 3 * (4 + 3)]
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    first = next(line for line in printed.splitlines() if line.startswith("dense "))
    # 6 * 8 in the kernel, 8 in the bias, 28 in A and B
    assert first.split() == ["dense", "LoRADense", "2", "6", "3", "28", "33.33%"]
    normalization, plain = 2 * 8, 8 * 4 + 4
    also = f"{8 + normalization + plain} parameters in dense, batch_normalization, "
    assert f"Also trained: {also}dense_1" in printed
    assert f"of {model.count_params()} " in printed


def test_paths_are_the_same_in_every_instance():
    for build in MODELS:
        assert list(layer_paths(build())) == list(layer_paths(build()))


def test_paths_say_where_a_layer_is():
    assert [row.path for row in keras_lora.summary(nested())] == [
        "inner/dense",
        "dense",
    ]
    assert [row.path for row in keras_lora.summary(functional())] == [
        "shared",
        "dense",
    ]
    assert [row.path for row in keras_lora.summary(subclassed())] == [
        "blocks/0",
        "blocks/1",
        "heads/out",
    ]


def test_paths_do_not_change_when_adapters_are_merged():
    model = nested()
    paths = [path for path in layer_paths(model) if "lora" not in path]
    keras_lora.merge_lora(model)
    assert list(layer_paths(model)) == paths


def test_model_without_adapters_has_an_empty_table():
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    report = keras_lora.summary(plain)
    assert len(report) == 0
    assert "0 adapters: 0 parameters" in str(report)


def test_unbuilt_model_has_rows_without_parameters():
    model = keras.Sequential([keras_lora.LoRADense(3, rank=2)])
    (row,) = keras_lora.summary(model)
    assert (row.rank, row.parameters, row.share) == (2, 0, 0)


def test_only_a_model_puts_its_name_before_its_layers():
    """An attention layer by itself has the paths that it has inside a model."""
    layer = keras.layers.MultiHeadAttention(2, 4, name="attention")
    layer.build((None, 3, 8), (None, 3, 8))
    assert "attention_output" in layer_paths(layer)
