"""KerasHub's layers of experts: the bypass beside each product with a stack."""

import keras
import keras_hub
import numpy as np
import pytest
from backbones import CONFIGURATIONS, backbone
from gradients import factor_variables, gradients
from layer_cases import fill, to_numpy
from shared import assert_close, assert_equal_bits
from test_gradient_sizes import formed, training_step

import keras_lora
from keras_lora.keras_internals.layer_state import flatten_layers
from keras_lora.layers import experts
from keras_lora.layers.experts import low_rank_equations

# Every axis differs, so that a shape can be told from another.
COUNT, HIDDEN, INNER, TOKENS = 3, 11, 13, 17
FAMILIES = {
    "MixtralBackbone": ("MixtralMoeExperts", 3),
    "QwenMoeBackbone": ("QwenMoeExperts", 2),
    "Qwen3MoeBackbone": ("Qwen3MoeExperts", 2),
    "Qwen3_5MoeBackbone": ("Qwen3_5MoeExperts", 2),
    "GptOssBackbone": ("GptOssExperts", 2),
    "Gemma4Backbone": ("Gemma4MoEBlock", 3),
}
CLASSES = {}


def bank_class(family):
    """KerasHub's class, which is not public: that of a layer of its backbone."""
    if family not in CLASSES:
        if family == "Gemma4Backbone":
            experts = {"num_experts": 4, "expert_intermediate_dim": 8}
            settings = {**CONFIGURATIONS[family], **experts, "num_experts_per_token": 2}
            model = keras_hub.models.Gemma4Backbone(**settings, enable_moe_block=True)
        else:
            model = backbone(family)
        layers, (name, _) = flatten_layers(model), FAMILIES[family]
        CLASSES[family] = next(type(x) for x in layers if type(x).__name__ == name)
    return CLASSES[family]


class Bank(keras.layers.Layer):
    """A bank, with the routing that Gemma 4's wants beside its inputs."""

    def __init__(self, bank, **kwargs):
        super().__init__(**kwargs)
        self.bank = bank

    def build(self, input_shape):
        if not self.bank.built:
            self.bank.build(input_shape)
        self.built = True

    @property
    def loras(self):
        return self.bank.loras

    def call(self, inputs, training=None):
        if type(self.bank).__name__.endswith("Block"):
            shares = keras.ops.softmax(inputs[:, :COUNT])
            return self.bank(inputs, shares)
        return self.bank(inputs)


def plain_bank(family, dtype="float32"):
    bank = bank_class(family)(COUNT, HIDDEN, INNER, dtype=dtype, name="experts")
    layer = Bank(bank, dtype=dtype)
    layer.build((None, HIDDEN))
    for seed, variable in enumerate(bank.weights):
        fill(variable, seed, 0.3)
    return layer


def adapted_bank(family, dtype="float32", trained=True, **settings):
    layer = plain_bank(family, dtype)
    keras_lora.apply_lora(layer, rank=2, alpha=3, target=["experts"], **settings)
    for seed, lora in enumerate(layer.loras.values() if trained else ()):
        fill(lora.a, 2 * seed, 0.3)
        fill(lora.b, 2 * seed + 1, 0.3)
    return layer


def merged_bank(family, layer, dtype="float32"):
    """The plain bank with W + delta."""
    plain = plain_bank(family, dtype)
    for variable in plain.bank.weights:
        site = layer.bank.sites().get(variable.name)
        if site is not None:
            variable.assign(site.merged_kernel(variable.dtype))
    return plain


def inputs(dtype="float32"):
    random = np.random.default_rng(7)
    return random.standard_normal((TOKENS, HIDDEN)).astype(dtype)


over_families = pytest.mark.parametrize("family", FAMILIES)


@over_families
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_fresh_adapters_change_nothing(family, dtype):
    layer, plain = adapted_bank(family, dtype, trained=False), plain_bank(family, dtype)
    assert len(layer.loras) == FAMILIES[family][1]
    x = inputs()
    for training in (True, False, None):
        assert_equal_bits(layer(x, training=training), plain(x))


@over_families
def test_both_paths_are_the_plain_banks_with_w_plus_delta(family):
    layer, x = adapted_bank(family), inputs()
    plain = merged_bank(family, layer)
    assert_equal_bits(layer(x, training=False), plain(x))
    assert_close(layer(x, training=True), plain(x))
    before = to_numpy(plain_bank(family)(x))
    assert np.abs(to_numpy(layer(x)) - before).max() > 1e-2
    for training in (True, False):
        with keras_lora.disabled(layer):
            assert_close(layer(x, training=training), before, 1e-6)
        with keras_lora.merged(layer):
            for lora in layer.loras.values():  # what stands in for them is fixed
                lora.b.assign(-lora.b)
            assert_close(layer(x, training=training), plain(x), 1e-6)
            for lora in layer.loras.values():
                lora.b.assign(-lora.b)


