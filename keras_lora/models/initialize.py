"""Other starting values for A and B: PiSSA, OLoRA, EVA, orthogonal, LoftQ."""

import contextlib
from collections.abc import Callable

import keras
import numpy as np

from keras_lora.keras_internals import compiled, distribution, layer_state, processes
from keras_lora.layers import kinds, methods, torch_layout
from keras_lora.layers.settings import is_whole
from keras_lora.models import merge, sites, start_values
from keras_lora.models.report import Report

STARTS_DIFFER = (
    "The processes have computed different values for A and B. Give all of them the "
    "same `data`, and the same seed: `keras.utils.set_random_seed`."
)
STARTS = [*start_values.KERNEL_STARTS, "eva", "loftq"]


def initialize_lora(
    model: keras.layers.Layer,
    method: str | Callable,
    data: object = None,
    budget: int | None = None,
) -> Report:
    """Sets the starting values of new adapters from the kernels or from data.

        delta = scaling * (A @ B - A0 @ B0)

    A and B start at A0 and B0, which are kept as frozen weights. So W does not move and
    the outputs do not change. In adapter files, the adapter is a LoRA of twice the rank
    over the original model. If A0 @ B0 = 0, as with "eva", nothing is subtracted and
    the rank is kept. DoRA's magnitudes m start as those of W. Token rows are left as
    they are.

    Args:
        model: A Keras model whose adapters have not trained.
        method: "pissa": the largest singular values and vectors of W, split between A
            and B. "olora": the first columns of W's QR decomposition. "orthogonal":
            random factors in orthogonal subspaces; the ranks must be even. "eva": A
            holds the principal directions of each layer's inputs, B = 0. "loftq": for
            quantized kernels; A and B approximate the quantization error, and the
            kernels are quantized again to fit them. Or a function of a layer, whose
            `kernel` is W, that returns A and B in the shapes of `layer.lora.a` and
            `layer.lora.b`.
        data: For "eva", batches of the model's inputs: an array, a dict of arrays, or
            an iterable of batches, also of (inputs, targets). For "loftq", the float
            model that was quantized.
        budget: For "eva", whole number > 0: the sum of all ranks. They go to the layers
            whose inputs have the most variance, at most twice a layer's rank to each.
            Scalings are kept. A layer with rank 0 loses its adapter and is frozen.

    Returns:
        A report like that of `apply_lora`. For "loftq", its `.errors` maps paths to the
        relative errors of the kernel before and after.

    Raises:
        ValueError: If an adapter has trained or was initialized already; if the method
            does not support a layer (convolutions, embeddings, several projections in
            one kernel); if a rank is above that of the kernel, or values are not
            finite. The model is left unchanged.

    Examples:
        >>> report = keras_lora.apply_lora(base, rank=4)
        >>> report = keras_lora.initialize_lora(base, "pissa")

    Reference:
        [PiSSA: Meng et al., 2024](https://arxiv.org/abs/2404.02948);
        [OLoRA: Büyükakyüz, 2024](https://arxiv.org/abs/2406.01775);
        [EVA: Paischer et al., 2024](https://arxiv.org/abs/2410.07170);
        [LoftQ: Li et al., 2023](https://arxiv.org/abs/2310.08659)
    """
    sites.sites_outside_contexts(model)
    validate_arguments(method, data, budget)
    paths = sites.Paths(model)
    adapted = {
        path: site for path, site in paths.adapted.items() if not site.lora.trains_rows
    }
    if not adapted:
        raise ValueError("The model has no adapters with A and B, only token rows.")
    for path, site in adapted.items():
        refuse_used(path, site)
        needs_inputs = method == "eva" and site.form.down is None
        if isinstance(method, str) and (needs_inputs or not site.kernel_is_matrix):
            raise ValueError(
                f"{method!r} does not support {path!r}, a "
                f"{kinds.kind_of(site).__name__}: "
                "it needs one kernel that is a matrix. Leave the layer out with "
                "exclude=, or give a function of the layer."
            )
    if method == "eva":
        starts = start_values.eva(model, adapted, data, budget)
    elif method == "loftq":
        starts = start_values.loftq(adapted, data)
    else:
        starts = map_with_progress_bar(
            adapted, lambda path, site: start_values.from_kernel(path, site, method)
        )
    for path, site in adapted.items():
        refuse_unusable(path, site, starts[path])
    processes.run_on_all(model, lambda: starts, start_values.fingerprint, STARTS_DIFFER)
    options = {
        site: options_for(site, starts[path])
        for path, site in adapted.items()
        if starts[path].rank
    }
    with replace_adapters(model, options):
        for path, site in adapted.items():
            starts[path].assign_to(site)
    for path, site in adapted.items():
        if starts[path].plain is not None:
            merge.copy_kernel(site, starts[path].plain)
        if starts[path].rank:
            site.lora.start_from_kernel()
        else:
            sites.make_plain(site)
            site.trainable = False
    errors = {path: start.errors for path, start in starts.items() if start.errors}
    return Report(paths, notes=compiled.compile_again(model), errors=errors)


