"""Initial values from kernels, from inputs, or from the quantization error."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable

import keras
import numpy as np

from keras_lora.keras_internals import classes, distribution, processes
from keras_lora.layers import kinds, torch_layout
from keras_lora.models import merge, sites

LOFTQ_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Start:
    """Initial A and B of one layer, in the shapes of its form for a rank.

    Attributes:
        keeps_outputs: Boolean, whether A @ B is subtracted if it is not zero.
        plain: A plain layer with the quantized kernel to give to the layer.
        errors: Errors of the kernel, before and after.
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

    def assign_to(self, site):
        values = {"a": self.a, "b": self.b} if self.rank else {}
        if values and self.is_subtracted:
            values |= {"a_start": self.a, "b_start": self.b}
        for name, value in values.items():
            distribution.assign(getattr(site.lora, name), value)


def fingerprint(starts) -> str:
    """Returns a text that is equal for equal starts."""
    digest = hashlib.sha256()
    for path in sorted(starts):
        for value in (starts[path].a, starts[path].b):
            digest.update(f"{path} {starts[path].rank}".encode())
            digest.update(b"" if value is None else value.tobytes())
    return digest.hexdigest()


def make_start(site, rank, a, b, **options):
    form = site.low_rank_form(rank)
    return Start(rank, a.reshape(form.a_shape), b.reshape(form.b_shape), **options)


def finite_matrix(path, site, kernel):
    """Returns a kernel as a matrix, or a stack of them; raises if not finite."""
    if not np.isfinite(kernel).all():
        raise ValueError(f"The kernel of {path!r} holds values that are not finite.")
    matrix = site.form.as_matrix(kernel)
    refuse_rank(path, site.lora.rank, min(matrix.shape[-2:]))
    return matrix


def refuse_rank(path, rank, most):
    if rank > most:
        raise ValueError(
            f"The rank of {path!r} is {rank}, but there are only {most} directions to "
            "start from. Adapt it with a lower rank (`rank_pattern`)."
        )


def from_kernel(path, site, method: str | Callable) -> Start:
    rank = site.lora.rank
    if callable(method):
        a, b = (torch_layout.to_numpy(value) for value in method(site))
        return Start(rank, a, b)
    kernel = torch_layout.to_numpy(site.base_kernel(site.lora.variable_dtype))
    matrix = finite_matrix(path, site, kernel.astype("float64"))
    try:
        a, b = KERNEL_STARTS[method](matrix, rank, site.lora.scaling)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from error
    return make_start(site, rank, a, b)


def eva(model, sites_by_path, data, budget) -> dict:
    """Path -> Start: A is the principal directions of the layer's inputs, B = 0."""
    for path, site in sites_by_path.items():
        if site.form.batch_axes:
            raise ValueError(
                f"'eva' does not support {path!r}: its inputs differ between the batch "
                "axes of its kernel. Leave it out with exclude=."
            )
    moments = layer_moments(model, sites_by_path.values(), data)
    directions = {}
    for group in dict.fromkeys(moments.values()):
        paths = [path for path, site in sites_by_path.items() if moments[site] is group]
        max_rank = max(sites_by_path[path].lora.rank for path in paths)
        max_rank *= 2 if budget else 1
        for path in paths:
            rows = min(group.count, sites_by_path[path].form.fan_in)
            refuse_rank(path, sites_by_path[path].lora.rank, rows)
        directions |= dict.fromkeys(paths, group.principal(max_rank))
    ranks = {path: site.lora.rank for path, site in sites_by_path.items()}
    if budget is not None:
        ranks = allocate_ranks(
            {path: directions[path][1][: 2 * rank] for path, rank in ranks.items()},
            budget,
        )
    starts = {}
    for path, site in sites_by_path.items():
        rank = ranks[path]
        if rank:
            b = np.zeros(site.low_rank_form(rank).b_shape)
            starts[path] = make_start(site, rank, directions[path][0][:, :rank], b)
        else:
            starts[path] = Start(rank)
    return starts


def allocate_ranks(shares, budget) -> dict:
    """Returns path -> rank: how many of the largest shares of variance it has."""
    total = sum(map(len, shares.values()))
    if budget > total:
        raise ValueError(
            f"`budget` is {budget}, but the ranks can at most double, to {total} in "
            "all. Adapt the model with a higher rank."
        )
    every = [(share, path) for path, own in shares.items() for share in own]
    every.sort(key=lambda pair: -pair[0])
    counts = collections.Counter(path for _, path in every[:budget])
    return {path: counts[path] for path in shares}


