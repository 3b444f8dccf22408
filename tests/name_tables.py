"""The names of four architectures, written by hand: what derived names are held to."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class NameTable(NamedTuple):
    """The same architecture in KerasHub and in Hugging Face transformers.

    Attributes:
        prefix: Where transformers' task models keep the backbone.
        backbone: Expression for a path in the KerasHub backbone -> module.
        task: Likewise for what a task adds to its backbone.
        fan_in_fan_out: Whether the modules keep their weights as (in, out).
    """

    prefix: str
    backbone: Mapping
    task: Mapping
    fan_in_fan_out: bool = False

    def __call__(self, path):
        for rule, module in self.task.items():
            if re.fullmatch(rule, path):
                return re.sub(rule, module, path)
        for rule, module in self.backbone.items():
            match = re.fullmatch(rf"(.+/)?{rule}", path)
            if match:
                prefix = self.prefix if match[1] else ""
                return prefix + re.sub(rf"(?:.+/)?{rule}", module, path)
        return None


LAYER, BLOCK = r"transformer_layer_(\d+)/", r"decoder_block_(\d+)/"
NAME_TABLES = {
    "bert": NameTable(
        prefix="bert.",
        backbone={
            "token_embedding": "embeddings.word_embeddings",
            "position_embedding": "embeddings.position_embeddings",
            "segment_embedding": "embeddings.token_type_embeddings",
            "embeddings_layer_norm": "embeddings.LayerNorm",
            rf"{LAYER}self_attention_layer/(query|key|value)": (
                r"encoder.layer.\1.attention.self.\2"
            ),
            rf"{LAYER}self_attention_layer/attention_output": (
                r"encoder.layer.\1.attention.output.dense"
            ),
            rf"{LAYER}self_attention_layer_norm": (
                r"encoder.layer.\1.attention.output.LayerNorm"
            ),
            rf"{LAYER}feedforward_intermediate_dense": (
                r"encoder.layer.\1.intermediate.dense"
            ),
            rf"{LAYER}feedforward_output_dense": r"encoder.layer.\1.output.dense",
            rf"{LAYER}feedforward_layer_norm": r"encoder.layer.\1.output.LayerNorm",
            "pooled_dense": "pooler.dense",
        },
        task={"logits": "classifier"},
    ),
    "gpt2": NameTable(
        prefix="transformer.",
        backbone={
            "token_embedding": "wte",
            "position_embedding": "wpe",
            rf"{LAYER}self_attention/query": r"h.\1.attn.c_attn[0/3]",
            rf"{LAYER}self_attention/key": r"h.\1.attn.c_attn[1/3]",
            rf"{LAYER}self_attention/value": r"h.\1.attn.c_attn[2/3]",
            rf"{LAYER}self_attention/attention_output": r"h.\1.attn.c_proj",
            rf"{LAYER}self_attention_layer_norm": r"h.\1.ln_1",
            rf"{LAYER}feedforward_intermediate_dense": r"h.\1.mlp.c_fc",
            rf"{LAYER}feedforward_output_dense": r"h.\1.mlp.c_proj",
            rf"{LAYER}feedforward_layer_norm": r"h.\1.ln_2",
            "layer_norm": "ln_f",
        },
        task={},
        fan_in_fan_out=True,
    ),
    "llama": NameTable(
        prefix="model.",
        backbone={
            "token_embedding": "embed_tokens",
            rf"{LAYER}self_attention/query": r"layers.\1.self_attn.q_proj",
            rf"{LAYER}self_attention/key": r"layers.\1.self_attn.k_proj",
            rf"{LAYER}self_attention/value": r"layers.\1.self_attn.v_proj",
            rf"{LAYER}self_attention/attention_output": (r"layers.\1.self_attn.o_proj"),
            rf"{LAYER}feedforward_gate_dense": r"layers.\1.mlp.gate_proj",
            rf"{LAYER}feedforward_intermediate_dense": r"layers.\1.mlp.up_proj",
            rf"{LAYER}feedforward_output_dense": r"layers.\1.mlp.down_proj",
            rf"{LAYER}self_attention_layernorm": r"layers.\1.input_layernorm",
            rf"{LAYER}feedforward_layernorm": r"layers.\1.post_attention_layernorm",
            "sequence_output_layernorm": "norm",
        },
        task={},
    ),
    "gemma": NameTable(
        prefix="model.",
        backbone={
            "token_embedding": "embed_tokens",
            rf"{BLOCK}pre_attention_norm": r"layers.\1.input_layernorm",
            rf"{BLOCK}pre_ffw_norm": r"layers.\1.post_attention_layernorm",
            "final_normalization": "norm",
            rf"{BLOCK}attention/query": r"layers.\1.self_attn.q_proj",
            rf"{BLOCK}attention/key": r"layers.\1.self_attn.k_proj",
            rf"{BLOCK}attention/value": r"layers.\1.self_attn.v_proj",
            rf"{BLOCK}attention/attention_output": (r"layers.\1.self_attn.o_proj"),
            rf"{BLOCK}ffw_gating": r"layers.\1.mlp.gate_proj",
            rf"{BLOCK}ffw_gating_2": r"layers.\1.mlp.up_proj",
            rf"{BLOCK}ffw_linear": r"layers.\1.mlp.down_proj",
        },
        task={},
    ),
}
