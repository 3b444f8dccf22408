"""One row per kind of layer, setting and method; the laws run over all rows."""

import dataclasses
from dataclasses import dataclass, field

import keras
import numpy as np
import pytest

import keras_lora

ON_TORCH = keras.backend.backend() == "torch"
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
    lengths: int = 0  # of DoRA's m, which has one for each adapted output
    fan_in: int | dict = 0  # how many inputs an entry of A's rank axis sums over
    substituted: bool = False  # its call computes with W + delta, in training too

    @property
    def drops(self):
        """Whether the adapter has inputs of its own that can be dropped."""
        return not (self.vocabulary or self.substituted)

    @property
    def last_places(self):
        """An embedding sums its rows in another order than the table.

        torch sums in recurrent layers by where the kernel lies in memory, and in
        convolutions of Keras 3.16 by whether a gradient is needed.
        """
        return 4 if self.substituted and ON_TORCH else int(self.vocabulary > 0)

    def layer(self, **overrides):
        """A fresh LoRA layer, built, with a bias that is not zero."""
        layer = self.layer_class(**{**self.arguments, **self.lora, **overrides})
        layer.build((None, *self.input_shape))
        if bias_of(layer) is not None:
            fill(bias_of(layer), seed=3)
        return layer

    def trained_layer(self, **overrides):
        """The same with factors as after training: none is as it was at first."""
        layer = self.layer(**overrides)
        for place, lora in enumerate(layer.loras.values()):
            for seed, factor in enumerate((lora.a, lora.b)):
                fill(factor, seed + 2 * place, scale=0.3)
            if lora.magnitude is not None:
                random = np.random.default_rng(5)
                lora.magnitude.assign(random.random(lora.magnitude.shape) + 0.5)
        return layer

    def plain_layer(self, layer, kernels, **overrides):
        """The Keras layer with the given kernels and the LoRA layer's bias.

        kernels: name of a weight -> value; or that of the only one.
        """
        if not isinstance(kernels, dict):
            kernels = {layer.kernel_name: kernels}
        plain = layer.plain_class(**{**self.arguments, **overrides})
        plain.build((None, *self.input_shape))
        holder = getattr(plain, "cell", plain)
        for name, kernel in kernels.items():
            getattr(holder, name).assign(kernel)
        if bias_of(layer) is not None:
            bias_of(plain).assign(bias_of(layer))
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


def bias_of(layer):
    return getattr(getattr(layer, "cell", layer), "bias", None)


def sites(layer):
    return list(layer.sites().values())


def frozen_kernels(layer):
    """Name of a weight -> W."""
    holder = getattr(layer, "cell", layer)
    names = getattr(layer, "adapted_weights", None) or (layer.kernel_name,)
    return {name: getattr(holder, name) for name in names}


def merged_kernels(layer):
    """W + delta as the layer forms it, in the kernel's own dtype."""
    return {s.weight_name: s.merged_kernel(s.frozen_kernel.dtype) for s in sites(layer)}


def deltas(layer):
    return {weight: lora.delta() for weight, lora in layer.loras.items()}


def factors(layer):
    """Name -> factor, of all adapters of a layer."""
    return {
        f"{weight}/{name}": factor
        for weight, lora in layer.loras.items()
        for name, factor in lora.named_factors().items()
    }


def dense(name, parameters, units=5, lora=None, **arguments):
    return Case(
        f"dense-{name}",
        keras_lora.LoRADense,
        {"units": units, **arguments},
        input_shape=(6,),
        lora=lora or {},
        factor_parameters=parameters,
        fan_in=6,
    )


def embedding(name, parameters, input_shape=(4,), **settings):
    return Case(
        f"embedding-{name}",
        keras_lora.LoRAEmbedding,
        {"input_dim": 9, "output_dim": 5, **settings.pop("arguments", {})},
        input_shape=input_shape,
        lora=settings,
        vocabulary=9,
        factor_parameters=parameters,
    )


def merged_dense(name, parameters, units, mask, **lora):
    return Case(
        f"merged-dense-{name}",
        keras_lora.LoRAMergedDense,
        {"units": units},
        input_shape=(4, 6),
        lora={"enable_lora": mask, **lora},
        factor_parameters=parameters,
        fan_in=6,
    )


def einsum_dense(name, parameters, equation, output_shape, input_shape, **settings):
    return Case(
        f"einsum-dense-{name}",
        keras_lora.LoRAEinsumDense,
        {
            "equation": equation,
            "output_shape": output_shape,
            **settings.pop("arguments", {}),
        },
        input_shape=input_shape,
        lora=settings,
        factor_parameters=parameters,
        fan_in=3 * 4 if name == "output" else 6,
    )


