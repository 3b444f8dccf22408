"""LoRA for Keras 3: low-rank adaptation as layers and on whole models."""

from keras_lora.dense import LoRADense
