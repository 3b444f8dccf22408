"""Numbers compared with torch, run live: microsoft/LoRA (loralib).

A row says how to make their module and how their tensors lie in ours; the tests
compare forward, merged forward, gradients and ten optimizer steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import loralib
import numpy as np
import pytest
import torch
from gradients import gradients
from layer_cases import to_numpy

import keras_lora


@dataclass(frozen=True)
class Reference:
    name: str
    layer: Callable  # dtype -> our layer
    module: Callable  # () -> their module, in float64
    input_shape: tuple
    kernel: Callable  # their weight -> our kernel
    a: Callable  # their A -> our A
    b: Callable
    tensors: Callable = lambda module: (module.weight, module.lora_A, module.lora_B)


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


REFERENCES = [
    linear("rank-3", r=3, lora_alpha=5),
    linear("rank-8-no-bias", r=8, lora_alpha=1, bias=False),
]

over_references = pytest.mark.parametrize(
    "reference", REFERENCES, ids=lambda reference: reference.name
)
# Keras's own Dense multiplies float64 in float32 on the torch backend.
PRECISIONS = [("float64", 1e-12), ("float32", 1e-5)]
if keras.backend.backend() == "torch":
    PRECISIONS = [("float32", 1e-5)]
over_precisions = pytest.mark.parametrize("dtype, tolerance", PRECISIONS)


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
        self.x = random.standard_normal((2, *reference.input_shape))
        self.layer = reference.layer(dtype)
        self.layer.build(self.x.shape)
        self.layer.frozen_kernel.assign(reference.kernel(array(self.weight)))
        self.layer.lora.a.assign(reference.a(array(self.a)))
        self.layer.lora.b.assign(reference.b(array(self.b)))
        if getattr(self.module, "bias", None) is not None:
            self.layer.bias.assign(array(self.module.bias))
        outputs = self.theirs()
        self.weights = random.standard_normal(outputs.shape)

    def theirs(self, x=None):
        return self.module(torch.tensor(self.x) if x is None else x)

    def ours(self, training):
        return self.layer(self.x.astype(self.dtype), training=training)

    def our_gradients(self, training=True):
        inputs, weights = (v.astype(self.dtype) for v in (self.x, self.weights))
        return gradients(self.layer, inputs, weights, training)

    def their_gradients(self):
        x = torch.tensor(self.x, requires_grad=True)
        loss = (self.theirs(x) * torch.tensor(self.weights)).sum()
        a, b, of_x = torch.autograd.grad(loss, [self.a, self.b, x])
        return self.reference.a(array(a)), self.reference.b(array(b)), array(of_x)


def array(tensor):
    return tensor.detach().numpy().copy()


def assert_close(ours, theirs, tolerance):
    theirs = array(theirs) if isinstance(theirs, torch.Tensor) else theirs
    scale = np.abs(theirs).max()
    assert scale > 0
    np.testing.assert_allclose(to_numpy(ours), theirs, rtol=0, atol=tolerance * scale)


@over_references
@over_precisions
def test_forward(reference, dtype, tolerance):
    pair = Pair(reference, dtype)
    assert_close(pair.ours(training=True), pair.theirs(), tolerance)


@over_references
@over_precisions
def test_merged_forward(reference, dtype, tolerance):
    pair = Pair(reference, dtype)
    pair.module.eval()
    assert_close(pair.ours(training=False), pair.theirs(), tolerance)


@over_references
@over_precisions
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_b_and_the_inputs(reference, dtype, tolerance, training):
    pair = Pair(reference, dtype)
    ours, theirs = pair.our_gradients(training), pair.their_gradients()
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient, tolerance)


@over_references
@over_precisions
def test_ten_optimizer_steps(reference, dtype, tolerance):
    pair = Pair(reference, dtype)
    factors = [pair.layer.lora.a, pair.layer.lora.b]
    # Rates that float32 holds exactly: Keras keeps them in floatx.
    optimizer = keras.optimizers.SGD(2.0**-7, momentum=0.5)
    their_optimizer = torch.optim.SGD([pair.a, pair.b], 2.0**-7, momentum=0.5)
    for _ in range(10):
        optimizer.apply(
            [keras.ops.convert_to_tensor(g) for g in pair.our_gradients()[:2]], factors
        )
        their_optimizer.zero_grad()
        (pair.theirs() * torch.tensor(pair.weights)).sum().backward()
        their_optimizer.step()
    assert_close(factors[0], reference.a(array(pair.a)), tolerance)
    assert_close(factors[1], reference.b(array(pair.b)), tolerance)
    assert_close(pair.ours(training=True), pair.theirs(), tolerance)
