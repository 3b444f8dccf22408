"""Prefixes and names of modules in transformers, by family."""

import re

# The attribute of transformers' task models that is the backbone; else "model".
ROOTS = {
    "albert": "albert",
    "bert": "bert",
    "deit": "deit",
    "dinov2": "dinov2",
    "distilbert": "distilbert",
    "esm": "esm",
    "gpt2": "transformer",
    "roberta": "roberta",
    "swin_transformer": "swin",
    "vit": "vit",
    "xlm_roberta": "roberta",
}
VIT = {
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.query$": "attention.q_proj",
    r"attention\.attention\.key$": "attention.k_proj",
    r"attention\.attention\.value$": "attention.v_proj",
    r"attention\.output\.dense$": "attention.o_proj",
    r"intermediate\.dense$": "mlp.fc1",
    r"output\.dense$": "mlp.fc2",
}
TOWERS = {
    r"^language_model\.model\.": "language_model.",
    r"^vision_tower\.vision_model\.": "vision_tower.",
}
# Names that transformers 5 has changed from those of the checkpoints, in this order.
SINCE_5 = {
    "deit": VIT,
    "dinov2": {rule: VIT[rule] for rule in list(VIT)[1:5]},
    "dinov3": {r"^layer\.": "model.layer."},
    "gemma3": TOWERS,
    "mixtral": {r"\.block_sparse_moe\.": ".mlp."},
    "pali_gemma": TOWERS,
    "swin_transformer": {
        r"attention\.self\.(.)\w+$": r"attention.\1_proj",
        **{rule: VIT[rule] for rule in list(VIT)[4:]},
    },
    "t5gemma2": {
        r"^encoder\.(layers|embed_tokens|norm)\b": r"encoder.text_model.\1",
        r"^encoder\.vision_tower\.vision_model\.": "encoder.vision_tower.",
    },
    "vit": VIT,
}
# The experts of a layer in the checkpoints.
EXPERTS = {
    "gemma4": "experts",
    "gpt_oss": "mlp.experts",
    "mixtral": "block_sparse_moe.experts",
    "qwen_moe": "mlp.experts",
    "qwen3_moe": "mlp.experts",
    "qwen3_5_moe": "mlp.experts",
}
# Weight of a layer of experts in KerasHub -> parameter in transformers. Where KerasHub
# has two weights, the gate comes before the up projection.
EXPERT_WEIGHTS = {
    "gate_up_proj": "gate_up_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
    "expert_feedforward_gate_dense": "gate_up_proj",
    "expert_feedforward_intermediate_dense": "gate_up_proj",
    "expert_feedforward_output_dense": "down_proj",
}
# The router of a mixture of experts: since transformers 5 not a linear module.
ROUTER = re.compile(r".*\.mlp\.(gate|router)")
ROBERTA = {
    "pooled_dense": "classifier.dense",
    "logits": "classifier.out_proj",
    "mlm_head/intermediate_dense": "lm_head.dense",
    "mlm_head/intermediate_layer_norm": "lm_head.layer_norm",
}
# Path in KerasHub's task -> module beside the backbone in transformers'.
HEADS = {
    "albert": {
        "logits": "classifier",
        "mlm_head/intermediate_dense": "predictions.dense",
        "mlm_head/intermediate_layer_norm": "predictions.LayerNorm",
    },
    "bert": {
        "logits": "classifier",
        "mlm_head/intermediate_dense": "cls.predictions.transform.dense",
        "mlm_head/intermediate_layer_norm": "cls.predictions.transform.LayerNorm",
    },
    "deit": {"predictions": "cls_classifier"},
    "distilbert": {
        "pooled_dense": "pre_classifier",
        "logits": "classifier",
        "mlm_head/intermediate_dense": "vocab_transform",
        "mlm_head/intermediate_layer_norm": "vocab_layer_norm",
    },
    "esm": ROBERTA,
    "roberta": ROBERTA,
    "swin_transformer": {"predictions": "classifier"},
    "vit": {"predictions": "classifier"},
    "xlm_roberta": ROBERTA,
}