def loftq(sites_by_path, float_model) -> dict:
    """Path -> Start: a quantized kernel Q and A @ B whose sum is close to W.

    Alternates Q = quantize(W - D) with D = the nearest matrix of rank r to W - Q, and
    takes the best pair of several steps. The first Q is the layer's own.
    """
    merge.refuse_calibrating("loftq", sites_by_path.values())
    float_layers = sites.Paths(float_model).with_model
    starts = {}
    for path, site in sites_by_path.items():
        other = float_layers.get(path)
        if not site.is_quantized or other is None or other.quantization_mode:
            raise ValueError(
                "'loftq' needs quantized layers, and as `data` the float model. The "
                f"layer {path!r} is "
                f"{'not in float in `data`' if site.is_quantized else 'not quantized'}"
                "."
            )
        kernel = torch_layout.to_numpy(getattr(other, kinds.kind_of(other).kernel_name))
        if kernel.shape != tuple(site.kernel_shape):
            raise ValueError(
                f"The kernel of {path!r} has shape {kernel.shape} in the float model, "
                f"but {tuple(site.kernel_shape)} in this one."
            )
        starts[path] = quantized_start(path, site, kernel.astype("float64"))
    return starts


def quantized_start(path, site, kernel) -> Start:
    rank, dtype = site.lora.rank, site.kernel_dtype
    length = np.linalg.norm(kernel) or 1.0
    plain, seen, tried, nearest = None, site, [], 0.0
    for step in range(LOFTQ_STEPS):
        if step:
            remainder = (kernel - nearest).astype(dtype)
            plain = merge.make_merged_layer(site, remainder, "requantize")
            seen = classes.view_with(plain, type(site), {})
        lost = kernel - torch_layout.to_numpy(seen.base_kernel(dtype))
        matrix = finite_matrix(path, site, lost)
        a, b = pissa(matrix, rank, site.lora.scaling)
        nearest = site.form.from_matrix(site.lora.scaling * a @ b, kernel.shape)
        error = float(np.linalg.norm(lost - nearest) / length)
        before = tried[0].errors[0] if tried else float(np.linalg.norm(lost) / length)
        options = {"plain": plain, "errors": (before, error)}
        tried.append(make_start(site, rank, a, b, keeps_outputs=False, **options))
    return min(tried, key=lambda start: start.errors[1])


def pissa(kernel, rank, scaling):
    """The r largest singular values and vectors, split between A and B.

        W = U S V^T    A = U_r sqrt(S_r / scaling)    B = sqrt(S_r / scaling) V_r^T

    scaling * A @ B is the nearest matrix of rank r.

    Reference: [Meng et al., 2024](https://arxiv.org/abs/2404.02948)
    """
    left, values, right = largest_singular_values(kernel, rank)
    root = np.sqrt(values / scaling)[..., None, :]
    return left * root, np.swapaxes(root, -1, -2) * right


def olora(kernel, rank, scaling):
    """The first r columns of an orthogonal basis of the outputs.

        W^T = Q R    B = (Q[:, :r])^T    A = (R[:r])^T

    Reference: [Büyükakyüz, 2024](https://arxiv.org/abs/2406.01775)
    """
    q, r = np.linalg.qr(np.swapaxes(kernel, -1, -2))
    return tuple(np.swapaxes(x, -1, -2) for x in (r[..., :rank, :], q[..., :rank]))


