"""One call at inference, as ratios to the plain layer."""

import keras
import numpy as np
import tensorflow as tf

import keras_lora
from benchmarks.timing import ratios
from benchmarks.training import normal


def compiled_call(layer, inputs):
    x = tf.constant(inputs)
    call = tf.function(lambda x: layer(x, training=False))
    call(x), call(x)
    return lambda: call(x).numpy()


def dense(width, rows, rank, rounds):
    """LoRADense merged in the call, by the low-rank path, and folded."""
    kernel = normal(width, width)
    b = normal(rank, width)

    def adapted(**kwargs):
        layer = keras_lora.LoRADense(width, use_bias=False, rank=rank, **kwargs)
        layer.build((None, width))
        layer.kernel.assign(kernel)
        layer.lora.b.assign(b)
        return layer

    def plain():
        layer = keras.layers.Dense(width, use_bias=False)
        layer.build((None, width))
        layer.kernel.assign(np.array(kernel))
        return layer

    folded = adapted()
    keras_lora.merge_lora(folded)
    x = normal(rows, width)
    calls = {
        "plain layer": compiled_call(plain(), x),
        "control": compiled_call(plain(), x),
        "merged in the call": compiled_call(adapted(), x),
        "low-rank path": compiled_call(adapted(merge_weights=False), x),
        "folded": compiled_call(folded, x),
    }
    return ratios(calls, "plain layer", rounds, inner=max(1, 256 // rows))


def embedding(vocabulary, rank, rounds, width=256, batch=64, length=32):
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length), "int32")
    builtin = keras.layers.Embedding(vocabulary, width)
    builtin.build()
    builtin.enable_lora(rank)
    calls = {
        "plain layer": keras.layers.Embedding(vocabulary, width),
        "control": keras.layers.Embedding(vocabulary, width),
        "keras_lora": keras_lora.LoRAEmbedding(vocabulary, width, rank=rank),
    }
    if vocabulary <= 100_000:
        calls["Keras enable_lora"] = builtin
    functions = {}
    for name, layer in calls.items():
        x = tf.constant(ids)
        call = tf.function(lambda x, layer=layer: layer(x))
        call(x), call(x)
        functions[name] = lambda call=call, x=x: call(x).numpy()
    return ratios(functions, "plain layer", rounds, inner=5)
