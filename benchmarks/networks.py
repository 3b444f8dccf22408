"""The networks that are measured: what goes in, and a maker per variant.

The floor is the same network with every kernel frozen and no adapters, behind one
trainable vector, so that the whole backward pass runs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import keras
import keras_hub
import numpy as np

import keras_lora
from keras_lora.models.sites import adapted_sites

FLOOR = "floor"
LINEAR = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


class Work(NamedTuple):
    """Inputs, targets, {variant: () -> model}, and the optimizer's class.

    methods: {method: () -> model} of the same network.
    """

    x: np.ndarray
    y: np.ndarray
    models: dict[str, Callable]
    baseline: str = FLOOR
    optimizer: type = keras.optimizers.AdamW
    methods: dict[str, Callable] = {}  # noqa: RUF012


class Scale(keras.layers.Layer):
    """The trainable vector before the first layer."""

    def build(self, input_shape):
        self.vector = self.add_weight(shape=(input_shape[-1],), initializer="ones")

    def call(self, inputs):
        return inputs * self.vector


class Shift(Scale):
    """The trainable vector after a lookup.

    It is added: the gradient of a product would cost whatever trains before it more
    than a frozen table does, and there is nothing to train before a lookup.
    """

    def call(self, inputs):
        return inputs + self.vector


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, "float32")


def freeze(model):
    """Freeze all of a network but its input and the layer `Scale` after it."""
    for layer in model.layers[2:]:
        layer.trainable = False
    return model


def variants(build, rank, dropout=0.0):
    """Floor, control, this library, Keras's own, and full fine-tuning of a network.

    build: () -> a model whose second layer is `Scale`.
    """

    def frozen():
        return freeze(build())

    def adapted():
        return adapt(build(), rank, dropout=dropout)

    def enabled():
        model = frozen()
        for layer in model._flatten_layers():
            if isinstance(layer, LINEAR):
                layer.trainable = True
                layer.enable_lora(rank)
        return model

    return {
        FLOOR: frozen,
        "control": frozen,
        "keras_lora": adapted,
        "Keras enable_lora": enabled,
        "full fine-tuning": build,
    }


def adapt(model, rank, **settings):
    keras_lora.apply_lora(
        model,
        rank=rank,
        target=lambda path, layer: isinstance(layer, LINEAR),
        also_train=[model.layers[1].name],
        **settings,
    )
    return model


def methods(build, rank, dropout=0.0):
    """LoRA, the same again, DoRA and a start that is subtracted, of a network."""

    def lora():
        return adapt(build(), rank, dropout=dropout)

    def started():
        model = lora()
        if all(layer.kernel_is_matrix for layer in adapted_sites(model)):
            keras_lora.initialize_lora(model, "olora")
        return model

    def dora():
        return adapt(build(), rank, dropout=dropout, use_dora=True)

    return {"LoRA": lora, "control": lora, "DoRA": dora, "OLoRA's start": started}


def dense(
    width,
    rows,
    rank,
    layers=6,
    dropout=0.0,
    dtype="float32",
    activation=None,
    length=None,
):
    """A stack of square layers; with a length the rows are tokens of sequences."""
    shape = (rows, width) if length is None else (rows // length, length, width)

    def build():
        inputs = keras.Input(shape[1:], dtype="float32")
        x = Scale()(inputs)
        for _ in range(layers):
            x = keras.layers.Dense(
                width, use_bias=False, dtype=dtype, activation=activation
            )(x)
        return keras.Model(inputs, x)

    x = normal(*shape)
    return Work(
        x, x, variants(build, rank, dropout), methods=methods(build, rank, dropout)
    )


def attention(width, length, rank, batch=8):
    """A transformer block with MultiHeadAttention; every projection adapted."""

    def build():
        inputs = keras.Input((length, width))
        hidden = Scale()(inputs)
        heads = keras.layers.MultiHeadAttention(width // 64, 64, name="attention")
        hidden = keras.layers.LayerNormalization()(hidden + heads(hidden, hidden))
        up = keras.layers.Dense(4 * width, activation="gelu", name="up")(hidden)
        down = keras.layers.Dense(width, name="down")(up)
        return keras.Model(inputs, keras.layers.LayerNormalization()(hidden + down))

    x = normal(batch, length, width)
    return Work(x, x, variants(build, rank), methods=methods(build, rank))


class Block(keras.layers.Layer):
    """A transformer block; with `remat` its backward pass computes it once more."""

    def __init__(self, width, remat):
        super().__init__()
        self.remat = remat
        self.heads = keras.layers.MultiHeadAttention(width // 64, 64)
        self.up = keras.layers.Dense(4 * width, activation="gelu")
        self.down = keras.layers.Dense(width)
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]

    def block(self, inputs):
        hidden = self.norms[0](inputs + self.heads(inputs, inputs))
        return self.norms[1](hidden + self.down(self.up(hidden)))

    def call(self, inputs):
        return (keras.remat(self.block) if self.remat else self.block)(inputs)


def blocks(width, length, rank, layers=4, batch=8):
    """Transformer blocks with every projection adapted, under `keras.remat` or not."""

    def build(remat=False):
        inputs = keras.Input((length, width))
        x = Scale()(inputs)
        for _ in range(layers):
            x = Block(width, remat)(x)
        return adapt(keras.Model(inputs, x), rank)

    return kept_or_not(normal(batch, length, width), build)


def scope(width, rows, rank, layers=6):
    """A stack of square layers with gelu, made in a RematScope or not."""

    def build(remat=False):
        inputs = keras.Input((width,))
        x = Scale()(inputs)
        with keras.RematScope(mode="full" if remat else None):
            stack = [keras.layers.Dense(width, "gelu") for _ in range(layers)]
        for layer in stack:
            x = layer(x)
        return adapt(keras.Model(inputs, x), rank)

    return kept_or_not(normal(rows, width), build)


def kept_or_not(x, build):
    """Work for models that keep all for the backward pass, or compute it once more."""
    models = {"kept": build, "control": build, "remat": partial(build, remat=True)}
    return Work(x, x, models, "kept")


def convolution(
    channels, size, rank, batch=8, kind="Conv2D", window=3, activation=None
):
    """Three convolutions."""
    shape = (*[size] * int(kind[4]), channels)

    def build():
        inputs = keras.Input(shape)
        x = Scale()(inputs)
        for _ in range(3):
            layer = getattr(keras.layers, kind)
            x = layer(channels, window, padding="same", use_bias=False)(x)
            if activation is not None:
                x = keras.layers.Activation(activation)(x)
        return keras.Model(inputs, x)

    x = normal(batch, *shape)
    return Work(x, x, variants(build, rank), methods=methods(build, rank))


def resnet_block(channels, size, rank, batch=8):
    """A bottleneck: 1x1, 3x3 and 1x1 with batch normalization, and the way around."""

    def build():
        inputs = keras.Input((size, size, channels))
        scaled = Scale()(inputs)
        x = scaled
        for filters, kernel in ((channels // 4, 1), (channels // 4, 3), (channels, 1)):
            x = keras.layers.Conv2D(filters, kernel, padding="same", use_bias=False)(x)
            x = keras.layers.BatchNormalization()(x)
            x = keras.layers.Activation("relu")(x)
        return keras.Model(inputs, keras.layers.add([x, scaled]))

    x = normal(batch, size, size, channels)
    return Work(x, x, variants(build, rank))


def fused(width, rows, rank):
    """Query, key and value in one kernel, two of the three adapted."""
    mask = (True, False, True)

    def merged():
        layer = keras_lora.LoRAMergedDense(
            3 * width, enable_lora=mask, rank=rank, use_bias=False
        )
        return keras.Sequential([keras.Input((width,)), Scale(), layer])

    def three():
        inputs = keras.Input((width,))
        x = Scale()(inputs)
        parts = [
            keras_lora.LoRADense(width, rank=rank if on else 0, use_bias=False)
            for on in mask
        ]
        model = keras.Model(inputs, keras.layers.concatenate([p(x) for p in parts]))
        parts[1].trainable = False
        return model

    def frozen():
        layer = keras.layers.Dense(3 * width, use_bias=False, trainable=False)
        return keras.Sequential([keras.Input((width,)), Scale(), layer])

    models = {
        FLOOR: frozen,
        "control": frozen,
        "LoRAMergedDense": merged,
        "three LoRADense": three,
    }
    return Work(normal(rows, width), normal(rows, 3 * width), models)


def quantized(width, rows, rank, layers=6):
    """A stack of square layers over kernels in float32, int8 and int4.

    Keras makes quantized layers by their dtype policy, so that no float kernel is
    ever there.
    """

    def stack(policy, layer_class, **settings):
        inputs = keras.Input((width,))
        x = Scale()(inputs)
        for _ in range(layers):
            x = layer_class(width, use_bias=False, dtype=policy, **settings)(x)
        return keras.Model(inputs, x)

    def of_keras(policy):
        model = stack(policy, keras.layers.Dense)
        for layer in model.layers[2:]:
            layer.enable_lora(rank)
        return model

    def ours(policy):
        return stack(policy, keras_lora.LoRADense, rank=rank)

    models = {"float32": partial(ours, "float32"), "control": partial(ours, "float32")}
    for mode, policy in (("int8", "int8"), ("int4", "int4/128")):
        models[mode] = partial(ours, f"{policy}_from_float32")
        models[f"Keras {mode}"] = partial(of_keras, f"{policy}_from_float32")
    x = normal(rows, width)
    return Work(x, x, models, "float32")


def embedding(vocabulary, rank, width=256, batch=64, length=32):
    """A lookup; the baseline is the plain layer that trains its whole table."""

    def plain():
        layer = keras.layers.Embedding(vocabulary, width)
        return keras.Sequential([keras.Input((length,), dtype="int32"), layer])

    def adapted():
        layer = keras_lora.LoRAEmbedding(vocabulary, width, rank=rank)
        return keras.Sequential([keras.Input((length,), dtype="int32"), layer])

    def enabled():
        model = plain()
        model.layers[0].enable_lora(rank)
        return model

    models = {"plain layer": plain, "control": plain, "keras_lora": adapted}
    if vocabulary <= 100_000:
        models["Keras enable_lora"] = enabled
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length), "int32")
    y = normal(batch, length, width)
    return Work(ids, y, models, "plain layer", keras.optimizers.SGD)


def frozen_and_adapted(build, rank, **settings):
    """Floor, control and this library, for layers that `apply_lora` names.

    build: () -> a model whose second layer is `Scale` and whose third is adapted.
    """

    def frozen():
        return freeze(build())

    def adapted():
        model = build()
        keras_lora.apply_lora(
            model,
            rank=rank,
            target=[model.layers[2].name],
            also_train=[model.layers[1].name],
            **settings,
        )
        return model

    return {FLOOR: frozen, "control": frozen, "keras_lora": adapted}


def recurrent(units, steps, rank, batch=32, kind="LSTM"):
    """One recurrent layer, both of whose kernels are adapted."""

    def build():
        inputs = keras.Input((steps, units))
        layer = getattr(keras.layers, kind)(units, name="adapted")
        return keras.Model(inputs, layer(Scale()(inputs)))

    x, y = normal(batch, steps, units), normal(batch, units)
    return Work(x, y, frozen_and_adapted(build, rank))


def transposed(channels, size, rank, batch=8):
    """One transposed convolution, with a window of 3 x 3 and strides of 2."""

    def build():
        inputs = keras.Input((size, size, channels))
        layer = keras.layers.Conv2DTranspose(
            channels, 3, strides=2, padding="same", name="adapted"
        )
        return keras.Model(inputs, layer(Scale()(inputs)))

    x, y = (
        normal(batch, size, size, channels),
        normal(batch, 2 * size, 2 * size, channels),
    )
    return Work(x, y, frozen_and_adapted(build, rank))


def experts(count, width, inner, tokens, rank):
    """KerasHub's bank of Qwen MoE, both of whose weights are adapted."""
    backbone = keras_hub.models.QwenMoeBackbone(
        vocabulary_size=2,
        num_layers=1,
        num_query_heads=1,
        num_key_value_heads=1,
        hidden_dim=2,
        intermediate_dim=2,
        moe_intermediate_dim=2,
        shared_expert_intermediate_dim=2,
        num_experts=2,
        top_k=1,
    )
    bank = type(backbone.transformer_layers[0].mlp.expert_bank)

    def build():
        inputs = keras.Input((width,))
        outputs = bank(count, width, inner, name="adapted")(Scale()(inputs))
        return keras.Model(inputs, keras.ops.mean(outputs, axis=0))

    x = normal(tokens, width)
    return Work(x, x, frozen_and_adapted(build, rank))


def token_rows(vocabulary, width, rows, layers=0, batch=64, length=32):
    """A lookup in a table of which some rows train, over the frozen table's.

    layers: how many frozen Dense layers come after it.
    """

    def build():
        inputs = keras.Input((length,), dtype="int32")
        table = keras.layers.Embedding(vocabulary, width, name="table")
        outputs = Shift()(table(inputs))
        for _ in range(layers):
            outputs = keras.layers.Dense(width, trainable=False)(outputs)
        return keras.Model(inputs, outputs)

    def frozen():
        model = build()
        model.layers[1].trainable = False
        return model

    def adapted():
        model = build()
        keras_lora.apply_lora(
            model,
            target=None,
            trainable_token_indices=range(rows),
            also_train=[model.layers[2].name],
        )
        return model

    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length), "int32")
    models = {FLOOR: frozen, "control": frozen, "keras_lora": adapted}
    return Work(ids, normal(batch, length, width), models)
