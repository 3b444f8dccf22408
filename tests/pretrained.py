"""Models as somebody else built them: no LoRA layer in them yet."""

import keras
import numpy as np


def sequential():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu", name="first"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4, use_bias=False),
            keras.layers.Dense(3, name="head"),
        ]
    )


def convolutional():
    inputs = keras.Input((6,))
    x = keras.layers.Reshape((6, 1))(inputs)
    x = keras.layers.Conv1D(4, 3, padding="causal", name="conv1d_a")(x)
    x = keras.layers.Reshape((3, 2, 4))(x)
    x = keras.layers.Conv2D(4, 2, padding="same", name="conv2d_a")(x)
    x = keras.layers.Reshape((3, 2, 2, 2))(x)
    x = keras.layers.Conv3D(2, 2, padding="same", name="conv3d_a")(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def transformer():
    """Functional, with attention, a shared layer, a wrapper and a nested model."""
    inputs = keras.Input((6,))
    ids = keras.ops.cast(keras.ops.abs(inputs) * 3, "int32")
    x = keras.layers.Embedding(50, 8, name="tokens")(ids)
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    x = keras.layers.LayerNormalization()(x + attention(x, x))
    grouped = keras.layers.GroupQueryAttention(4, 4, 2, name="grouped")
    x = x + grouped(x, x)
    shared = keras.layers.Dense(8, activation="gelu", name="shared")
    x = shared(shared(x))
    x = keras.layers.TimeDistributed(keras.layers.Dense(8), name="steps")(x)
    inner_inputs = keras.Input((6, 8))
    inner = keras.Model(
        inner_inputs, keras.layers.Dense(8, name="up")(inner_inputs) + 1, name="inner"
    )
    x = keras.layers.GlobalAveragePooling1D()(inner(x))
    outputs = keras.layers.Dense(3, name="head")(x)
    return keras.Model(inputs, keras.layers.Activation("linear")(outputs))


@keras.saving.register_keras_serializable(package="tests")
class Pretrained(keras.Model):
    """Layers in a list, a dict and a closure."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [keras.layers.Dense(6) for _ in range(2)]
        self.parts = {"wide": keras.layers.Dense(6, activation="tanh")}
        self.head = keras.layers.Dense(3)
        self._enclosed = keras.layers.Dense(6)
        self.run_enclosed = lambda inputs: self._enclosed(inputs)

    def call(self, inputs):
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return self.head(self.run_enclosed(self.parts["wide"](inputs)))


def subclassed():
    model = Pretrained()
    model(np.zeros((1, 6), "float32"))
    return model


PRETRAINED = [sequential, convolutional, transformer, subclassed]


def small_classifier(words):
    """A BERT of KerasHub with random weights, which knows some words."""
    import keras_hub

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(words),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
    )
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=words)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer, sequence_length=8
    )
    return keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=2, preprocessor=preprocessor
    )
