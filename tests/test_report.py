"""summary(): rows that programs read, and a table that people read."""

import math
import re
from html.parser import HTMLParser

import keras
import numpy as np
import pretrained
import pytest
from models import MODELS, functional, nested, sequential, subclassed
from seeds import set_seed

import keras_lora
from keras_lora.models.sites import layers_by_path


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
    # Eight bytes for each parameter but A's and B's.
    plain = (48 + 8) + 4 * 8 + (32 + 4) + 12
    assert f"full fine-tuning {8 * plain / 1000:.2f} kB" in printed


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_share_counts_the_kernels_of_an_int4_model_unpacked():
    inputs = keras.Input((16,))
    hidden = keras.layers.Dense(32, use_bias=False, name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, use_bias=False)(hidden))
    keras_lora.apply_lora(model, rank=2, target=["hidden"])
    model.quantize("int4")
    weights, kernel = model.get_layer("hidden").weights, 16 * 32
    packed = sum(math.prod(w.shape) for w in weights) - 2 * (16 + 32) - kernel // 2
    assert packed >= 32, "scales"
    others = packed + sum(math.prod(w.shape) for w in model.layers[-1].weights)
    share = 100 * kernel / (kernel + others)
    assert f"Adapted: weights with {share:.2f}% of the model's " in str(
        keras_lora.summary(model)
    )


def test_paths_are_the_same_in_every_instance():
    for build in MODELS:
        assert list(layers_by_path(build())) == list(layers_by_path(build()))


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
    paths = [path for path in layers_by_path(model) if "lora" not in path]
    keras_lora.merge_lora(model)
    assert list(layers_by_path(model)) == paths


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
    assert "attention_output" in layers_by_path(layer)


def small(**settings):
    layers = [
        keras.Input((6, 6, 2)),
        keras.layers.Conv2D(4, 1, name="first"),
        keras.layers.DepthwiseConv2D(2, name="depthwise"),
        keras.layers.SeparableConv2D(4, 2, name="separable"),
        keras.layers.Conv2DTranspose(3, 2, name="transposed"),
        keras.layers.Reshape((-1, 3)),
        keras.layers.LSTM(4, name="lstm"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(2, name="head"),
    ]
    model = keras.Sequential(layers)
    return model, keras_lora.apply_lora(model, rank=1, **settings)


def test_weights_that_no_adapter_reaches_are_named():
    inputs = keras.Input((4,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(9, 3, tie_weights=False, name="table")
    hidden = keras.layers.Dense(3, name="middle")(table(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(table(hidden, reverse=True)))
    report = keras_lora.apply_lora(model, rank=1, dry_run=True)
    assert report.skipped.keys() == {"table", "table/reverse_embeddings"}
    assert 'target="all"' in report.skipped["table/reverse_embeddings"]
    report = keras_lora.apply_lora(model, rank=1, target="all", dry_run=True)
    assert not report.skipped
    assert len(report) == 3

    class Own(keras.Model):
        def build(self, input_shape):
            self.inner = keras.layers.Dense(2, name="inner")
            self.inner.build(input_shape)
            self.matrix = self.add_weight(shape=(2, 2), name="matrix")
            self.built = True

        def call(self, inputs):
            return keras.ops.matmul(self.inner(inputs), self.matrix)

    model = Own()
    model(np.ones((1, 3)))
    report = keras_lora.apply_lora(model, rank=1, target="all")
    assert "belongs to the model itself" in report.skipped["matrix"]
    assert "does not say which layers make its outputs" in str(report)


def test_subclassed_models_output_layers_are_named():
    class Two(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.table = keras.layers.Embedding(7, 4)
            self.body = keras.layers.Dense(4)
            self.score = keras.layers.Dense(3)
            self.words = keras.layers.Dense(7)
            self.softmax = keras.layers.Softmax()

        def call(self, inputs):
            x = self.body(self.table(inputs["ids"]) + inputs["more"])
            return {"score": self.score(x), "words": self.softmax(self.words(x))}

    model = Two()
    model({"ids": np.ones((2, 5), "int32"), "more": np.ones((2, 5, 4))})
    report = keras_lora.apply_lora(model, rank=1)
    assert [row.path for row in report] == ["body", "score", "words"]
    assert report.notes == [
        "Output layers, adapted: score, words (leave them out with exclude=, or train "
        "them in full with also_train)"
    ]
    assert not any("call" in vars(layer) for layer in (model, *model.layers))
    keras_lora.remove_lora(model)
    report = keras_lora.apply_lora(model, exclude=["words"], also_train=["score"])
    assert report.notes == ["Output layers, frozen: words (use also_train)"]


def test_what_all_linear_passes_over_is_named():
    _, report = small()
    assert {path: why.split()[0] for path, why in report.skipped.items()} == {
        "depthwise": "DepthwiseConv2D",
        "separable/depthwise_kernel": "SeparableConv2D",
    }
    assert "Skipped depthwise: DepthwiseConv2D is not in" in str(report)
    assert "Output layers, frozen: head (use also_train)" in str(report)
    found = {row.path for row in report}
    assert found == {
        "first",
        "separable/pointwise_kernel",
        "transposed",
        "lstm/kernel",
        "lstm/recurrent_kernel",
    }
    _, report = small(exclude=["separable"], also_train=["lstm", "transposed"])
    assert list(report.skipped) == ["depthwise"]
    _, report = small(target=["first"])
    assert not report.skipped
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), keras.layers.Conv2D(4, 1), *depthwise(20)]
    )
    report = keras_lora.apply_lora(model, rank=1)
    assert len(report.skipped) == 19  # the last makes the outputs
    (line,) = [x for x in str(report).splitlines() if x.startswith("Skipped")]
    assert line.startswith("Skipped depthwise_conv2d, depthwise_conv2d_1, ")
    assert " and 11 more: " in line


def depthwise(count):
    return [keras.layers.DepthwiseConv2D(1) for _ in range(count)]


@pytest.mark.parametrize("count, words", [(0, "0 adapters"), (1, "1 adapter")])
def test_none_and_one_are_said_right(count, words):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras_lora.LoRADense(2, rank=count, use_bias=False, name="one"),
            keras.layers.Dense(1, kernel_initializer="ones", use_bias=False),
        ]
    )
    report = keras_lora.summary(model)
    assert f"{words}: {6 * count} parameters" in str(report).splitlines()
    assert f"{words[0]} adapted layer{'s' if count == 0 else ''}>" in repr(report)
    assert ("layer  kind" in str(report)) == bool(count)
    model.layers[-1].trainable = False
    plain = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    assert "Also trained: 1 parameter in dense" in str(keras_lora.summary(plain))


