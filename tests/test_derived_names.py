"""Module names of transformers, derived from KerasHub's converters."""

import itertools
import re
import types

import backbones
import keras
import keras_hub
import numpy as np
import pytest
import transformers
from layer_cases import fill, slow_but, to_numpy
from name_tables import NAME_TABLES
from pretrained import sequential

import keras_lora
from keras_lora.files.names import modules_of
from keras_lora.files.save import adapter_of
from keras_lora.keras_internals import keras_hub as internals
from keras_lora.models.sites import Paths, adapted_sites, layers_by_path

TABLES = {
    "bert": ("BertBackbone", "BertTextClassifier", {"num_classes": 3}),
    "gpt2": ("GPT2Backbone", "GPT2CausalLM", {}),
    "llama": ("Llama3Backbone", "Llama3CausalLM", {}),
    "gemma": ("GemmaBackbone", "GemmaCausalLM", {}),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of models under construction


def task(name, **kwargs):
    backbone, cls, more = TABLES[name]
    model = getattr(keras_hub.models, cls)
    return model(backbones.backbone(backbone), preprocessor=None, **more)


@pytest.mark.parametrize("names", ["transformers", "family"])
@pytest.mark.parametrize("table", TABLES)
def test_the_tables_written_by_hand_are_derived(table, names):
    bare = backbones.backbone(TABLES[table][0])
    for model in (bare, task(table)):
        paths = Paths(model)
        derived = modules_of(paths, table if names == "family" else names)
        found = {
            paths.path_of[id(layer)]: module
            for module, layer in derived.items()
            if module not in derived.unnamed
        }
        expected = {path: NAME_TABLES[table](path) for path in paths.layers}
        expected = {path: module for path, module in expected.items() if module}
        assert found == expected
        linear = {m for m in found.values() if "c_" in m}
        assert derived.inputs_first == linear  # GPT-2's Conv1D, which all are called so


CONFIGURATIONS = {
    "Gemma3Backbone": {"use_post_ffw_norm": True, "use_post_attention_norm": True}
}
# All that is laid out in a way of its own, and what no test runs live.
LAYOUTS = """
    BLIP2Backbone DINOV3Backbone Gemma3Backbone Gemma3nBackbone GPT2Backbone
    MetaCLIP2Backbone MistralBackbone PaliGemmaBackbone SAM3PromptableConceptBackbone
    T5Gemma2Backbone
""".split()  # noqa: SIM905


def plain(name):
    if name == "BLIP2Backbone":
        return backbones.blip2(images=True)
    if name in CONFIGURATIONS:
        config = backbones.CONFIGURATIONS[name] | CONFIGURATIONS[name]
        return getattr(keras_hub.models, name)(**config)
    return backbones.backbone(name)


def adapted(name):
    """Every layer with an adapter of its own alpha."""
    exclude, model = None, plain(name)
    if name == "BLIP2Backbone":  # whose converter counts this layer's weights
        exclude = ["language_projection"]
    if name == "SAM3PromptableConceptBackbone":  # PEFT adapts none of these
        exclude = keras.layers.Conv2DTranspose
    rows = keras_lora.apply_lora(model, rank=3, exclude=exclude, dry_run=True)
    alphas = {row.path: 3 + index for index, row in enumerate(rows)}
    keras_lora.apply_lora(model, rank=3, exclude=exclude, alpha_pattern=alphas)
    for seed, layer in enumerate(adapted_sites(model)):
        fill(layer.lora.a, seed, 0.3)
        fill(layer.lora.b, seed + 1, 0.3)
    return model


def assert_converted(model, family, adapter):
    """A @ B of the file, by the converter's own function, is the layer's update."""
    layers = {id(layer.frozen_kernel): layer for layer in adapted_sites(model)}
    for variable in model.variables:
        variable.assign = lambda value: None
    found = set()

    def port(variable, key, hook):
        layer, module = layers.get(id(variable)), key.removesuffix(".weight")
        if layer is None:
            return
        found.add(id(layer))
        names = [n.removesuffix(".lora_A.weight") for n in adapter.tensors]
        module = next(n for n in names if f".{module}".endswith(f".{n}"))
        a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        alphas = adapter.config.get("alpha_pattern", {})
        alpha = alphas.get(f"^{re.escape(module)}", adapter.config["lora_alpha"])
        delta = alpha / len(a) * np.tensordot(b[..., 0, 0] if b.ndim > 2 else b, a, 1)
        if adapter.config.get("fan_in_fan_out"):
            delta = delta.T
        delta = delta if hook is None else hook(delta, list(variable.shape))
        expected = to_numpy(layer.lora.delta())
        tolerance = 1e-5 if delta.dtype == "float32" else 2e-3  # a converter's float16
        np.testing.assert_allclose(delta, expected, rtol=0, atol=tolerance)

    if family == "gemma3n":  # whose converter takes images for granted
        internals.add_absent_parts(model)
    internals.run_converter(family, model, port)
    assert found == {id(layer) for layer in layers.values()}


@pytest.mark.slow
def test_a_backbone_made_of_layers_has_the_same_names_over_integers():
    names = []
    for steps in ("", "qa", "aq"):
        model = backbones.blip2(images=True)
        for step in steps:
            if step == "q":
                model.quantize("int8")
            else:
                keras_lora.apply_lora(model, rank=1)
        found = modules_of(Paths(model), "transformers")
        names.append(found.keys() - found.unnamed)
    assert names[0] == names[1] == names[2]


# Those that are built in a second, and the others.
QUICK = ("DINOV3Backbone", "Gemma3Backbone", "GPT2Backbone", "MistralBackbone")


@pytest.mark.parametrize("name", slow_but(QUICK, LAYOUTS))
def test_a_file_is_the_update_by_the_converters_own_function(name):
    model = adapted(name)
    before = [(v.path, to_numpy(v)) for v in model.variables]
    adapter = adapter_of(model, "transformers4")  # as checkpoints are named
    for variable, (path, value) in zip(model.variables, before, strict=True):
        assert variable.path == path
        np.testing.assert_array_equal(to_numpy(variable), value)
    assert_converted(model, internals.family_of(type(model)), adapter)


class OtherOrder:
    """A loader before another: tensors with rows and columns in another order."""

    def __init__(self, port, order):
        self.port, self.order = port, order

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        self.port(keras_variable, *self.order(hf_weight_key, hook_fn))

    def get_tensor(self, key):
        return np.zeros((1, 1))


def rotary_halves(key, hook):
    """As checkpoints that keep a head's halves interleaved."""
    if "q_proj" not in key and "k_proj" not in key:
        return key, hook

    def interleaved(tensor, shape):
        heads = tensor.reshape(-1, shape[-1] // 2, 2, tensor.shape[1])
        return hook(heads.transpose(0, 2, 1, 3).reshape(tensor.shape), shape)

    return key, interleaved


def fused(key, hook):
    """As checkpoints that keep q, k and v in one tensor: other sizes, v in front."""
    match = re.search("([qkv])_proj", key)
    if not match:
        return key, hook
    part = {"v": slice(0, 8), "q": slice(8, 24), "k": slice(24, 32)}[match[1]]
    key = key.replace(match[0], "qkv_proj")
    return key, lambda tensor, shape: hook(tensor[part], shape)


def reversed_inputs(key, hook):
    if "down_proj" not in key:
        return key, hook
    return key, lambda tensor, shape: hook(tensor[:, ::-1], shape)


@pytest.mark.parametrize("order", [rotary_halves, fused, reversed_inputs])
@pytest.mark.parametrize("one_a", [False, True])
def test_layouts_are_seen(order, one_a, monkeypatch):
    """B's rows and A's columns follow what a converter does with the tensor's."""
    plain = internals.converters()["llama3"]

    def convert_weights(backbone, loader, config):
        plain.convert_weights(backbone, OtherOrder(loader.port, order), config)

    other = types.SimpleNamespace(
        backbone_cls=plain.backbone_cls, convert_weights=convert_weights
    )
    monkeypatch.setitem(internals.converters(), "llama3", other)
    model = adapted("Llama3Backbone")
    if one_a:  # of a module whose parts share it
        for path, layer in layers_by_path(model).items():
            if path.endswith(("query", "key", "value")):
                fill(layer.lora.a, 99, 0.3)
    expected = [to_numpy(layer.lora.delta()) for layer in adapted_sites(model)]
    adapter = adapter_of(model, "transformers")
    assert ("layers.0.self_attn.qkv_proj.lora_A.weight" in adapter.tensors) == (
        order is fused
    )
    assert_converted(model, "llama3", adapter)
    again = backbones.backbone("Llama3Backbone")
    keras_lora.load_adapter(again, adapter, names="transformers")
    for layer, delta in zip(adapted_sites(again), expected, strict=True):
        np.testing.assert_allclose(to_numpy(layer.lora.delta()), delta, atol=1e-6)


def held(model):
    return [to_numpy(variable) for variable in model.variables]


@pytest.mark.parametrize(
    ("build", "names", "reason"),
    [
        (sequential, "transformers", "a model without a backbone of KerasHub"),
        (lambda: backbones.backbone("OPTBackbone"), "transformers", "an? OPTBackbone"),
        (lambda: backbones.backbone("BertBackbone"), "gpt2", "BertBackbone of 'bert'"),
        (lambda: backbones.backbone("BertBackbone"), "opt", "Give a dict .*'albert'"),
        (
            lambda: backbones.backbone("Gemma3Backbone"),
            "transformers",
            "'gemma3' does not work",
        ),
    ],
)
def test_what_has_no_converter_is_refused(build, names, reason, tmp_path):
    model = build()
    keras_lora.apply_lora(model, rank=2)
    before = held(model)
    with pytest.raises(ValueError, match=reason) as error:
        keras_lora.save_adapter(model, tmp_path / "adapter", names=names)
    assert "a dict" in str(error.value)
    assert not (tmp_path / "adapter").exists()
    for old, new in zip(before, held(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_adapter_without_a_module_there_is_refused(tmp_path):
    model = backbones.backbone("SwinTransformerBackbone")
    keras_lora.apply_lora(model, rank=2)
    with pytest.raises(ValueError, match=r"attention_qkv.*no counterpart in"):
        keras_lora.save_adapter(model, tmp_path / "adapter", names="transformers")


def test_asking_makes_no_variables(monkeypatch):
    """The stand-in holds no values, and none are made for it later."""
    backbone, made = backbones.backbone("BertBackbone"), []
    monkeypatch.setattr(
        keras.Variable, "_initialize_with_initializer", lambda v, _: made.append(v)
    )
    modules_of(Paths(backbone), "transformers")
    with keras.StatelessScope():  # which initializes what is left
        pass
    assert made == []


def test_a_quantized_model_has_the_names_of_the_float_one():
    model = backbones.backbone("Llama3Backbone")
    expected = modules_of(Paths(model), "transformers")
    model.quantize("int4")  # whose kernels have another shape
    found = modules_of(Paths(model), "transformers")
    assert list(found) == list(expected)


def test_the_file_says_the_prefix():
    model = adapted("Qwen3Backbone")
    adapter = adapter_of(model, "transformers")
    expected = [to_numpy(layer.lora.delta()) for layer in adapted_sites(model)]
    for prefix in ("model.", "", "model.language_model."):
        tensors = {prefix + key: value for key, value in adapter.tensors.items()}
        config = {**adapter.config, "target_modules": "all-linear"}
        config["alpha_pattern"] = {
            key.replace("^", f"^{re.escape(prefix)}"): value
            for key, value in config["alpha_pattern"].items()
        }
        again = backbones.backbone("Qwen3Backbone")
        keras_lora.load_adapter(
            again, keras_lora.Adapter(tensors, config), names="transformers"
        )
        for layer, delta in zip(adapted_sites(again), expected, strict=True):
            np.testing.assert_allclose(to_numpy(layer.lora.delta()), delta, atol=1e-6)


@pytest.mark.slow
def test_names_of_transformers_4_and_5():
    """ViT's, both read whichever is asked for; 5 is written unless 4 is asked for."""
    model = adapted("ViTBackbone")
    four, five = (adapter_of(model, x) for x in ("transformers4", "transformers"))
    query = "layers.0.attention.q_proj.lora_A.weight"
    assert query in five.tensors
    assert "encoder.layer.0.attention.attention.query.lora_A.weight" in four.tensors
    expected = [to_numpy(layer.lora.delta()) for layer in adapted_sites(model)]
    again = backbones.backbone("ViTBackbone")
    for adapter, names in itertools.product(
        (four, five), ("transformers", "transformers4", "vit")
    ):
        keras_lora.load_adapter(again, adapter, names=names)
        for layer, delta in zip(adapted_sites(again), expected, strict=True):
            np.testing.assert_allclose(to_numpy(layer.lora.delta()), delta, atol=1e-6)
        keras_lora.remove_lora(again)


TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGES = {**TOWER, "image_size": 16, "patch_size": 8}
WORDS = {"vocab_size": 50, "max_position_embeddings": 12}
GEMMA = {**TOWER, "vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8}
T5GEMMA = {**GEMMA, "query_pre_attn_scalar": 8}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
OPT = transformers.OPTConfig(
    **{**WORDS, **IDS, "hidden_size": 16, "word_embed_proj_dim": 16},
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=32,
)
THERE = {
    "BLIP2Backbone": lambda: transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config=IMAGES, qformer_config=TOWER, text_config=OPT.to_dict()
        )
    ),
    "Gemma3nBackbone": lambda: transformers.Gemma3nTextModel(
        transformers.Gemma3nTextConfig(
            **{**GEMMA, "intermediate_size": [32, 32]},
            layer_types=["full_attention"] * 2,
            vocab_size_per_layer_input=50,
            hidden_size_per_layer_input=2,
            altup_num_inputs=2,
            laurel_rank=1,
            num_kv_shared_layers=0,
        )
    ),
    "PaliGemmaBackbone": lambda: transformers.PaliGemmaModel(
        transformers.PaliGemmaConfig(
            vision_config={**IMAGES, "model_type": "siglip_vision_model"},
            text_config={**GEMMA, "model_type": "gemma"},
            projection_dim=16,
        )
    ),
    "MetaCLIP2Backbone": lambda: transformers.MetaClip2Model(
        transformers.MetaClip2Config(
            text_config={**TOWER, **WORDS, **IDS}, vision_config=IMAGES
        )
    ),
    "T5Gemma2Backbone": lambda: transformers.T5Gemma2Model(
        transformers.T5Gemma2Config(
            encoder={"text_config": T5GEMMA, "vision_config": IMAGES}, decoder=T5GEMMA
        )
    ),
}


@pytest.mark.parametrize("name", THERE)
def test_derived_names_are_modules_there(name):
    """Of families that no other test runs live; transformers 5's own names."""
    there = dict(THERE[name]().named_modules())
    backbone = plain(name)
    modules = modules_of(Paths(backbone), "transformers")
    named = {module.partition("[")[0] for module in modules.keys() - modules.unnamed}
    assert len(named) > 20
    assert named <= there.keys()


MASKED = {
    "Albert": transformers.AlbertConfig(embedding_size=8, **TOWER, **WORDS),
    "Bert": transformers.BertConfig(**TOWER, **WORDS),
    "DistilBert": transformers.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32
    ),
    "Roberta": transformers.RobertaConfig(**TOWER, **WORDS),
    "XLMRoberta": transformers.XLMRobertaConfig(**TOWER, **WORDS),
}


@pytest.mark.parametrize("name", MASKED)
def test_the_head_of_a_masked_language_model(name):
    """Under the same names and with the same shapes as in transformers."""
    head = getattr(transformers, f"{name}ForMaskedLM")(MASKED[name])
    backbone = backbones.backbone(f"{name}Backbone")
    model = getattr(keras_hub.models, f"{name}MaskedLM")(backbone, preprocessor=None)
    keras_lora.apply_lora(
        model, rank=2, target=["query"], also_train=r"mlm_head/intermediate_.*"
    )
    adapter = adapter_of(model, "transformers")
    state = head.state_dict()
    trained = {k: x for k, x in adapter.tensors.items() if "lora_" not in k}
    assert len(trained) == 4
    for key, value in trained.items():
        assert tuple(state[key].shape) == value.shape
    queries = [key for key in adapter.tensors if key.endswith("lora_A.weight")]
    there = dict(head.named_modules())
    assert queries and all(k.removesuffix(".lora_A.weight") in there for k in queries)
