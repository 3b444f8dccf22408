"""What A and B start as: by the kernel, by the inputs, by what quantizing lost."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from keras_lora.keras_internals.classes import twin
from keras_lora.keras_internals.distribution import put
from keras_lora.layers.kinds import kind_of
from keras_lora.layers.torch_layout import to_numpy
from keras_lora.models.decompositions import KERNEL_STARTS
from keras_lora.models.decompositions import pissa
from keras_lora.models.layer_inputs import layer_moments
from keras_lora.models.merge_quantized import merged_plain
from keras_lora.models.merge_quantized import refuse_calibrating
from keras_lora.models.paths import layer_paths
from keras_lora.models.paths import with_model

LOFTQ_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Start:
    """Values for A and B of one layer, in the shapes of its form at a rank.

    Attributes:
        keeps_outputs: Boolean, whether A @ B is subtracted where it is not zero.
        plain: The layer with another quantized kernel, that the layer is to have.
        errors: Of the kernel, before and after.
    """

    rank: int
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    keeps_outputs: bool = True
    plain: object = None
    errors: tuple = ()

    @property
    def is_subtracted(self):
        return bool(self.keeps_outputs and self.a.any() and self.b.any())

    def assign_to(self, layer):
        values = {"a": self.a, "b": self.b} if self.rank else {}
        if values and self.is_subtracted:
            values |= {"a_start": self.a, "b_start": self.b}
        for name, value in values.items():
            put(getattr(layer.lora, name), value)


def identity(starts) -> str:
    """A text that is the same for equal starts."""
    found = hashlib.sha256()
    for path in sorted(starts):
        for value in (starts[path].a, starts[path].b):
            found.update(f"{path} {starts[path].rank}".encode())
            found.update(b"" if value is None else value.tobytes())
    return found.hexdigest()


def in_shape(layer, rank, a, b, **others):
    form = layer.low_rank_form(rank)
    return Start(rank, a.reshape(form.a_shape), b.reshape(form.b_shape), **others)


def checked_matrix(path, layer, kernel):
    """A kernel as a matrix, or a stack of them, and back; its sides bound the rank."""
    if not np.isfinite(kernel).all():
        raise ValueError(f"The kernel of {path!r} holds values that are not finite.")
    matrix, back = layer.form.as_matrix(kernel)
    refuse_rank(path, layer.lora.rank, min(matrix.shape[-2:]))
    return matrix, back


def refuse_rank(path, rank, most):
    if rank > most:
        raise ValueError(
            f"The rank of {path!r} is {rank}, and its kernel's at most {most}: there "
            "are no more directions to start from. Adapt it with a lower rank "
            "(`rank_pattern`)."
        )


def from_kernel(path, layer, method: str | Callable) -> Start:
    rank = layer.lora.rank
    if callable(method):
        a, b = (to_numpy(value) for value in method(layer))
        return Start(rank, a, b)
    kernel = to_numpy(layer.base_kernel(layer.lora.variable_dtype))
    matrix, _ = checked_matrix(path, layer, kernel.astype("float64"))
    try:
        a, b = KERNEL_STARTS[method](matrix, rank, layer.lora.scaling)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from error
    return in_shape(layer, rank, a, b)


def eva(model, layers, data, budget) -> dict:
    """Path -> Start: A is the principal directions of the layer's inputs, B = 0."""
    for path, layer in layers.items():
        if layer.form.batch_axes:
            raise ValueError(
                f"'eva' does not support {path!r}: its inputs differ between the batch "
                "axes of its kernel. Leave it out with exclude=."
            )
    moments = layer_moments(model, layers.values(), data)
    found = {}
    for group in dict.fromkeys(moments.values()):
        own = [path for path, layer in layers.items() if moments[layer] is group]
        most = max(layers[path].lora.rank for path in own) * (2 if budget else 1)
        for path in own:
            rows = min(group.count, layers[path].form.fan_in)
            refuse_rank(path, layers[path].lora.rank, rows)
        found |= dict.fromkeys(own, group.principal(most))
    ranks = {path: layer.lora.rank for path, layer in layers.items()}
    if budget is not None:
        ranks = shared_out(
            {path: found[path][1][: 2 * rank] for path, rank in ranks.items()}, budget
        )
    starts = {}
    for path, layer in layers.items():
        rank = ranks[path]
        if rank:
            b = np.zeros(layer.low_rank_form(rank).b_shape)
            starts[path] = in_shape(layer, rank, found[path][0][:, :rank], b)
        else:
            starts[path] = Start(rank)
    return starts


def shared_out(shares, budget) -> dict:
    """Path -> rank: how many of the largest shares of variance are its own."""
    total = sum(map(len, shares.values()))
    if budget > total:
        raise ValueError(
            f"`budget` is {budget}; twice the ranks of all layers are {total}. Adapt "
            "the model with a higher rank."
        )
    every = [(share, path) for path, own in shares.items() for share in own]
    every.sort(key=lambda pair: -pair[0])
    counts = collections.Counter(path for _, path in every[:budget])
    return {path: counts[path] for path in shares}


def loftq(layers, float_model) -> dict:
    """Path -> Start: the quantized kernel Q and A @ B that together are nearest to W.

    In turn Q = quantize(W - D), and D the nearest matrix of rank r to W - Q; the best
    pair of some steps is taken. The first Q is the one that the layer has.
    """
    refuse_calibrating("loftq", layers.values())
    paths = with_model(float_model, layer_paths(float_model))
    starts = {}
    for path, layer in layers.items():
        other = paths.get(path)
        if not layer.is_quantized or other is None or other.quantization_mode:
            raise ValueError(
                f"'loftq' is for quantized layers, beside `data`, the float model. "
                f"The layer {path!r} is "
                f"{'not there, or quantized' if layer.is_quantized else 'in float'}"
                f"{' in `data`' if layer.is_quantized else ''}."
            )
        kernel = to_numpy(getattr(other, kind_of(other).kernel_name))
        if kernel.shape != tuple(layer.kernel_shape):
            raise ValueError(
                f"The kernel of {path!r} has shape {kernel.shape} in the float model, "
                f"and {tuple(layer.kernel_shape)} here."
            )
        starts[path] = quantized_start(path, layer, kernel.astype("float64"))
    return starts


def quantized_start(path, layer, kernel) -> Start:
    rank, dtype = layer.lora.rank, layer.kernel_dtype
    length = np.linalg.norm(kernel) or 1.0
    plain, seen, tried, nearest = None, layer, [], 0.0
    for step in range(LOFTQ_STEPS):
        if step:
            rest = (kernel - nearest).astype(dtype)
            plain = merged_plain(layer, rest, "requantize")
            seen = twin(plain, type(layer), {})
        lost = kernel - to_numpy(seen.base_kernel(dtype))
        matrix, back = checked_matrix(path, layer, lost)
        a, b = pissa(matrix, rank, layer.lora.scaling)
        nearest = back(layer.lora.scaling * a @ b)
        error = float(np.linalg.norm(lost - nearest) / length)
        before = tried[0].errors[0] if tried else float(np.linalg.norm(lost) / length)
        found = {"plain": plain, "errors": (before, error)}
        tried.append(in_shape(layer, rank, a, b, keeps_outputs=False, **found))
    return min(tried, key=lambda start: start.errors[1])
