"""The families that KerasHub converts, small, in transformers and in KerasHub."""

import copy
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import keras_hub
import numpy as np
import peft
import safetensors.numpy
import torch
import transformers
from layer_cases import to_numpy
from page_sections import write_section
from their_models import BERT, GEMMA, GPT2, SIZES, loaded_by_peft

import keras_lora
from keras_lora.models.sites import Paths, layers_by_path

TEXT = {**SIZES, "num_attention_heads": 2, "intermediate_size": 24}
SEQUENCE = {"max_position_embeddings": 12}
TANH = {"hidden_act": "gelu_pytorch_tanh"}
DECODER = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SHARED = {"shared_expert_intermediate_size": 12}
IMAGE = {"image_size": 16, "patch_size": 8}
VISION = {**TEXT, **IMAGE, "num_channels": 3}
del VISION["vocab_size"]
LABELS = {"num_labels": 3}
ROBERTA = {**LABELS, "max_position_embeddings": 14, "type_vocab_size": 1}
ROBERTA["layer_norm_eps"] = 1e-5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SCALED = {"query_pre_attn_scalar": 8, "sliding_window": 64}
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
HALF = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
}


class Family(NamedTuple):
    """One family in both libraries.

    theirs: transformers' class and configuration. ours: KerasHub's backbone, and the
    task around it, if transformers' class is one. config_json: what KerasHub reads in
    config.json beside what transformers 5 writes there.
    """

    theirs: str
    config: object
    ours: str
    task: str | None = None
    keras_inputs: object = None
    torch_inputs: object = None
    heads: tuple = ()  # modules beside the backbone that train in full
    exclude: object = None  # of "all-linear", here and there
    parameters: tuple = ()  # what PEFT adapts as a parameter
    config_json: dict = {}  # noqa: RUF012
    keys: dict = {}  # of the checkpoint, likewise: part -> replacement  # noqa: RUF012
    write: object = None  # what else the checkpoint needs


def ids(seed=2, length=7):
    return np.random.default_rng(seed).integers(3, 30, (2, length)).astype("int32")


def tokens(**more):
    mask = np.ones_like(ids())
    return {"token_ids": ids(), "padding_mask": mask, **more}


def torch_tokens():
    return {"input_ids": torch.tensor(ids()).long()}


def image(size=16):
    x = np.random.default_rng(5).standard_normal((2, size, size, 3))
    return x.astype("float32")


def torch_image():
    return {"pixel_values": torch.tensor(image().transpose(0, 3, 1, 2).copy())}


def encoder_decoder():
    fed = tokens()
    return {
        "encoder_token_ids": ids(),
        "encoder_padding_mask": fed["padding_mask"],
        "decoder_token_ids": ids(3, 5),
        "decoder_padding_mask": np.ones_like(ids(3, 5)),
    }


def torch_encoder_decoder():
    decoder = torch.tensor(ids(3, 5)).long()
    return {**torch_tokens(), "decoder_input_ids": decoder}


def segments():
    return tokens(segment_ids=np.zeros_like(ids()))


