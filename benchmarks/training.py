"""One training step of networks with LoRA layers, as ratios to the floor.

The floor is the same network with every kernel frozen and no adapters, behind one
trainable vector, so that the whole backward pass runs.
"""

import keras
import loralib
import numpy as np
import peft
import tensorflow as tf
import torch

import keras_lora
from benchmarks.timing import ratios


class Scale(keras.layers.Layer):
    """The trainable vector before the first layer."""

    def build(self, input_shape):
        self.vector = self.add_weight(shape=(input_shape[-1],), initializer="ones")

    def call(self, inputs):
        return inputs * self.vector


def keras_step(model, inputs, targets, jit=False):
    """A compiled step of AdamW, as a function without arguments."""
    model.compile(keras.optimizers.AdamW(1e-4), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    x, y = tf.constant(inputs), tf.constant(targets)

    @tf.function(jit_compile=jit)
    def step():
        return model.train_step((x, y))["loss"]

    def run():
        return step().numpy()

    run(), run()
    return run


def torch_step(module, inputs, targets):
    x, y = torch.tensor(inputs), torch.tensor(targets)
    vector = torch.nn.Parameter(torch.ones(x.shape[-1]))
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([vector, *trained], 1e-4)

    def run():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(module(x * vector), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    run(), run()
    return run


def network(input_shape, make_layers, frozen=False):
    inputs = keras.Input(input_shape)
    x = Scale()(inputs)
    for layer in make_layers():
        x = layer(x)
        layer.trainable = not frozen
    return keras.Model(inputs, x)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, "float32")


def dense(width, rows, rank, rounds, layers=6, dropout=0.0, dtype="float32"):
    """A stack of square layers; torch's peers over torch's own floor."""
    x, y = normal(rows, width), normal(rows, width)

    def plain():
        kwargs = {"use_bias": False, "dtype": dtype}
        return [keras.layers.Dense(width, **kwargs) for _ in range(layers)]

    def adapted():
        kwargs = {"use_bias": False, "dtype": dtype, "dropout": dropout}
        return [keras_lora.LoRADense(width, rank=rank, **kwargs) for _ in range(layers)]

    builtin = network((width,), plain)
    for layer in builtin.layers[2:]:
        layer.enable_lora(rank)
    steps = {
        "floor": keras_step(network((width,), plain, frozen=True), x, y),
        "control": keras_step(network((width,), plain, frozen=True), x, y),
        "keras_lora": keras_step(network((width,), adapted), x, y),
        "Keras enable_lora": keras_step(builtin, x, y),
        "full fine-tuning": keras_step(network((width,), plain), x, y),
    }
    found = ratios(steps, "floor", rounds)
    if dtype != "float32":
        return found

    def linear():
        return torch.nn.Sequential(
            *(torch.nn.Linear(width, width, bias=False) for _ in range(layers))
        )

    of_loralib = torch.nn.Sequential(
        *(
            loralib.Linear(width, width, r=rank, lora_dropout=dropout, bias=False)
            for _ in range(layers)
        )
    )
    loralib.mark_only_lora_as_trainable(of_loralib)
    config = peft.LoraConfig(
        r=rank, lora_dropout=dropout, target_modules=[str(i) for i in range(layers)]
    )
    steps = {
        "torch floor": torch_step(linear().requires_grad_(False), x, y),
        "loralib": torch_step(of_loralib, x, y),
        "PEFT": torch_step(peft.get_peft_model(linear(), config), x, y),
    }
    return found | ratios(steps, "torch floor", rounds)


def fused(width, rows, rank, rounds):
    """Query, key and value in one kernel, two of the three adapted."""
    mask = (True, False, True)
    x, y = normal(rows, width), normal(rows, 3 * width)

    def three(inputs):
        parts = [
            keras_lora.LoRADense(width, rank=rank if on else 0, use_bias=False)
            for on in mask
        ]
        outputs = [part(inputs) for part in parts]
        parts[1].trainable = False
        return keras.layers.concatenate(outputs)

    inputs = keras.Input((width,))
    three_layers = keras.Model(inputs, three(Scale()(inputs)))

    def plain():
        return [keras.layers.Dense(3 * width, use_bias=False)]

    def merged():
        kwargs = {"enable_lora": mask, "rank": rank, "use_bias": False}
        return [keras_lora.LoRAMergedDense(3 * width, **kwargs)]

    steps = {
        "floor": keras_step(network((width,), plain, frozen=True), x, y),
        "control": keras_step(network((width,), plain, frozen=True), x, y),
        "LoRAMergedDense": keras_step(network((width,), merged), x, y),
        "three LoRADense": keras_step(three_layers, x, y),
    }
    linear = torch.nn.Linear(width, 3 * width, bias=False).requires_grad_(False)
    of_loralib = loralib.MergedLinear(
        width, 3 * width, r=rank, enable_lora=list(mask), bias=False
    )
    loralib.mark_only_lora_as_trainable(of_loralib)
    theirs = {
        "torch floor": torch_step(linear, x, y),
        "loralib MergedLinear": torch_step(of_loralib, x, y),
    }
    found = ratios(steps, "floor", rounds)
    return found | ratios(theirs, "torch floor", rounds)


def attention(width, length, rank, rounds, batch=8):
    """A transformer block with MultiHeadAttention; every projection adapted."""
    x, y = normal(batch, length, width), normal(batch, length, width)

    def block(adapt=None):
        inputs = keras.Input((length, width))
        hidden = Scale()(inputs)
        heads = keras.layers.MultiHeadAttention(width // 64, 64, name="attention")
        hidden = keras.layers.LayerNormalization()(hidden + heads(hidden, hidden))
        up = keras.layers.Dense(4 * width, activation="gelu", name="up")(hidden)
        down = keras.layers.Dense(width, name="down")(up)
        outputs = keras.layers.LayerNormalization()(hidden + down)
        model = keras.Model(inputs, outputs)
        scale = model.layers[1]
        if adapt == "keras_lora":
            keras_lora.apply_lora(model, rank=rank, also_train=[scale.name])
        for layer in model.layers[2:]:
            if adapt != "keras_lora" and adapt != "full":
                layer.trainable = False
        if adapt == "enable_lora":
            attention = model.get_layer("attention")
            adapted = [*attention._flatten_layers(), *model.layers]
            for layer in adapted:
                if isinstance(layer, LINEAR):
                    layer.trainable = True
                    layer.enable_lora(rank)
        return model

    steps = {
        "floor": keras_step(block(), x, y),
        "control": keras_step(block(), x, y),
        "keras_lora": keras_step(block("keras_lora"), x, y),
        "Keras enable_lora": keras_step(block("enable_lora"), x, y),
        "full fine-tuning": keras_step(block("full"), x, y),
    }
    return ratios(steps, "floor", rounds)


LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)


def convolution(channels, size, rank, rounds, batch=8):
    """Three 3x3 convolutions, over the frozen network."""
    shape = (size, size, channels)
    x, y = normal(batch, *shape), normal(batch, *shape)
    kwargs = {"padding": "same", "use_bias": False}

    def plain():
        return [keras.layers.Conv2D(channels, 3, **kwargs) for _ in range(3)]

    def adapted():
        return [
            keras_lora.LoRAConv2D(channels, 3, rank=rank, **kwargs) for _ in range(3)
        ]

    builtin = network(shape, plain)
    for layer in builtin.layers[2:]:
        layer.enable_lora(rank)
    steps = {
        "floor": keras_step(network(shape, plain, frozen=True), x, y),
        "control": keras_step(network(shape, plain, frozen=True), x, y),
        "keras_lora": keras_step(network(shape, adapted), x, y),
        "Keras enable_lora": keras_step(builtin, x, y),
    }
    return ratios(steps, "floor", rounds)


def embedding(vocabulary, rank, rounds, width=256, batch=64, length=32):
    """A lookup and its step, over the plain layer that trains its whole table."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length), "int32")
    y = normal(batch, length, width)

    def model(layer, builtin=False):
        inputs = keras.Input((length,), dtype="int32")
        outputs = layer(inputs)
        if builtin:
            layer.enable_lora(rank)
        result = keras.Model(inputs, outputs)
        return result

    def step(model):
        model.compile(keras.optimizers.SGD(1e-4), "mse", jit_compile=False)
        x, targets = tf.constant(ids), tf.constant(y)

        @tf.function
        def one():
            return model.train_step((x, targets))["loss"]

        def run():
            return one().numpy()

        run(), run()
        return run

    plain = keras.layers.Embedding
    steps = {
        "plain layer": step(model(plain(vocabulary, width))),
        "control": step(model(plain(vocabulary, width))),
        "keras_lora": step(
            model(keras_lora.LoRAEmbedding(vocabulary, width, rank=rank))
        ),
    }
    if vocabulary <= 100_000:
        steps["Keras enable_lora"] = step(model(plain(vocabulary, width), True))
    return ratios(steps, "plain layer", rounds)