def validate_arguments(method, data, budget):
    if not callable(method) and method not in STARTS:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, STARTS))} or a function of "
            f"a layer. Received: {method!r}."
        )
    if budget is not None:
        validate_budget(method, budget)
    if data is None and method in ("eva", "loftq"):
        what = "batches of inputs" if method == "eva" else "the float model"
        raise ValueError(f"{method!r} needs `data`: {what}.")
    if data is not None and method not in ("eva", "loftq"):
        raise ValueError(f"{method!r} uses only the kernels: leave out `data`.")


def validate_budget(method, budget):
    if method != "eva":
        raise ValueError(
            f"`budget` is for 'eva', which moves ranks. Received: method={method!r}."
        )
    if not is_whole(budget, lowest=1):
        raise ValueError(
            "`budget` must be a whole number > 0, the sum of all ranks. Received: "
            f"{budget!r}."
        )


def refuse_used(path, site):
    lora = site.lora
    if lora.has_start:
        raise ValueError(
            f"The adapter of {path!r} was initialized already. Remove it with "
            "remove_lora(model) first."
        )
    if not vars(type(lora)).get("takes_start"):
        raise ValueError(
            f"The adapter of {path!r} is a {type(lora).__name__}, which does not "
            "support initial values (`takes_start`). Leave the layer out with exclude=."
        )
    if torch_layout.to_numpy(lora.a).any() and torch_layout.to_numpy(lora.b).any():
        raise ValueError(
            f"The adapter of {path!r} has trained: new initial values would discard "
            "what it has learned. Call remove_lora(model) and apply_lora(model) first."
        )


def refuse_unusable(path, site, start):
    if not start.rank:
        return
    form = site.low_rank_form(start.rank)
    for name, value, shape in (
        ("A", start.a, form.a_shape),
        ("B", start.b, form.b_shape),
    ):
        if value.shape != tuple(shape) or not np.isfinite(value).all():
            raise ValueError(
                f"{name} of {path!r} must have shape {shape} and finite values. "
                f"Received: shape {value.shape}."
            )


def options_for(site, start):
    """The new adapter's arguments: its rank, with the same scaling, and a start."""
    settings = site.lora.settings.with_rank(start.rank)
    options = {"rank": start.rank, "alpha": settings.alpha}
    options["frozen_start"] = start.is_subtracted
    return {**site.lora.options(), **options}


def map_with_progress_bar(adapted_sites, function):
    """Returns {path: function(path, layer)}; long work shows a progress bar."""
    sizes = {
        path: np.sort(site.kernel_shape)[::-1] for path, site in adapted_sites.items()
    }
    work = sum(float(np.prod(size)) * size[-1] for size in sizes.values())
    bar = keras.utils.Progbar(
        len(adapted_sites), verbose=int(work > 1e10), unit_name="layer"
    )
    results = {}
    for path, site in adapted_sites.items():
        results[path] = function(path, site)
        bar.add(1)
    return results


@contextlib.contextmanager
def replace_adapters(model, options):
    """Replaces adapters; if anything fails inside, the old ones are put back.

    Args:
        model: A Keras model.
        options: Site -> the arguments of its new adapter.
    """
    compiled.restore_jax_weights(model)
    with distribution.strategy_scope(model), contextlib.ExitStack() as undo:
        adapters = {
            site: methods.make_adapter(
                site_options, site.variable_dtype, site.adapter_attribute
            )
            for site, site_options in options.items()
        }
        undo.callback(
            layer_state.refresh_torch_parameters, layer_state.flatten_layers(model)
        )
        for site, adapter in adapters.items():
            undo.callback(replace_adapter, site, site.lora)
            replace_adapter(site, adapter)
            with layer_state.name_scope_of(site.lora_layer()):
                site.build_adapter()
        yield
        undo.pop_all()


def replace_adapter(site, adapter):
    adapter.kernel_place = site.lora.kernel_place
    site.detach_adapter()
    site.attach_adapter(adapter)