def conv(name, ndim, parameters, kernel_size, channels=4, filters=6, **settings):
    arguments = settings.pop("arguments", {})
    window = (kernel_size,) * ndim if isinstance(kernel_size, int) else kernel_size
    fan_in = int(np.prod(window)) * channels // arguments.get("groups", 1)
    if "factorization" in settings:
        fan_in = channels * window[-1]
    return Case(
        f"conv{ndim}d-{name}",
        (keras_lora.LoRAConv1D, keras_lora.LoRAConv2D, keras_lora.LoRAConv3D)[ndim - 1],
        {
            "filters": filters,
            "kernel_size": kernel_size,
            **arguments,
        },
        input_shape=settings.pop("input_shape", (*(7, 8, 6)[:ndim], channels)),
        lora=settings,
        factor_parameters=parameters,
        fan_in=fan_in,
    )


def recurrent(name, gates, rank=2, **settings):
    units, inputs = 4, 3
    parts = (inputs + gates * units, units + gates * units)
    return Case(
        f"recurrent-{name}",
        getattr(keras_lora, settings.pop("layer")),
        {"units": units, **settings.pop("arguments", {})},
        input_shape=(5, inputs),
        lora={"rank": rank, **settings},
        factor_parameters=rank * sum(parts),
        fan_in={"kernel": inputs, "recurrent_kernel": units},
        substituted=True,
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
        fan_in=6,
    ),
    embedding("rank-8", 8 * (9 + 5)),
    embedding("rank-2", 2 * (9 + 5), rank=2, alpha=3),
    embedding("mask", 9 + 5, rank=1, arguments={"mask_zero": True}),
    embedding("two-axes", 2 * (9 + 5), input_shape=(3, 4), rank=2, use_rslora=True),
    merged_dense("all", 3 * 2 * 6 + 3 * 2 * 4, 12, (True, True, True), rank=2),
    merged_dense(
        "query-value", 2 * 2 * 6 + 2 * 2 * 4, 12, (True, False, True), rank=2, alpha=5
    ),
    merged_dense("one", 8 * 6 + 8 * 5, 5, (True,)),
    merged_dense(
        "five", 3 * 6 + 3 * 2, 10, [True, False, True, True, False], rank=1, dropout=0.4
    ),
    einsum_dense(
        "query",
        2 * (6 + 3 * 4),
        "abc,cde->abde",
        (5, 3, 4),
        (5, 6),
        rank=2,
        alpha=3,
        arguments={"bias_axes": "de", "activation": "tanh"},
    ),
    einsum_dense(
        "output",
        8 * (3 * 4 + 5),
        "abcd,cde->abe",
        (5, 5),
        (5, 3, 4),
        arguments={"bias_axes": "e"},
    ),
    einsum_dense(
        "ellipsis", 4 * (6 + 5), "...x,xy->...y", 5, (2, 6), rank=4, dropout=0.2
    ),
    einsum_dense("batch-axis", 3 * 2 * (6 + 5), "abc,bcd->abd", (3, 5), (3, 6), rank=2),
    conv("plain", 1, 2 * (3 * 4 + 6), 3, rank=2, alpha=3),
    conv(
        "causal",
        1,
        2 * (3 * 4 + 6),
        3,
        rank=2,
        dropout=0.3,
        arguments={"padding": "causal", "dilation_rate": 2, "activation": "tanh"},
    ),
    conv("loralib", 1, 3 * 2 * (3 * 4 + 6), 3, rank=2, factorization="loralib"),
    conv(
        "plain", 2, 8 * (3 * 3 * 4 + 6), 3, arguments={"strides": 2, "padding": "same"}
    ),
    conv(
        "tall-dilated",
        2,
        2 * (3 * 2 * 4 + 6),
        (3, 2),
        rank=2,
        use_rslora=True,
        arguments={"dilation_rate": 2, "use_bias": False, "activation": "relu"},
    ),
    conv("groups", 2, 3 * (9 * 2 + 6), 3, rank=3, arguments={"groups": 2}),
    conv(
        "loralib",
        2,
        2 * 3 * (3 * 4) + 2 * 3 * (3 * 6 // 2),
        3,
        rank=2,
        alpha=4,
        factorization="loralib",
        arguments={"groups": 2, "padding": "same"},
    ),
    conv("pointwise", 2, 2 * (4 + 6), 1, rank=2, arguments={"activation": "relu"}),
    conv("plain", 3, 2 * (8 * 4 + 6), 2, rank=2, arguments={"strides": (1, 2, 1)}),
    conv(
        "loralib",
        3,
        2 * 2 * (2 * 4 + 6 * 4),
        2,
        factorization="loralib",
        rank=2,
        arguments={"padding": "same"},
    ),
]

# One row for each way to compute, for laws in which settings play no part.
KINDS = [
    case
    for case in CASES
    if case.name
    in (
        "dense-relu",
        "embedding-rank-2",
        "merged-dense-query-value",
        "einsum-dense-query",
        "einsum-dense-batch-axis",
        "conv1d-causal",
        "conv1d-loralib",
        "conv2d-tall-dilated",
        "conv3d-plain",
    )
]


