"""Numbers compared with torch, run live: loralib, PEFT, torch.nn.functional.

A row says how to make their module and how their tensors lie in ours; the tests
compare forward, merged forward, gradients and ten optimizer steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import loralib
import numpy as np
import peft
import pytest
import torch
from gradients import gradients
from layer_cases import to_numpy

import keras_lora


@dataclass(frozen=True)
class Reference:
    name: str
    layer: Callable  # dtype -> our layer
    module: Callable  # () -> their module
    input_shape: tuple
    kernel: Callable  # their weight -> our kernel
    a: Callable  # their A -> our A
    b: Callable
    tensors: Callable = lambda module: (module.weight, module.lora_A, module.lora_B)
    merge: Callable = lambda module: module.eval()
    channels_first: bool = False  # theirs; ours are last
    vocabulary: int = 0


def linear(name, bias=True, **lora):
    return Reference(
        f"linear-{name}",
        layer=lambda dtype: keras_lora.LoRADense(
            5, use_bias=bias, dtype=dtype, rank=lora["r"], alpha=lora["lora_alpha"]
        ),
        module=lambda: loralib.Linear(6, 5, bias=bias, **lora),
        input_shape=(7, 6),
        kernel=np.transpose,
        a=np.transpose,
        b=np.transpose,
    )


def embedding(name, **lora):
    return Reference(
        f"embedding-{name}",
        layer=lambda dtype: keras_lora.LoRAEmbedding(
            9, 5, dtype=dtype, rank=lora["r"], alpha=lora["lora_alpha"]
        ),
        module=lambda: loralib.Embedding(9, 5, **lora),
        input_shape=(7,),
        kernel=lambda weight: weight,
        a=np.transpose,
        b=np.transpose,
        vocabulary=9,
    )


def merged_linear(mask, fan_in_fan_out=False):
    slices, rank, units = len(mask), 2, 3
    return Reference(
        "merged-linear-"
        + "".join("FT"[on] for on in mask)
        + "-fan-in" * fan_in_fan_out,
        layer=lambda dtype: keras_lora.LoRAMergedDense(
            units * slices, enable_lora=mask, dtype=dtype, rank=rank, alpha=3
        ),
        module=lambda: loralib.MergedLinear(
            6,
            units * slices,
            r=rank,
            lora_alpha=3,
            enable_lora=list(mask),
            fan_in_fan_out=fan_in_fan_out,
        ),
        input_shape=(7, 6),
        kernel=(lambda weight: weight) if fan_in_fan_out else np.transpose,
        a=np.transpose,
        b=lambda b: b.reshape(sum(mask), units, rank).transpose(0, 2, 1),
    )


class FunctionalConv(torch.nn.Module):
    """What loralib's convolutions mean, for the dimensions where they crash."""

    def __init__(self, ndim, kernel_size, rank, alpha, groups, **options):
        super().__init__()
        self.conv = getattr(torch.nn.functional, f"conv{ndim}d")
        self.options = {"groups": groups, **options}
        last, others = kernel_size[-1], int(np.prod(kernel_size[:-1]))
        self.scaling = alpha / rank
        new = torch.nn.Parameter
        self.weight = new(torch.randn(6, 4 // groups, *kernel_size), False)
        self.bias = new(torch.randn(6))
        self.lora_A = new(torch.randn(rank * last, 4 * last))
        self.lora_B = new(torch.randn(6 // groups * others, rank * last))

    def forward(self, x):
        delta = (self.lora_B @ self.lora_A).view(self.weight.shape) * self.scaling
        return self.conv(x, self.weight + delta, self.bias, **self.options)


def loralib_conv(ndim, kernel_size, groups=1, **options):
    """Against loralib itself in 2-D with a square kernel, else torch's functions."""
    square = ndim == 2 and len(set(kernel_size)) == 1
    ours = {
        "padding": "same" if options.get("padding") else "valid",
        "strides": options.get("stride", 1),
        "dilation_rate": options.get("dilation", 1),
    }
    layer = getattr(keras_lora, f"LoRAConv{ndim}D")
    settings = "-".join(f"{k}-{v}" for k, v in {"groups": groups, **options}.items())
    return Reference(
        f"loralib-conv{ndim}d-{kernel_size}-{settings}",
        layer=lambda dtype: layer(
            6,
            kernel_size,
            groups=groups,
            dtype=dtype,
            rank=2,
            alpha=3,
            factorization="loralib",
            **ours,
        ),
        module=lambda: (
            loralib.Conv2d(
                4, 6, kernel_size[0], r=2, lora_alpha=3, groups=groups, **options
            )
            if square
            else FunctionalConv(ndim, kernel_size, 2, 3, groups, **options)
        ),
        input_shape=(4, *(9, 8, 7)[:ndim]),
        kernel=kernel_to_last,
        a=lambda a: a,
        b=lambda b: b,
        tensors=lambda m: ((m.conv if square else m).weight, m.lora_A, m.lora_B),
        channels_first=True,
    )


def peft_conv(ndim, kernel_size, **options):
    """PEFT's form is our standard one: a convolution to r channels, then 1x1."""
    ours = {
        "padding": "same" if options.get("padding") else "valid",
        "strides": options.get("stride", 1),
    }
    layer = getattr(keras_lora, f"LoRAConv{ndim}D")

    def module():
        base = getattr(torch.nn, f"Conv{ndim}d")(4, 6, kernel_size, **options)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
        model = peft.get_peft_model(torch.nn.Sequential(base), config)
        return model.base_model.model[0]

    settings = "-".join(f"{k}-{v}" for k, v in options.items())
    return Reference(
        f"peft-conv{ndim}d-{kernel_size}-{settings}",
        layer=lambda dtype: layer(6, kernel_size, dtype=dtype, rank=3, alpha=5, **ours),
        module=module,
        input_shape=(4, *(9, 8, 7)[:ndim]),
        kernel=kernel_to_last,
        a=kernel_to_last,
        b=lambda b: b.reshape(b.shape[:2]).T,
        tensors=lambda m: (
            m.base_layer.weight,
            m.lora_A["default"].weight,
            m.lora_B["default"].weight,
        ),
        merge=lambda m: m.merge(),
        channels_first=True,
    )


def kernel_to_last(weight):
    """(filters, channels, *k) -> (*k, channels, filters)"""
    return np.moveaxis(weight, (1, 0), (-2, -1))


T, F = True, False
MASKS = [(T, F, T), (T, T, T), (T, F, F), (F, T, F), (F, F, T), (T, T, F), (F, T, T)]
MASKS += [(T,), (T, F), (T, F, T, T, F)]

REFERENCES = [
    linear("rank-3", r=3, lora_alpha=5),
    linear("rank-8-no-bias", r=8, lora_alpha=1, bias=False),
    embedding("rank-3", r=3, lora_alpha=5),
    *(merged_linear(mask) for mask in MASKS),
    merged_linear((T, F, T), fan_in_fan_out=True),
    loralib_conv(2, (1, 1)),
    loralib_conv(2, (3, 3), padding=1),
    loralib_conv(2, (3, 3), groups=2, stride=2),
    loralib_conv(2, (3, 3), dilation=2),
    loralib_conv(2, (2, 3)),
    loralib_conv(1, (3,)),
    loralib_conv(1, (5,), padding=2),
    loralib_conv(1, (3,), groups=2, stride=2),
    loralib_conv(3, (2, 2, 2)),
    loralib_conv(3, (3, 3, 3), groups=2, padding=1),
    loralib_conv(3, (2, 1, 3), stride=2),
    peft_conv(1, 3, padding=1),
    peft_conv(2, 3, stride=2),
    peft_conv(2, (3, 5)),
    peft_conv(2, 1),
    peft_conv(2, 1, stride=2),
    peft_conv(3, 2, stride=(1, 2, 1)),
]

over_references = pytest.mark.parametrize(
    "reference", REFERENCES, ids=lambda reference: reference.name
)
# Keras's own Dense multiplies float64 in float32 on the torch backend.
PRECISIONS = [("float64", 1e-12), ("float32", 1e-5)]
if keras.backend.backend() == "torch":
    PRECISIONS = [("float32", 1e-5)]
over_precisions = pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
# Where another precision would say no more, the one that tells most.
over_first_precision = pytest.mark.parametrize("dtype, tolerance", PRECISIONS[:1])
over_gradients = pytest.mark.parametrize(
    "dtype, tolerance, compiled",
    [(*precision, False) for precision in PRECISIONS] + [(*PRECISIONS[0], True)],
)


class Pair:
    """Our layer and their module with the same weights, inputs and loss."""

    def __init__(self, reference, dtype):
        self.reference, self.dtype = reference, dtype
        keras.config.set_floatx(dtype)
        torch.manual_seed(5)
        self.module = reference.module().double()
        self.weight, self.a, self.b = reference.tensors(self.module)
        with torch.no_grad():
            for tensor in (self.a, self.b):
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
        random = np.random.default_rng(4)
        shape = (2, *reference.input_shape)
        self.x = random.standard_normal(shape)  # as they take it
        if reference.vocabulary:
            self.x = random.integers(0, reference.vocabulary, shape)
        self.layer = reference.layer(dtype)
        self.layer.build(self.to_ours(self.x).shape)
        self.layer.frozen_kernel.assign(reference.kernel(array(self.weight)))
        self.layer.lora.a.assign(reference.a(array(self.a)))
        self.layer.lora.b.assign(reference.b(array(self.b)))
        bias = [p for n, p in self.module.named_parameters() if n.endswith("bias")]
        if bias:
            self.layer.bias.assign(array(bias[0]))
        self.weights = random.standard_normal(self.theirs().shape)

    def to_ours(self, values):
        """Their layout and precision to ours."""
        if np.issubdtype(values.dtype, np.integer):
            return values.astype("int32")
        if self.reference.channels_first:
            values = np.moveaxis(values, 1, -1)
        return np.ascontiguousarray(values, self.dtype)

    def theirs(self, x=None):
        return self.module(torch.tensor(self.x) if x is None else x)

    def ours(self, training):
        return self.layer(self.to_ours(self.x), training=training)

    def our_gradients(self, training=True, compiled=False):
        inputs, weights = self.to_ours(self.x), self.to_ours(self.weights)
        return gradients(self.layer, inputs, weights, training, compiled)

    def their_gradients(self):
        of_inputs = not self.reference.vocabulary
        x = torch.tensor(self.x, requires_grad=of_inputs)
        loss = (self.theirs(x) * torch.tensor(self.weights)).sum()
        sources = [self.a, self.b] + [x] * of_inputs
        a, b, *of_x = torch.autograd.grad(loss, sources)
        ours = [self.reference.a(array(a)), self.reference.b(array(b))]
        return ours + [self.to_ours(array(of) * 1.0) for of in of_x]


def array(tensor):
    return tensor.detach().numpy().copy()


def assert_close(ours, theirs, tolerance):
    scale = np.abs(theirs).max()
    assert scale > 0
    np.testing.assert_allclose(to_numpy(ours), theirs, rtol=0, atol=tolerance * scale)


@over_references
@over_precisions
def test_forward(reference, dtype, tolerance):
    pair = Pair(reference, dtype)
    assert_close(
        pair.ours(training=True), pair.to_ours(array(pair.theirs())), tolerance
    )


@over_references
@over_precisions
def test_merged_forward(reference, dtype, tolerance):
    pair = Pair(reference, dtype)
    reference.merge(pair.module)
    assert_close(
        pair.ours(training=False), pair.to_ours(array(pair.theirs())), tolerance
    )


@over_references
@over_gradients
def test_gradients_of_a_b_and_the_inputs(reference, dtype, tolerance, compiled):
    pair = Pair(reference, dtype)
    ours, theirs = pair.our_gradients(True, compiled), pair.their_gradients()
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient, tolerance)


@over_references
@over_first_precision
def test_gradients_of_the_merged_path(reference, dtype, tolerance):
    pair = Pair(reference, dtype)
    ours, theirs = pair.our_gradients(training=False), pair.their_gradients()
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient, tolerance)


# Each step is a gradient as above: a row for each kind of module.
@pytest.mark.parametrize("reference", REFERENCES[::3], ids=lambda row: row.name)
@over_first_precision
def test_optimizer_steps(reference, dtype, tolerance):
    pair = Pair(reference, dtype)
    factors = [pair.layer.lora.a, pair.layer.lora.b]
    # Rates that float32 holds exactly: Keras keeps them in floatx.
    optimizer = keras.optimizers.SGD(2.0**-7, momentum=0.5)
    their_optimizer = torch.optim.SGD([pair.a, pair.b], 2.0**-7, momentum=0.5)
    for _ in range(3):
        optimizer.apply(
            [keras.ops.convert_to_tensor(g) for g in pair.our_gradients()[:2]], factors
        )
        their_optimizer.zero_grad()
        (pair.theirs() * torch.tensor(pair.weights)).sum().backward()
        their_optimizer.step()
    assert_close(factors[0], reference.a(array(pair.a)), tolerance)
    assert_close(factors[1], reference.b(array(pair.b)), tolerance)
    assert_close(
        pair.ours(training=True), pair.to_ours(array(pair.theirs())), tolerance
    )
