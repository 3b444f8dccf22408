"""LoRA for Keras 3: low-rank adaptation as layers and on whole models."""

from keras_lora.adapter_checkpoint import AdapterCheckpoint
from keras_lora.adapter_folder import Adapter
from keras_lora.adapter_loading import load_adapter
from keras_lora.adapter_saving import save_adapter
from keras_lora.adoption import apply_lora
from keras_lora.combining import combine_adapters
from keras_lora.contexts import disabled
from keras_lora.contexts import merged
from keras_lora.conv import LoRAConv1D
from keras_lora.conv import LoRAConv2D
from keras_lora.conv import LoRAConv3D
from keras_lora.dense import LoRADense
from keras_lora.einsum_dense import LoRAEinsumDense
from keras_lora.embedding import LoRAEmbedding
from keras_lora.enable_lora import load_keras_lora
from keras_lora.export import export
from keras_lora.extraction import extract_adapter
from keras_lora.freezing import mark_only_lora_as_trainable
from keras_lora.layer_conversion import register_lora_layer
from keras_lora.lora_layer import LoRALayer
from keras_lora.loralib import load_loralib
from keras_lora.merged_dense import LoRAMergedDense
from keras_lora.merging import merge_lora
from keras_lora.merging import remove_lora
from keras_lora.report import summary
