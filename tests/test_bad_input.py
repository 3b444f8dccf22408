"""Every wrong argument is a ValueError that names it, what is allowed, what to do."""

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
    with pytest.raises(ValueError, match="brings its own adapter"):
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
