"""Models of transformers, small and with random weights."""

import warnings

import numpy as np
import peft
import torch
import transformers

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2}


BERT = transformers.BertConfig(
    **SIZES,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    hidden_act="gelu_pytorch_tanh",  # KerasHub's
)


GPT2 = transformers.GPT2Config(
    vocab_size=30,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=12,
    bos_token_id=0,
    eos_token_id=0,
)


GEMMA = transformers.GemmaConfig(
    **SIZES,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
)


def ids():
    return np.random.default_rng(2).integers(1, 30, (3, 7)).astype("int32")


def theirs(module):
    with torch.no_grad():
        return module(torch.tensor(ids()).long())[0].numpy()


def loaded_by_peft(module, folder):
    """Without a warning but transformers' own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        # Said of a pattern that means a parameter, and is obeyed.
        warnings.filterwarnings("ignore", message=".*_pattern.*did not match any")
        return peft.PeftModel.from_pretrained(module, folder)