class Cells(HTMLParser):
    """The text of a page's cells, and the names of its tags."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.tags = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th") and self.cells:
            self.cells[-1] += data


def test_html_has_the_cells_of_the_table_and_no_tag_of_a_names():
    name = "a<script>alert(1)</script>&amp;"
    model = keras.Sequential(
        [keras.Input((4,)), keras_lora.LoRADense(2, rank=1, name="one")], name="m"
    )
    report = keras_lora.summary(model)
    report.rows[0] = report.rows[0]._replace(path=name)
    report.notes.append("<img src=x>")
    page = Cells(report._repr_html_())
    lines = [re.split(r" {2,}", x.strip()) for x in str(report).splitlines()]
    assert page.cells == [*lines[1], *lines[3]]
    assert name in page.cells
    assert set(page.tags) == {"p", "br", "table", "thead", "tbody", "tr", "th", "td"}


def saved(folder, seed=1):
    set_seed(seed)
    model = keras.Sequential(
        [keras.Input((4,)), keras_lora.LoRADense(3, rank=2, alpha=6, name="one")]
    )
    keras_lora.save_adapter(model, folder)
    return keras_lora.Adapter.read(folder)


def test_an_adapter_prints_as_a_table(tmp_path):
    adapter = saved(tmp_path)
    assert repr(adapter) == (
        "<Adapter: 1 module, rank 2, alpha 6, 17 parameters, 68 bytes>"
    )
    rows = [re.split(r" {2,}", line) for line in str(adapter).splitlines()]
    assert ["one", "(2, 4) (3, 2)", "2", "6", "14", "56 bytes"] in rows
    assert ["In full, 3 parameters: one.base_layer.bias"] in rows
    assert set(rows[3]) <= set(Cells(adapter._repr_html_()).cells)
    adapter.tensors["one.lora_B.weight"][:] = np.eye(3, 2)
    cut = keras_lora.combine_adapters([adapter], rank=1)
    values = np.linalg.svd(adapter.tensors["one.lora_A.weight"])[1]
    error = f"{values[1] / np.linalg.norm(values):.2g}"
    assert f"errors up to {error}" in repr(cut)
    assert next(x for x in str(cut).splitlines() if x.startswith("one")).endswith(error)


def test_a_large_adapter_prints_some_rows_and_the_totals():
    shape = {"A": (2, 3), "B": (4, 2)}
    tensors = {
        f"h.{n}.lora_{x}.weight": np.ones(shape[x], "float32")
        for n in range(200)
        for x in "AB"
    }
    config = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": [f"{n}" for n in range(200)],
    }
    config["alpha_pattern"] = {"h.7": 3}
    adapter = keras_lora.Adapter(tensors, config)
    lines = str(adapter).splitlines()
    assert "and 180 modules more" in lines and len(lines) < 30
    words = "200 modules, rank 2, alpha 3 to 8, 2,800 parameters, 11.2 kB"
    assert words in repr(adapter) and f"LoRA: {words}" in lines


def test_an_adapter_that_is_none_prints_too():
    adapter = keras_lora.Adapter({}, {"peft_type": "LORA"})
    assert repr(adapter) == "<Adapter: 0 tensors, which cannot be loaded>"
    assert "It cannot be loaded: adapter_config.json: target_modules" in str(adapter)


def test_adapters_are_equal_whose_files_are(tmp_path):
    adapter, again = saved(tmp_path / "a"), keras_lora.Adapter.read(tmp_path / "a")
    assert (adapter == again) is True and (adapter != again) is False
    other = saved(tmp_path / "b", seed=2)
    assert (adapter == other) is False
    assert adapter != keras_lora.Adapter(adapter.tensors, adapter.config | {"r": 3})
    assert adapter != keras_lora.Adapter({}, adapter.config)
    wide = {key: value.astype("float64") for key, value in adapter.tensors.items()}
    assert adapter != keras_lora.Adapter(wide, adapter.config)
    assert adapter != keras_lora.Adapter(
        adapter.tensors, adapter.config, starts=["one"]
    )
    with_errors = keras_lora.Adapter(adapter.tensors, adapter.config, {}, {"one": 0.1})
    with_errors.save(tmp_path / "c")
    assert with_errors == adapter == keras_lora.Adapter.read(tmp_path / "c")
    assert adapter != "a" and adapter in [other, again]
    with pytest.raises(TypeError, match="unhashable"):
        hash(adapter)


def test_a_report_can_be_printed_once_its_adapters_are_gone():
    model = pretrained.sequential()
    planned = keras_lora.apply_lora(model, rank=2, dry_run=True)
    report = keras_lora.apply_lora(model, rank=2)
    printed = [str(planned), str(report)]
    keras_lora.remove_lora(model)
    assert [str(planned), str(report)] == printed
    assert printed[0].splitlines()[1:] == printed[1].splitlines()[1:]
