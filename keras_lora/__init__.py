"""LoRA for Keras 3: low-rank adaptation as layers and on whole models."""

import importlib
import sys


def is_command():
    """Whether this is `python -m keras_lora`, which reads files without Keras."""
    words = [*sys.orig_argv, None]
    module = words[words.index("-m") + 1] if "-m" in words else None
    return sys.argv[:1] == ["-m"] and module == __name__  # until it is found


if not is_command():
    from keras_lora.files.analyze import analyze, check_adapter
    from keras_lora.files.combine import combine_adapters
    from keras_lora.files.extract import extract_adapter
    from keras_lora.files.folder import Adapter
    from keras_lora.files.from_keras import load_keras_lora
    from keras_lora.files.from_loralib import load_loralib
    from keras_lora.files.load import load_adapter
    from keras_lora.files.save import AdapterCheckpoint, save_adapter
    from keras_lora.layers.conv import LoRAConv1D, LoRAConv2D, LoRAConv3D
    from keras_lora.layers.dense import LoRADense
    from keras_lora.layers.einsum_dense import LoRAEinsumDense
    from keras_lora.layers.embedding import LoRAEmbedding
    from keras_lora.layers.form import LowRankForm
    from keras_lora.layers.kinds import register_lora_layer
    from keras_lora.layers.lora_layer import LoRALayer
    from keras_lora.layers.merged_dense import LoRAMergedDense
    from keras_lora.layers.recurrent import LoRAGRU, LoRALSTM, LoRASimpleRNN
    from keras_lora.layers.substituted_conv import (
        LoRAConv1DTranspose,
        LoRAConv2DTranspose,
        LoRAConv3DTranspose,
        LoRADepthwiseConv1D,
        LoRADepthwiseConv2D,
        LoRASeparableConv1D,
        LoRASeparableConv2D,
    )
    from keras_lora.models.apply import apply_lora, mark_only_lora_as_trainable
    from keras_lora.models.contexts import disabled, merged
    from keras_lora.models.export import export
    from keras_lora.models.initialize import initialize_lora
    from keras_lora.models.lora_plus import LoRAPlus
    from keras_lora.models.merge import merge_lora, remove_lora
    from keras_lora.models.report import summary
    from keras_lora.serving.bank import AdapterBank
    from keras_lora.serving.sweep import sweep


def __getattr__(name):
    """Loads what was left out for the command, if a user's module asks for it."""
    if name not in __all__ or name in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.reload(sys.modules[__name__])
    return globals()[name]


__version__ = "0.2.0.dev0"

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterCheckpoint",
    "LoRAConv1D",
    "LoRAConv1DTranspose",
    "LoRAConv2D",
    "LoRAConv2DTranspose",
    "LoRAConv3D",
    "LoRAConv3DTranspose",
    "LoRADense",
    "LoRADepthwiseConv1D",
    "LoRADepthwiseConv2D",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRAGRU",
    "LoRALSTM",
    "LoRALayer",
    "LoRAMergedDense",
    "LoRAPlus",
    "LoRASeparableConv1D",
    "LoRASeparableConv2D",
    "LoRASimpleRNN",
    "LowRankForm",
    "analyze",
    "apply_lora",
    "check_adapter",
    "combine_adapters",
    "disabled",
    "export",
    "extract_adapter",
    "initialize_lora",
    "load_adapter",
    "load_keras_lora",
    "load_loralib",
    "mark_only_lora_as_trainable",
    "merge_lora",
    "merged",
    "register_lora_layer",
    "remove_lora",
    "save_adapter",
    "summary",
    "sweep",
]
