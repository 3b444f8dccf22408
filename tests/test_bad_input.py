"""Every wrong argument is a ValueError that names it, what is allowed, what to do."""

import re
import subprocess
import sys

import keras
import pytest
from layer_cases import CASES

import keras_lora
from keras_lora import LoRADense

KINDS = {case.layer_class: case for case in CASES}
over_kinds = pytest.mark.parametrize(
    "case", KINDS.values(), ids=lambda case: case.layer_class.__name__
)


@over_kinds
@pytest.mark.parametrize("rank", [-1, 1.5, "8", True, None])
def test_rank(case, rank):
    with pytest.raises(ValueError, match=r"whole number >= .*rank="):
        case.layer(rank=rank)


@over_kinds
@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "16", True])
def test_alpha(case, alpha):
    with pytest.raises(ValueError, match=r"finite number > 0.*alpha="):
        case.layer(alpha=alpha)


@over_kinds
@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, "0.5", None])
def test_dropout(case, dropout):
    with pytest.raises(ValueError, match=r"in \[0, 1\).*dropout="):
        case.layer(dropout=dropout)


@over_kinds
@pytest.mark.parametrize(
    "keyword, ours",
    [
        ("r", "rank"),
        ("lora_rank", "rank"),
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
        ("dora_rank", "rank` beside `use_dora=True"),
        ("dora_alpha", "alpha` beside `use_dora=True"),
    ],
)
def test_keywords_of_other_libraries(case, keyword, ours):
    with pytest.raises(ValueError, match=f"the keyword here is `{ours}`"):
        case.layer(**{keyword: 4})


@over_kinds
def test_unknown_keyword(case):
    with pytest.raises((ValueError, TypeError), match="rnak"):
        case.layer(rnak=4)


@over_kinds
def test_kernel_constraint(case):
    name = f"{case.layer_class.kernel_name}_constraint"
    constraint = keras.constraints.NonNeg()
    with pytest.raises(ValueError, match=f"{name}.*rank=0"):
        case.layer(**{name: constraint})
    assert case.layer(**{name: constraint}, rank=0).lora is None


@over_kinds
def test_enable_lora(case):
    with pytest.raises(ValueError, match="has an adapter of its own"):
        case.layer().enable_lora(4)


def test_quantized_policy():
    with pytest.raises(ValueError, match="float, int8 and int4 kernels"):
        LoRADense(4, dtype="float8_from_float32")


@over_kinds
def test_nothing_is_left_of_a_refused_call(case):
    layer = case.layer()
    with pytest.raises(ValueError):
        layer.lora.set_alpha(-1)
    assert layer.lora.alpha == case.lora.get("alpha", layer.lora.rank)


ON_A_MODEL = {
    "apply_lora": keras_lora.apply_lora,
    "merge_lora": keras_lora.merge_lora,
    "remove_lora": keras_lora.remove_lora,
    "summary": keras_lora.summary,
    "mark_only": keras_lora.mark_only_lora_as_trainable,
    "initialize_lora": lambda given: keras_lora.initialize_lora(given, "pissa"),
    "merged": lambda given: keras_lora.merged(given).__enter__(),
    "disabled": lambda given: keras_lora.disabled(given).__enter__(),
    "save_adapter": lambda given: keras_lora.save_adapter(given, "never"),
    "load_adapter": lambda given: keras_lora.load_adapter(given, NO_TENSORS),
    "export": lambda given: keras_lora.export(given, "never"),
    "bank": lambda given: keras_lora.AdapterBank(given, target="all-linear"),
    "sweep": lambda given: keras_lora.sweep(given, ([0.0], [0.0]), [{}], loss="mse"),
}
NO_TENSORS = keras_lora.Adapter({}, {})


@pytest.mark.parametrize("given", [None, "model.keras", keras.Model], ids=str)
@pytest.mark.parametrize("function", ON_A_MODEL)
def test_no_model(function, given):
    with pytest.raises(ValueError, match=r"must be a Keras model or layer. Received"):
        ON_A_MODEL[function](given)


