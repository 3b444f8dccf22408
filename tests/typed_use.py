"""What mypy has to say of code that uses the package: this file is never run.

Where an error is expected, its absence is one.
"""

from typing import assert_type

import keras

import keras_lora
from keras_lora import LoRADense

layer = LoRADense(64, activation="relu", use_bias=False, rank=4, alpha=8, name="up")
assert_type(layer, LoRADense)
LoRADense(rank=4)  # type: ignore[call-arg]
LoRADense(64, rank="4")  # type: ignore[arg-type]
LoRADense(64, "relu", True, dropout=None)  # type: ignore[arg-type]
keras_lora.LoRAEinsumDense("abc,cd->abd", (None, 3), use_rslora=True)
keras_lora.LoRAEinsumDense(rank=4)  # type: ignore[call-arg]
keras_lora.LoRAMergedDense(6, enable_lora=(True, False), use_dora=True)
keras_lora.LoRAMergedDense(rank=4)  # type: ignore[call-arg]
keras_lora.LoRAEmbedding(input_dim=9, output_dim=4, mask_zero=True, rank=2)
keras_lora.LoRAEmbedding(9)  # type: ignore[call-arg]
keras_lora.LoRAConv1D(8, 3, factorization="loralib", padding="same")
keras_lora.LoRAConv1D(8)  # type: ignore[call-arg]
keras_lora.LoRAConv2D(filters=8, kernel_size=(3, 3), strides=(2, 2), groups=2)
keras_lora.LoRAConv2D(8)  # type: ignore[call-arg]
keras_lora.LoRAConv3D(8, 3, merge_weights=False)
keras_lora.LoRAConv3D(8)  # type: ignore[call-arg]
if layer.lora is not None:
    assert_type(layer.lora.rank, int)
    assert_type(layer.lora.scaling, float)

model = keras.Sequential([layer])
keras_lora.apply_lora(model, rank="8")  # type: ignore[arg-type]
keras_lora.apply_lora(model, r=8)  # type: ignore[call-arg]
adapter = keras_lora.combine_adapters(["one", "two"], weights=[0.5, 0.5])
assert_type(adapter, keras_lora.Adapter)
assert_type(keras_lora.AdapterBank(model).names, list)