t = transformers
FAMILIES = {
    "albert": Family(
        "AlbertForSequenceClassification",
        lambda: t.AlbertConfig(
            **TEXT, **SEQUENCE, **TANH, **LABELS, embedding_size=8, **NO_DROPOUT
        ),
        "AlbertBackbone",
        "TextClassifier",
        heads=("classifier",),
        keras_inputs=segments,
    ),
    "bart": Family(
        "BartModel",
        lambda: t.BartConfig(
            vocab_size=30,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=12,
        ),
        "BartBackbone",
        config_json={"num_hidden_layers": 2},
        keras_inputs=encoder_decoder,
        torch_inputs=torch_encoder_decoder,
    ),
    "bert": Family(
        "BertForSequenceClassification",
        lambda: t.BertConfig(**BERT.to_diff_dict() | LABELS),
        "BertBackbone",
        "TextClassifier",
        keras_inputs=segments,
        heads=("classifier",),
    ),
    "deit": Family(
        "DeiTForImageClassificationWithTeacher",
        lambda: t.DeiTConfig(**VISION, **LABELS, layer_norm_eps=1e-6),
        "DeiTBackbone",
        "ImageClassifier",
        heads=("cls_classifier",),
        exclude=("distillation_classifier",),
        keras_inputs=image,
        torch_inputs=torch_image,
    ),
    "dinov2": Family(
        "Dinov2Model",
        lambda: t.Dinov2Config(**VISION),
        "DINOV2Backbone",
        keras_inputs=image,
        torch_inputs=torch_image,
    ),
    "dinov3": Family(
        "DINOv3ViTModel",
        lambda: t.DINOv3ViTConfig(**VISION),
        "DINOV3Backbone",
        keras_inputs=image,
        torch_inputs=torch_image,
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        lambda: t.DistilBertConfig(
            vocab_size=30,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            **SEQUENCE,
            **LABELS,
        ),
        "DistilBertBackbone",
        "TextClassifier",
        heads=("pre_classifier", "classifier"),
    ),
    "esm": Family(
        "EsmModel",
        lambda: t.EsmConfig(
            **TEXT,
            **SEQUENCE,
            position_embedding_type="rotary",
            pad_token_id=1,
            mask_token_id=2,
            token_dropout=False,
        ),
        "ESMBackbone",
        exclude=("regression", "pooler.dense"),
        keys={
            "LayerNorm.gamma": "LayerNorm.weight",
            "LayerNorm.beta": "LayerNorm.bias",
        },
        keras_inputs=ids,
    ),
    "gemma": Family("GemmaForCausalLM", lambda: GEMMA, "GemmaBackbone", "CausalLM"),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        lambda: t.Gemma2Config(**HALF, query_pre_attn_scalar=8, sliding_window=4),
        "GemmaBackbone",
        "CausalLM",
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        lambda: t.Gemma3TextConfig(**HALF, query_pre_attn_scalar=8, sliding_window=4),
        "Gemma3Backbone",
        "CausalLM",
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        lambda: t.Gemma4TextConfig(
            **HALF,
            global_head_dim=8,
            hidden_size_per_layer_input=0,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=4,
        ),
        "Gemma4Backbone",
        "CausalLM",
        exclude=("ffw_gating", "ffw_gating_2", "ffw_linear", *GATED),
        keras_inputs=lambda: tokens(position_ids=np.arange(7)[None].repeat(2, 0)),
    ),
    "gemma4_moe": Family(
        "Gemma4ForCausalLM",
        lambda: t.Gemma4TextConfig(
            **HALF,
            enable_moe_block=True,
            num_experts=4,
            moe_intermediate_size=12,
            top_k_experts=2,
            global_head_dim=8,
            hidden_size_per_layer_input=0,
            layer_types=["full_attention"] * 2,
        ),
        "Gemma4Backbone",
        "CausalLM",
        exclude=("ffw_gating", "ffw_gating_2", "ffw_linear", *MLP),
        parameters=("experts.gate_up_proj", "experts.down_proj"),
        keras_inputs=lambda: tokens(position_ids=np.arange(7)[None].repeat(2, 0)),
    ),
    "gpt2": Family("GPT2LMHeadModel", lambda: GPT2, "GPT2Backbone", "CausalLM"),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        lambda: t.GptOssConfig(
            **{**HALF, "hidden_size": 32, "intermediate_size": 32},
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        "GptOssBackbone",
        "CausalLM",
        parameters=("mlp.router.weight", *EXPERT_PARAMETERS),
        write=lambda module, tensors: write_mxfp4(module, tensors),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        lambda: t.LlamaConfig(**DECODER),
        "Llama3Backbone",
        "CausalLM",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        lambda: t.MistralConfig(**DECODER, sliding_window=None),
        "MistralBackbone",
        "CausalLM",
        write=lambda module, _: module.half().float(),  # as KerasHub reads them
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        lambda: t.MixtralConfig(
            **DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
        ),
        "MixtralBackbone",
        "CausalLM",
        parameters=("mlp.gate.weight", *EXPERT_PARAMETERS),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda: t.Qwen2Config(**DECODER),
        "QwenBackbone",
        "CausalLM",
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        lambda: t.Qwen2MoeConfig(**DECODER, **EXPERTS, **SHARED),
        "QwenMoeBackbone",
        "CausalLM",
        parameters=("mlp.gate.weight", *EXPERT_PARAMETERS),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        lambda: t.Qwen3Config(**DECODER, head_dim=8, rms_norm_eps=1e-5),
        "Qwen3Backbone",
        "CausalLM",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        lambda: t.Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=8),
        "Qwen3MoeBackbone",
        "CausalLM",
        parameters=("mlp.gate.weight", *EXPERT_PARAMETERS),
        config_json={"num_experts": 4},
    ),
    "qwen3_5": Family(
        "Qwen3_5ForCausalLM",
        lambda: t.Qwen3_5TextConfig(
            **DECODER,
            **LINEAR_ATTENTION,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        "Qwen3_5Backbone",
        "CausalLM",
        keys={"model.": "model.language_model."},
        config_json={"model_type": "qwen3_5"},
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForCausalLM",
        lambda: t.Qwen3_5MoeTextConfig(
            **DECODER,
            **EXPERTS,
            **SHARED,
            **LINEAR_ATTENTION,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        "Qwen3_5MoeBackbone",
        "CausalLM",
        parameters=("mlp.gate.weight", *EXPERT_PARAMETERS),
        keys={"model.": "model.language_model."},
        config_json={"model_type": "qwen3_5_moe"},
    ),
    "roberta": Family(
        "RobertaForSequenceClassification",
        lambda: t.RobertaConfig(**TEXT, **ROBERTA),
        "RobertaBackbone",
        "TextClassifier",
        heads=("classifier",),
        write=lambda module, _: same_positions(module),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        lambda: t.SmolLM3Config(**DECODER, pad_token_id=0),
        "SmolLM3Backbone",
        "CausalLM",
    ),
    "swin": Family(
        "SwinModel",
        lambda: t.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
        ),
        "SwinTransformerBackbone",
        exclude=("attention_qkv", "q_proj", "k_proj", "v_proj"),
        keras_inputs=lambda: image(32),
        torch_inputs=lambda: {
            "pixel_values": torch.tensor(image(32).transpose(0, 3, 1, 2).copy())
        },
    ),
    "t5gemma": Family(
        "T5GemmaForConditionalGeneration",
        lambda: t.T5GemmaConfig(
            encoder={**HALF, **SCALED}, decoder={**HALF, **SCALED}, vocab_size=30
        ),
        "T5GemmaBackbone",
        "Seq2SeqLM",
        exclude=("lm_head.out_proj",),
        keras_inputs=encoder_decoder,
        torch_inputs=torch_encoder_decoder,
    ),
    "vit": Family(
        "ViTForImageClassification",
        lambda: t.ViTConfig(**VISION, **LABELS, layer_norm_eps=1e-6),
        "ViTBackbone",
        "ImageClassifier",
        heads=("classifier",),
        keras_inputs=image,
        torch_inputs=torch_image,
    ),
    "xlm_roberta": Family(
        "XLMRobertaForSequenceClassification",
        lambda: t.XLMRobertaConfig(**TEXT, **ROBERTA),
        "XLMRobertaBackbone",
        "TextClassifier",
        heads=("classifier",),
    ),
}


