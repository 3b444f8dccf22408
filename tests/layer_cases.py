"""One row per kind of layer and setting; the laws run over all rows."""

from dataclasses import dataclass
from dataclasses import field

import keras
import numpy as np

import keras_lora

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    name: str
    layer_class: type
    arguments: dict  # those of the Keras base class
    input_shape: tuple  # without the batch axis
    lora: dict = field(default_factory=dict)
    vocabulary: int = 0  # > 0: inputs are ids below it
    factor_parameters: int = 0  # closed form: r * (inputs + units) and its like

    def layer(self, **overrides):
        """A fresh LoRA layer, built, with a bias that is not zero."""
        layer = self.layer_class(**{**self.arguments, **self.lora, **overrides})
        layer.build((None, *self.input_shape))
        if getattr(layer, "bias", None) is not None:
            fill(layer.bias, seed=3)
        return layer

    def trained_layer(self, **overrides):
        """The same with A and B as after training: neither is zero."""
        layer = self.layer(**overrides)
        for seed, factor in enumerate((layer.lora.a, layer.lora.b)):
            fill(factor, seed, scale=0.3)
        return layer

    def plain_layer(self, layer, kernel, **overrides):
        """The Keras layer with the given kernel and the LoRA layer's bias."""
        plain = layer.plain_class(**{**self.arguments, **overrides})
        plain.build((None, *self.input_shape))
        getattr(plain, layer.kernel_name).assign(kernel)
        if getattr(layer, "bias", None) is not None:
            plain.bias.assign(layer.bias)
        return plain

    def inputs(self, batch=3, dtype="float32", seed=11):
        random = np.random.default_rng(seed)
        shape = (batch, *self.input_shape)
        if self.vocabulary:
            return random.integers(0, self.vocabulary, shape).astype("int32")
        return random.standard_normal(shape).astype(dtype)

    def model(self, **overrides):
        """The layer in a small regression model; targets come with `targets`."""
        dtype = "int32" if self.vocabulary else "float32"
        layer = self.layer_class(**{**self.arguments, **self.lora, **overrides})
        return keras.Sequential(
            [
                keras.Input(self.input_shape, dtype=dtype),
                layer,
                keras.layers.Flatten(dtype="float32"),
                keras.layers.Dense(2, dtype="float32"),
            ]
        )

    def targets(self, batch=3, seed=12):
        return np.random.default_rng(seed).standard_normal((batch, 2), "float32")


def fill(variable, seed, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(variable.shape) * scale
    variable.assign(values.astype("float32"))


def to_numpy(tensor):
    """A copy of any tensor or variable; half precision comes as float32."""
    tensor = keras.ops.convert_to_tensor(tensor)
    if keras.backend.standardize_dtype(tensor.dtype) in ("bfloat16", "float16"):
        tensor = keras.ops.cast(tensor, "float32")
    return np.array(keras.ops.convert_to_numpy(tensor))


def merged_kernel(layer):
    """W + delta as the layer forms it, in the kernel's own dtype."""
    return layer.merged_kernel(layer.frozen_kernel.dtype)


def dense(name, parameters, units=5, lora=None, **arguments):
    return Case(
        f"dense-{name}",
        keras_lora.LoRADense,
        {"units": units, **arguments},
        input_shape=(6,),
        lora=lora or {},
        factor_parameters=parameters,
    )


CASES = [
    dense("rank-8", 8 * (6 + 5)),
    dense("rank-1", 6 + 5, lora={"rank": 1, "alpha": 4}),
    dense("no-bias", 2 * (6 + 5), lora={"rank": 2}, use_bias=False),
    dense("relu", 2 * (6 + 5), lora={"rank": 2, "alpha": 3}, activation="relu"),
    dense("rslora", 4 * (6 + 5), lora={"rank": 4, "alpha": 3, "use_rslora": True}),
    dense("dropout", 4 * (6 + 5), lora={"rank": 4, "dropout": 0.5}),
    Case(
        "dense-three-axes",
        keras_lora.LoRADense,
        {"units": 5, "activation": "tanh"},
        input_shape=(4, 6),
        lora={"rank": 3, "alpha": 6},
        factor_parameters=3 * (6 + 5),
    ),
]