class Unbuilt(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(3)

    def call(self, inputs):
        return self.inner(inputs)


def attention():
    x = keras.Input((4, 6))
    y = keras.layers.MultiHeadAttention(2, 3, name="attn")(x, x)
    return keras.Model(x, keras.layers.Dense(2, name="out")(y))


@pytest.mark.parametrize("load", [True, False])
def test_unbuilt_model(load):
    model = Unbuilt()
    with pytest.raises(ValueError, match=r"not built yet: .*model.build"):
        if load:
            keras_lora.load_adapter(model, NO_TENSORS)
        else:
            keras_lora.apply_lora(model)


WRONG_TARGETS = {
    "object": (
        lambda model: model.layers[-1],
        "the layer object 'out': give",
    ),
    "objects": (lambda model: [model.layers[-1]], "the layer object 'out'"),
    "function": (
        lambda model: lambda layer: True,
        r"of (path, layer). Received one of",
    ),
    "owner": (lambda model: ["attn"], "holds attn/query, attn/key, attn/value,"),
    "far": (lambda model: ["zzz"], "There are: 'attn/query', 'attn/key', 'attn/value'"),
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_targets_that_mean_nothing(name):
    model, (make, message) = attention(), WRONG_TARGETS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        keras_lora.apply_lora(model, target=make(model))


def test_a_keyword_that_comes_close():
    with pytest.raises(TypeError, match=r"`targets`\. Did you mean target"):
        keras_lora.apply_lora(attention(), targets="all-linear")
    with pytest.raises(ValueError, match="`task_type` of `save_adapter`"):
        keras_lora.apply_lora(attention(), task_type="SEQ_CLS")


def test_folders_that_are_none(tmp_path):
    model = attention()
    keras_lora.apply_lora(model, rank=2)
    model.save(tmp_path / "model.keras")
    keras_lora.remove_lora(model)
    (tmp_path / "empty").mkdir()
    for name, kind, words in (
        ("none", FileNotFoundError, "does not exist, so it has no adapter_config.json"),
        ("empty", FileNotFoundError, "has no adapter_config.json. `save_adapter`"),
        ("model.keras", NotADirectoryError, "is a file, and an adapter is a folder"),
    ):
        with pytest.raises(kind, match=words):
            keras_lora.load_adapter(model, tmp_path / name)


@pytest.mark.parametrize("write", [keras_lora.save_adapter, keras_lora.export])
def test_files_where_a_folder_is_written(write, tmp_path):
    model = attention()
    keras_lora.apply_lora(model, rank=2)
    model.save(tmp_path / "model.keras")
    before = (tmp_path / "model.keras").read_bytes()
    with pytest.raises(FileExistsError, match=r"is a file, and an? .* is a folder"):
        write(model, tmp_path / "model.keras")
    assert (tmp_path / "model.keras").read_bytes() == before
    with pytest.raises(ValueError, match="has a name like a file"):
        write(model, tmp_path / "other.keras")
    assert not (tmp_path / "other.keras").exists()


def test_lists_of_adapters():
    with pytest.raises(ValueError, match="`adapters` must be a list"):
        keras_lora.combine_adapters("folder")
    with pytest.raises(ValueError, match="one finite number for each of 2"):
        keras_lora.combine_adapters([NO_TENSORS] * 2, weights=0.5)


@pytest.mark.parametrize("given", [None, 3, [], {}])
def test_paths_that_are_none(given):
    model = attention()
    with pytest.raises(ValueError, match="Received"):
        keras_lora.load_adapter(model, given)
    keras_lora.apply_lora(model, rank=2)
    with pytest.raises(ValueError, match="must be a string or a Path"):
        keras_lora.save_adapter(model, given)


@pytest.mark.parametrize(
    "names", [3, True, [], ["attn"], {1: 2}, {"out": [1]}, lambda path: 3]
)
def test_names_that_name_nothing(names, tmp_path):
    model = attention()
    keras_lora.apply_lora(model, rank=2)
    with pytest.raises(ValueError, match="`names`"):
        keras_lora.save_adapter(model, tmp_path / "adapter", names=names)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ValueError, match="The keys of `rank_pattern` must be strings"):
        keras_lora.apply_lora(attention(), rank_pattern={1: 2})


TWO_COPIES = """
import gc, importlib, os, sys
import keras, numpy as np

def test(how, folder):
    import keras_lora as first

    inputs = keras.Input((5, 8))
    attention = keras.layers.MultiHeadAttention(2, 4)
    outputs = keras.layers.Dense(3, name="last")(attention(inputs, inputs))
    attended = keras.Model(inputs, outputs)
    dense = keras.Sequential([keras.Input((8,)), first.LoRADense(4, rank=2)])
    first.apply_lora(attended, rank=2)
    for name in [name for name in sys.modules if name.startswith("keras_lora")]:
        if how == "reload":
            importlib.reload(sys.modules[name])
        else:
            del sys.modules[name]
    import keras_lora

    files = folder + "/attended.keras", folder + "/dense.keras"
    for path in files:
        open(path, "w").write("an earlier model")
    for model, path in zip((attended, dense), files):
        for function in (
            lambda: keras_lora.save_adapter(model, folder + "/adapter"),
            lambda: first.save_adapter(model, folder + "/adapter"),
            lambda: keras_lora.apply_lora(model, rank=2),
            lambda: keras_lora.merge_lora(model),
            lambda: keras_lora.summary(model),
            lambda: keras_lora.AdapterBank(model, target=["last"]),
            *([lambda: model.save(path)] if model is attended else []),
        ):
            try:
                function()
            except ValueError as error:
                assert "by another copy of keras_lora" in str(error), error
            else:
                raise AssertionError(f"nothing was said after a second {how}")
    assert sorted(os.listdir(folder)) == ["attended.keras", "dense.keras"]
    assert open(files[0]).read() == "an earlier model"
    # A configuration of constructed layers means the same to both copies.
    dense.save(files[1])
    again, x = keras.saving.load_model(files[1]), np.ones((2, 8))
    assert isinstance(again.layers[0], keras_lora.LoRADense)
    np.testing.assert_array_equal(dense(x), again(x))

for how in ("import", "reload"):  # a reload leaves classes of two copies behind
    folder = os.path.join(sys.argv[1], how)
    os.mkdir(folder)
    test(how, folder)
    keras.backend.clear_session()
    gc.collect()  # no model of this copy is left
"""


@pytest.mark.slow
def test_layers_of_another_copy_of_the_package_are_refused(tmp_path):
    command = [sys.executable, "-c", TWO_COPIES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