def pair(name, folder):
    """transformers' model with random weights, and KerasHub's that reads them."""
    family = FAMILIES[name]
    torch.manual_seed(3)
    module = getattr(transformers, family.theirs)(family.config()).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    tensors = {}
    if family.write:
        family.write(module, tensors)
    module.save_pretrained(folder)
    file = folder / "model.safetensors"
    for key, value in safetensors.numpy.load_file(file).items():
        for part, other in family.keys.items():
            key = key.replace(part, other)
        tensors[key] = value
    safetensors.numpy.save_file(tensors, file)
    path = folder / "config.json"
    config = {**module.config.to_dict(), **json.loads(path.read_text())}
    path.write_text(json.dumps(config | family.config_json))
    if family.task == "ImageClassifier":
        task = keras_hub.models.ImageClassifier
        return module, task.from_preset(str(folder), preprocessor=None)
    backbone = getattr(keras_hub.models, family.ours).from_preset(str(folder))
    if not family.task:
        return module, backbone
    prefix = family.ours.removesuffix("Backbone")
    task = getattr(keras_hub.models, prefix + family.task)
    more = {"num_classes": 3} if family.task == "TextClassifier" else {}
    return module, task(backbone=backbone, preprocessor=None, **more)


def same_positions(module):
    """KerasHub's conversion is two positions off and leaves the token type out.

    With these weights nobody can see it.
    """
    embeddings = module.base_model.embeddings
    table = embeddings.position_embeddings.weight
    table.data[:] = table.data[5]
    embeddings.token_type_embeddings.weight.data[:] = 0


