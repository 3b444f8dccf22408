"""The public names, with all arguments of the layers, as Keras 3.15 has them.

Written by tests/typed_face.py.
"""

from keras_lora.files.analyze import analyze
from keras_lora.files.checkpoint import AdapterCheckpoint
from keras_lora.files.combine import combine_adapters
from keras_lora.files.engines import check_adapter
from keras_lora.files.extract import extract_adapter
from keras_lora.files.folder import Adapter
from keras_lora.files.from_keras import load_keras_lora
from keras_lora.files.from_loralib import load_loralib
from keras_lora.files.load import load_adapter
from keras_lora.files.save import save_adapter
from keras_lora.layers.conv import LoRAConv1D as _LoRAConv1D
from keras_lora.layers.conv import LoRAConv2D as _LoRAConv2D
from keras_lora.layers.conv import LoRAConv3D as _LoRAConv3D
from keras_lora.layers.dense import LoRADense as _LoRADense
from keras_lora.layers.einsum_dense import LoRAEinsumDense as _LoRAEinsumDense
from keras_lora.layers.embedding import LoRAEmbedding as _LoRAEmbedding
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.kinds import register_lora_layer
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.merged_dense import LoRAMergedDense as _LoRAMergedDense
from keras_lora.models.apply import apply_lora
from keras_lora.models.contexts import disabled
from keras_lora.models.contexts import merged
from keras_lora.models.export import export
from keras_lora.models.freezing import mark_only_lora_as_trainable
from keras_lora.models.initialize import initialize_lora
from keras_lora.models.lora_plus import LoRAPlus
from keras_lora.models.merge import merge_lora
from keras_lora.models.merge import remove_lora
from keras_lora.models.report import summary
from keras_lora.serving.bank import AdapterBank
from keras_lora.serving.sweep import sweep

__version__: str

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterCheckpoint",
    "LoRAConv1D",
    "LoRAConv2D",
    "LoRAConv3D",
    "LoRADense",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRAMergedDense",
    "LoRAPlus",
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

class LoRAConv1D(_LoRAConv1D):
    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        data_format=None,
        dilation_rate=1,
        groups=1,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        *,
        factorization="standard",
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        a_initializer=None,
        b_initializer=None,
        merge_weights: bool = True,
        **kwargs,
    ) -> None: ...

class LoRAConv2D(_LoRAConv2D):
    def __init__(
        self,
        filters,
        kernel_size,
        strides=(1, 1),
        padding="valid",
        data_format=None,
        dilation_rate=(1, 1),
        groups=1,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        *,
        factorization="standard",
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        a_initializer=None,
        b_initializer=None,
        merge_weights: bool = True,
        **kwargs,
    ) -> None: ...

class LoRAConv3D(_LoRAConv3D):
    def __init__(
        self,
        filters,
        kernel_size,
        strides=(1, 1, 1),
        padding="valid",
        data_format=None,
        dilation_rate=(1, 1, 1),
        groups=1,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        *,
        factorization="standard",
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        a_initializer=None,
        b_initializer=None,
        merge_weights: bool = True,
        **kwargs,
    ) -> None: ...

class LoRADense(_LoRADense):
    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        quantization_config=None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        a_initializer=None,
        b_initializer=None,
        merge_weights: bool = True,
        **kwargs,
    ) -> None: ...

class LoRAEinsumDense(_LoRAEinsumDense):
    def __init__(
        self,
        equation,
        output_shape,
        activation=None,
        bias_axes=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        gptq_unpacked_column_size=None,
        quantization_config=None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        a_initializer=None,
        b_initializer=None,
        merge_weights: bool = True,
        **kwargs,
    ) -> None: ...

class LoRAEmbedding(_LoRAEmbedding):
    def __init__(
        self,
        input_dim,
        output_dim,
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        embeddings_constraint=None,
        mask_zero=False,
        weights=None,
        quantization_config=None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        a_initializer=None,
        b_initializer=None,
        merge_weights: bool = True,
        **kwargs,
    ) -> None: ...

class LoRAMergedDense(_LoRAMergedDense):
    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        quantization_config=None,
        *,
        enable_lora=(True,),
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        a_initializer=None,
        b_initializer=None,
        merge_weights: bool = True,
        **kwargs,
    ) -> None: ...