@over_families
def test_gradients_are_those_of_w_through_a_and_b(family):
    layer, x = adapted_bank(family), inputs()
    plain = merged_bank(family, layer)
    shape = tuple(layer(x).shape)
    weights = np.random.default_rng(3).standard_normal(shape).astype("float32")
    found = gradients(layer, x, weights)
    of_plain = gradients(plain, x, weights)
    assert_close(found[-1], of_plain[-1])  # by the inputs
    by_name = dict(
        zip([v.name for v in factor_variables(plain)], of_plain, strict=False)
    )
    for place, (name, lora) in enumerate(layer.loras.items()):
        of_kernel = by_name[name].astype("float64")
        a, b = (to_numpy(v).astype("float64") for v in (lora.a, lora.b))
        scaling = 3 / 2
        assert_close(found[2 * place], scaling * of_kernel @ b.transpose(0, 2, 1))
        assert_close(found[2 * place + 1], scaling * a.transpose(0, 2, 1) @ of_kernel)


def kernel_sizes(layer):
    return {int(np.prod(site.kernel_shape)) for site in layer.bank.sites().values()}


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
@over_families
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_compiled_step_forms_no_array_of_a_kernels_size(family, dtype):
    layer = adapted_bank(family, dtype)
    operations = list(training_step(layer, inputs()))
    for size in kernel_sizes(layer):
        assert formed(operations, size) == []


@pytest.mark.parametrize("family", ["MixtralBackbone", "GptOssBackbone"])
def test_fit_trains_the_factors_alone(family):
    layer = adapted_bank(family)
    model = keras.Sequential([keras.Input((HIDDEN,)), layer])
    before = {v.path: to_numpy(v) for v in model.weights}
    model.compile("adam", lambda y, outputs: keras.ops.mean(outputs**2, axis=None))
    model.train_on_batch(inputs(), np.zeros(TOKENS))
    trained = {v.path for v in model.trainable_variables}
    assert len(trained) == 2 * FAMILIES[family][1]
    for variable in model.weights:
        moved = np.abs(to_numpy(variable) - before[variable.path]).max() > 0
        assert moved == (variable.path in trained)


def test_dora_computes_with_its_kernel_in_training_too():
    layer, x = adapted_bank("QwenMoeBackbone", use_dora=True), inputs()
    assert_equal_bits(layer(x, training=True), layer(x, training=False))


def test_what_a_bank_does_otherwise_gets_w_plus_delta():
    """A coming KerasHub may multiply in another order, or read a weight by itself."""

    class Later(bank_class("QwenMoeBackbone")):
        def call(self, hidden_states):
            ops, up = keras.ops, self._expert_feedforward_gate_dense
            first = ops.einsum("ehm,th->etm", up, hidden_states)
            gate, up = ops.split(first, 2, axis=-1)
            hidden = up * ops.silu(gate)
            down = ops.cast(self._expert_feedforward_output_dense, "float32")
            return ops.matmul(hidden, down) + ops.einsum("eti,eih->eth", hidden, down)

    Later.__module__, Later.__name__ = "keras_hub.later", "QwenMoeExperts"
    CLASSES["later"], FAMILIES["later"] = Later, ("QwenMoeExperts", 2)
    try:
        layer, x = adapted_bank("later"), inputs()
        assert isinstance(layer.bank, experts.Experts)
        plain = merged_bank("later", layer)
        assert_close(layer(x, training=True), plain(x))
        assert_equal_bits(layer(x, training=False), plain(x))
    finally:
        del CLASSES["later"], FAMILIES["later"]


@pytest.mark.parametrize(
    "equation",
    [
        "th,ehm->etm",
        "eti,eih->eth",
        "t h , e h m -> e t m",
        "th,ehm->tem",
        "bth,ehm->betm",
        "...h,ehm->...em",
    ],
)
def test_low_rank_equations(equation):
    random = np.random.default_rng(0)
    down, up = low_rank_equations(equation)
    shape = (3, 4, 5) if equation[:3] in ("eti", "bth", "...") else (4, 5)
    x = random.standard_normal(shape)
    a, b = random.standard_normal((3, 5, 2)), random.standard_normal((3, 2, 6))
    expected = np.einsum(equation, x, a @ b)
    assert_close(np.einsum(up, np.einsum(down, x, a), b), expected)


@pytest.mark.parametrize(
    "equation",
    ["tm,ehm->eth", "th,hm->tm", "eth,ehm->ethm", "th,ehm->tm", "th,...hm->...tm", ""],
)
def test_products_of_another_kind(equation):
    assert low_rank_equations(equation) is None