def orthogonal(kernel, rank, scaling):
    """Random factors in orthogonal subspaces, so that A @ B is nearly zero.

        A = N(inputs, r/2) @ Q[1::2] / 10    B = Q[0::2]^T @ N(r/2, outputs) / 10

    with a random orthogonal Q (r, r) and N of standard normal values.
    """
    if rank % 2:
        raise ValueError(f"An orthogonal start needs an even rank. Received: {rank}.")
    random = np.random.default_rng(np.random.randint(2**31))  # Keras seeds NumPy too
    *lead, inputs, outputs = kernel.shape
    q, _ = np.linalg.qr(random.standard_normal((*lead, rank, rank)))
    a = random.standard_normal((*lead, inputs, rank // 2)) @ q[..., 1::2, :]
    b = random.standard_normal((*lead, rank // 2, outputs))
    return a / 10, np.swapaxes(q[..., 0::2, :], -1, -2) @ b / 10


KERNEL_STARTS = {"pissa": pissa, "olora": olora, "orthogonal": orthogonal}


def largest_singular_values(matrix, rank):
    """Returns the r largest singular values, with their left and right vectors.

    Eigenvectors of the smaller Gram matrix take a fifth of the time of a full
    decomposition, which is used only if a value is too small for them.
    """
    wide = matrix.shape[-2] < matrix.shape[-1]
    tall = np.swapaxes(matrix, -1, -2) if wide else matrix
    squares, vectors = np.linalg.eigh(np.swapaxes(tall, -1, -2) @ tall)
    squares, vectors = squares[..., ::-1][..., :rank], vectors[..., ::-1][..., :rank]
    if (squares[..., -1] <= 1e-10 * squares[..., 0]).any():
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left[..., :rank], values[..., :rank], right[..., :rank, :]
    values = np.sqrt(squares)
    other = tall @ vectors / values[..., None, :]
    left, right = (vectors, other) if wide else (other, vectors)
    return left, values, np.swapaxes(right, -1, -2)


ROWS_DIFFER = (
    "The processes have given different numbers of batches or rows, or different rows "
    "where their devices hold the same part of a batch. Give each process what it "
    "gives to `fit`."
)


class Moments:
    """Number, sum and products of rows, batch by batch."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0
        self.digests = []

    def add(self, rows, digest, time):
        """Adds rows; returns whether they equal those recorded for this batch."""
        if time < len(self.digests):
            return digest == self.digests[time]
        rows = rows.astype("float64")
        self.digests.append(digest)
        self.count += len(rows)
        self.sum = self.sum + rows.sum(axis=0)
        self.products = self.products + rows.T @ rows
        return True

    def sum_over_processes(self, model):
        """Adds up the rows of all TensorFlow processes that hold a model."""
        sums = (
            processes.sum_over_processes(np.asarray(x), model)
            for x in (self.count, self.sum, self.products)
        )
        self.count, self.sum, self.products = sums

    def principal(self, most):
        """Directions (inputs, most) of largest variance, and their shares of it."""
        mean = self.sum / self.count
        covariance = self.products / self.count - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        return vectors[:, :most], values[:most] / (values.sum() or 1.0)


class Recorder:
    """Records a layer's inputs instead of its adapter while a model is called.

    groups: digest of a layer's first rows -> Moments. Layers with equal inputs, such as
    query, key and value, share one.
    """

    def __init__(self, groups):
        self.groups, self.moments, self.times = groups, None, 0

    def outputs(self, host, inputs, training):
        rows = torch_layout.to_numpy(host.input_rows(inputs))
        digest = hashlib.sha256(rows.tobytes()).digest()
        if self.moments is None:
            self.moments = self.groups[digest]
        if not self.moments.add(rows, digest, self.times):
            raise ValueError(
                f"The inputs of {host.name!r} equal those of another layer in the "
                "first batch of `data`, but not in a later one. Begin with a larger "
                "batch."
            )
        self.times += 1
        return host.frozen_linear(inputs)


def layer_moments(model, adapted_sites, data) -> dict:
    """Layer -> Moments of its inputs, for batches of the model's inputs."""
    groups = collections.defaultdict(Moments)
    recorders = {site: Recorder(groups) for site in adapted_sites}

    def record():
        try:
            for site, recorder in recorders.items():
                site.lora.stand_in = recorder
            for batch in batches_for(model, data):
                model(batch, training=False)
        finally:
            for site in adapted_sites:
                site.lora.stand_in = None
        for site, recorder in recorders.items():
            if recorder.moments is None:
                raise ValueError(
                    f"{site.name!r} was not called for any batch of `data`."
                )
        return [recorder.moments for recorder in recorders.values()]

    if not processes.worker_strategy(model):
        return dict(zip(recorders, record(), strict=True))
    moments_of_layers = processes.run_on_all(model, record, equal_inputs, ROWS_DIFFER)
    for moments in dict.fromkeys(moments_of_layers):
        moments.sum_over_processes(model)
    return dict(zip(recorders, moments_of_layers, strict=True))


def equal_inputs(moments_of_layers) -> str:
    """Returns a text that says which layers have equal inputs."""
    return str([moments_of_layers.index(moments) for moments in moments_of_layers])


def batches_for(model, data):
    """Returns batches of inputs; with several JAX processes, those of all of them."""
    batches = batches_of(data)
    if processes.worker_strategy(model) or not processes.is_shared(model):
        return batches
    batches = map(distribution.lay_out_batch, batches)
    return processes.in_step(model, batches, distribution.digests_of_rows, ROWS_DIFFER)


def batches_of(data):
    """Returns batches of inputs from an array, a dict of arrays or an iterable.

    From batches of (inputs, targets), as `fit` takes them, it takes the inputs.
    """
    if hasattr(data, "shape") or isinstance(data, dict):
        data = [data]
    for batch in data:
        if isinstance(batch, tuple):
            batch, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        yield batch