def write_mxfp4(module, tensors):
    """gpt-oss's experts, as its checkpoints have them: four bits and a scale each."""
    random = np.random.default_rng(8)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([values, -values])
    for name, parameter in module.named_parameters():
        if "experts" not in name:
            continue
        if name.endswith("bias"):
            tensors[name] = parameter.detach().numpy()
            continue
        experts, inputs, outputs = parameter.shape
        codes = random.integers(0, 16, (experts, outputs, inputs // 32, 32))
        scales = random.integers(120, 124, codes.shape[:3])
        weight = values[codes] * 2.0 ** (scales[..., None] - 127.0)
        weight = weight.reshape(experts, outputs, inputs).transpose(0, 2, 1)
        parameter.data = torch.tensor(weight.astype("float32"))
        blocks = codes[..., ::2] + 16 * codes[..., 1::2]
        tensors[f"{name}_blocks"] = blocks.astype("uint8")
        tensors[f"{name}_scales"] = scales.astype("uint8")


def ours(name, model):
    out = model((FAMILIES[name].keras_inputs or tokens)())
    if isinstance(out, dict):
        out = out.get("sequence_output", out.get("decoder_sequence_output"))
    return to_numpy(out)


def theirs(name, module):
    """What KerasHub's model gives: of a task's head the first, if there are two."""
    with torch.no_grad():
        out = module(**(FAMILIES[name].torch_inputs or torch_tokens)())
    return (out.cls_logits if "cls_logits" in out else out[0]).numpy()


def difference(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


def base_difference(name, module, model):
    """By how much KerasHub's own conversion differs, heads apart."""
    if FAMILIES[name].heads:
        module, model = module.base_model, getattr(model, "backbone", model)
    return difference(ours(name, model), theirs(name, module))


def exchange(name, folder):
    """A family's row: adapters of either library in the other."""
    family = FAMILIES[name]
    random = np.random.default_rng(9)
    module, model = pair(name, folder / "base")
    base = base_difference(name, module, model)
    linear = [
        n
        for n, m in module.named_modules()
        if isinstance(m, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
        and not n.endswith((*(family.exclude or ()), *family.heads, "lm_head"))
    ]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=linear,
        target_parameters=list(family.parameters) or None,
        rank_pattern={linear[2]: 2},
        alpha_pattern={linear[0]: 5, linear[3]: 4},
        modules_to_save=list(family.heads) or None,
        fan_in_fan_out=name == "gpt2",
    )
    adapted = peft.get_peft_model(copy.deepcopy(module), config).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    adapted.save_pretrained(folder / "theirs")
    report = keras_lora.load_adapter(model, folder / "theirs", names="transformers")
    expected = theirs(name, adapted)
    read = difference(ours(name, model), expected)
    assert difference(expected, theirs(name, module)) > 0.1
    # And from here, with every layer's own rank and alpha.
    keras_lora.remove_lora(model)
    exclude = list(family.exclude or ()) and [
        x
        for x in family.exclude
        if x in {p.split("/")[-1] for p in layers_by_path(model)}
    ]
    also_train = HEADS if family.heads else None
    options = {"exclude": exclude or None, "also_train": also_train}
    rows = keras_lora.apply_lora(model, rank=2, dry_run=True, **options)
    banks = [x for x in Paths(model).sites if re.fullmatch(BANKS, x)]
    if banks:
        options["target"] = [row.path for row in rows] + banks
        rows = keras_lora.apply_lora(model, rank=2, dry_run=True, **options)
    keras_lora.apply_lora(
        model,
        rank=2,
        rank_pattern={
            row.path: 2 if re.fullmatch(PARAMETERS, row.path) else 1 + i % 3
            for i, row in enumerate(rows)
        },
        alpha_pattern={
            row.path: 9 if re.fullmatch(PARAMETERS, row.path) else 3 + i % 5
            for i, row in enumerate(rows)
        },
        **options,
    )
    for weight in model.trainable_weights:
        weight.assign(random.standard_normal(weight.shape) * 0.2)
    keras_lora.save_adapter(model, folder / "ours", names="transformers")
    loaded = loaded_by_peft(module, folder / "ours")
    expected = ours(name, model)
    written = difference(theirs(name, loaded.eval()), expected)
    return Row(name, family.theirs, family.ours, len(report), base, read, written)


HEADS = "logits|pooled_dense|predictions"  # paths
BANKS = ".*/(experts|moe_expert_bank)/.*(proj|dense)"
PARAMETERS = f"{BANKS}|.*(router_dense|sparse_feedforward_gate_dense|router_gate)"


class Row(NamedTuple):
    """What docs/compatibility.md says of a family."""

    name: str
    theirs: str
    ours: str
    layers: int
    base: float  # KerasHub's own conversion
    read: float  # an adapter of PEFT here
    written: float  # one from here in PEFT

    def line(self):
        numbers = [f"{x:.0e}" for x in (self.base, self.read, self.written)]
        cells = [self.name, self.theirs, self.ours, str(self.layers), *numbers]
        return f"| {' | '.join(cells)} |"


TITLE = "## Adapters from and to transformers"
NOTES = """\
The same random weights in both libraries, by KerasHub's own conversion. An adapter of
PEFT {peft} in `load_adapter(model, folder, names="transformers")`, and one of
`save_adapter(model, folder, names="transformers")` in PEFT, on transformers
{transformers}: every linear layer, routers and experts of mixtures, heads too where
both have the same, with ranks, alphas and patterns that are not the defaults.
Differences of the outputs are relative to the largest. Written by
`python tests/families.py`.

Left out, here and there: Gemma 4's gated layers, whose kernels KerasHub reads itself;
Swin's query, key and value, which are one layer in KerasHub. Mistral's weights are
those that float16 holds, to which its converter rounds (5e-4 otherwise). Where
KerasHub's conversion differs, settings were chosen so that this does not show:
RoBERTa's positions are all the same, as its conversion is two off and leaves the token
type out (0.40 otherwise); T5Gemma has a sliding window of 64 (0.32 with 4), gpt-oss
plain RoPE (0.44 with YaRN), Qwen 3 an epsilon of 1e-5 (3e-5 with 1e-6), ViT and DeiT
one of 1e-6 (2e-5 with 1e-12).
Names of BLIP-2, Gemma 3 with images, Gemma 3n (its text model), MetaCLIP 2, PaliGemma,
SAM 3 and T5Gemma 2 are derived too, and their layouts tested, without a live
comparison. The converter of BLIP-2 does not work for a model without images.

| family | transformers | KerasHub | layers | conversion | PEFT -> here | here -> PEFT |
|---|---|---|---:|---:|---:|---:|
"""


def main():
    lines = []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lines.append(exchange(name, Path(folder)).line())
        print(lines[-1], flush=True)
    notes = NOTES.format(peft=peft.__version__, transformers=transformers.__version__)
    write_section(TITLE, notes + "\n".join(lines))


if __name__ == "__main__":
    main()
