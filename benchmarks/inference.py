"""One call at inference, as ratios to the plain layer."""

import tempfile
from pathlib import Path

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import keras_lora
from benchmarks.networks import normal
from benchmarks.timing import ratios


def compiled_call(layer, inputs, jit=False):
    x = tf.constant(inputs)
    call = tf.function(lambda x: layer(x, training=False), jit_compile=jit)
    call(x), call(x)
    return lambda: call(x).numpy()


def dense(network, arguments, rounds):
    """LoRADense merged in the call, low-rank, merged for good, and exported."""
    width, rows, rank = arguments
    kernel, b = normal(width, width), normal(rank, width)

    def model_of(layer):
        model = keras.Sequential([keras.Input((width,)), layer])
        layer.kernel.assign(np.array(kernel))
        if getattr(layer, "lora", None) is not None:
            layer.lora.b.assign(b)
        return model

    def adapted(**kwargs):
        layer = keras_lora.LoRADense(width, use_bias=False, rank=rank, **kwargs)
        return model_of(layer)

    def plain():
        return model_of(keras.layers.Dense(width, use_bias=False))

    def served(model, export):
        with tempfile.TemporaryDirectory() as folder:
            export(model, str(Path(folder, "served")))
            artifact = tf.saved_model.load(str(Path(folder, "served")))
        inputs = tf.constant(x)
        artifact.serve(inputs), artifact.serve(inputs)
        return lambda: artifact.serve(inputs).numpy()

    merged = adapted()
    keras_lora.merge_lora(merged)
    x = normal(rows, width)
    calls = {
        "plain layer": compiled_call(plain().layers[0], x),
        "control": compiled_call(plain().layers[0], x),
        "merged in the call": compiled_call(adapted().layers[0], x),
        "low-rank path": compiled_call(adapted(merge_weights=False).layers[0], x),
        "merged for good": compiled_call(merged.layers[0], x),
    }
    exports = {
        "plain, exported": served(plain(), lambda m, p: m.export(p, verbose=False)),
        "exported": served(adapted(), keras_lora.export),
    }
    inner = max(1, 256 // rows)
    found = ratios(calls, "plain layer", rounds, inner)
    return found | ratios(exports, "plain, exported", rounds, inner)


def generation(network, arguments, rounds):
    """Time for a text of a small GPT-2 of random weights, whose Dense layers adapt."""
    texts, jit = arguments
    length, prompt, vocabulary = 48, 16, 4096
    ids = np.random.default_rng(0).integers(0, vocabulary, (texts, length), "int32")
    inputs = {
        "token_ids": ids,
        "padding_mask": np.repeat([np.arange(length) < prompt], texts, axis=0),
    }

    def model():
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=vocabulary,
            num_layers=4,
            num_heads=12,
            hidden_dim=768,
            intermediate_dim=3072,
            max_sequence_length=length,
        )
        model = keras_hub.models.GPT2CausalLM(backbone)
        model.compile(sampler="greedy", jit_compile=jit)
        return model

    def adapted():
        lm = model()
        keras_lora.apply_lora(lm, rank=8)
        return lm

    models = {
        "plain model": model(),
        "control": model(),
        "inside merged()": adapted(),
        "outside": adapted(),
    }
    with keras_lora.merged(models["inside merged()"]):
        calls = {
            name: lambda lm=lm: lm.generate(inputs, stop_token_ids=None)
            for name, lm in models.items()
        }
        for call in calls.values():
            call(), call()
        return ratios(calls, "plain model", rounds)


def embedding(network, arguments, rounds, width=256, batch=64, length=32):
    vocabulary, rank, *jit = arguments
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length), "int32")
    layers = {
        "plain layer": keras.layers.Embedding(vocabulary, width),
        "control": keras.layers.Embedding(vocabulary, width),
        "keras_lora": keras_lora.LoRAEmbedding(vocabulary, width, rank=rank),
    }
    for layer in layers.values():
        layer.build()
    if vocabulary <= 100_000:
        builtin = keras.layers.Embedding(vocabulary, width)
        builtin.build()
        builtin.enable_lora(rank)
        layers["Keras enable_lora"] = builtin
    calls = {  # the plain layer takes no `training`
        name: compiled_call(lambda x, training, layer=layer: layer(x), ids, *jit)
        for name, layer in layers.items()
    }
    return ratios(calls, "plain layer", rounds, inner=5)