def substituted(name, layer, parameters, fan_in, input_shape, rank=2, **settings):
    arguments = settings.pop("arguments", {})
    if "Depthwise" not in layer:
        arguments = {"filters": 5, **arguments}
    return Case(
        f"substituted-{name}",
        getattr(keras_lora, layer),
        {"kernel_size": 3, **arguments},
        input_shape=input_shape,
        lora={"rank": rank, **settings},
        factor_parameters=rank * parameters,
        fan_in=fan_in,
        substituted=True,
    )


# Layers whose own call computes with W + delta.
SUBSTITUTED = [
    recurrent("simple", 1, layer="LoRASimpleRNN"),
    recurrent(
        "lstm",
        4,
        layer="LoRALSTM",
        alpha=3,
        # Keras's own, orthogonal, has no values in bfloat16 on TensorFlow.
        arguments={"recurrent_initializer": "glorot_uniform"},
    ),
    recurrent(
        "gru",
        3,
        layer="LoRAGRU",
        use_rslora=True,
        arguments={"return_sequences": True, "go_backwards": True},
    ),
    substituted(
        "conv1d-transpose",
        "LoRAConv1DTranspose",
        4 + 3 * 5,
        fan_in=4,
        input_shape=(5, 4),
        alpha=3,
        arguments={"strides": 2, "padding": "same", "activation": "tanh"},
    ),
    substituted(
        "conv2d-transpose",
        "LoRAConv2DTranspose",
        4 + 2 * 3 * 5,
        fan_in=4,
        input_shape=(4, 3, 4),
        arguments={"kernel_size": (2, 3), "strides": (2, 1)},
    ),
    substituted(
        "conv3d-transpose",
        "LoRAConv3DTranspose",
        2 + 8 * 5,
        fan_in=2,
        input_shape=(2, 3, 2, 2),
        arguments={"kernel_size": 2, "use_bias": False},
    ),
    substituted(
        "separable1d",
        "LoRASeparableConv1D",
        3 + 4 * 2 + 8 + 5,
        fan_in={"depthwise_kernel": 3, "pointwise_kernel": 8},
        input_shape=(6, 4),
        arguments={"depth_multiplier": 2},
    ),
    substituted(
        "separable2d",
        "LoRASeparableConv2D",
        9 + 4 + 4 + 5,
        fan_in={"depthwise_kernel": 9, "pointwise_kernel": 4},
        input_shape=(5, 6, 4),
        use_rslora=True,
        arguments={"strides": 2, "padding": "same"},
    ),
    substituted(
        "depthwise1d",
        "LoRADepthwiseConv1D",
        3 + 4,
        fan_in=3,
        input_shape=(6, 4),
    ),
    substituted(
        "depthwise2d",
        "LoRADepthwiseConv2D",
        9 + 4 * 2,
        fan_in=9,
        input_shape=(5, 6, 4),
        arguments={"depth_multiplier": 2, "activation": "relu"},
    ),
]
EVERY = CASES + SUBSTITUTED


def with_dora(case, lengths):
    return dataclasses.replace(
        case,
        name=f"{case.name}-dora",
        lora={**case.lora, "use_dora": True},
        factor_parameters=case.factor_parameters + lengths,
        lengths=lengths,
    )


# Every kind but loralib's factors of a convolution, which are no product that could be
# normed, and each way in which m lies over the outputs.
LENGTHS = {
    "dense-rank-1": 5,
    "dense-dropout": 5,
    "embedding-mask": 5,
    "merged-dense-query-value": 8,
    "einsum-dense-query": 3 * 4,
    "einsum-dense-output": 5,
    "einsum-dense-ellipsis": 5,
    "einsum-dense-batch-axis": 3 * 5,
    "einsum-dense-batch-axis-last": 5 * 3,
    "conv1d-causal": 6,
    "conv2d-groups": 6,
    "conv3d-plain": 6,
}
BATCH_AXIS_LAST = einsum_dense(
    "batch-axis-last", 3 * 2 * (6 + 5), "abc,dcb->abd", (3, 5), (3, 6), rank=2
)
DORA = [
    with_dora(case, LENGTHS[case.name])
    for case in (*CASES, BATCH_AXIS_LAST)
    if case.name in LENGTHS
]


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def name_of(value):
    """A case's, a function's, or the value itself."""
    return getattr(value, "name", getattr(value, "__name__", str(value)))


def slow_but(quick, rows):
    """Marks all rows of a test `slow` but those: README's command leaves them out."""
    marked = []
    for row in rows:
        values = row if isinstance(row, tuple) else (row,)
        name = "-".join(map(name_of, values))
        marks = () if name in quick else pytest.mark.slow
        marked.append(pytest.param(*values, id=name, marks=marks))
    return marked
