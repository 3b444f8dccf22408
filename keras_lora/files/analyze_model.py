"""The spectrum of each update in a model."""

import numpy as np

from keras_lora.files import analyze
from keras_lora.files.analyze import Analysis
from keras_lora.layers import lora_layer, torch_layout
from keras_lora.models.sites import checked_sites, layer_paths, site_paths


def of_model(model):
    checked_sites(model)
    paths = layer_paths(model)
    sites = site_paths(paths)
    adapters = {
        path: site for path, site in sites.items() if lora_layer.is_adapted(site)
    }
    rows = []
    for path, layer in adapters.items():
        kernel = np.linalg.norm(
            torch_layout.to_numpy(layer.base_kernel(layer.lora.variable_dtype))
        )
        left, right = matrices(layer)
        rows.append(analyze.update(path, layer.lora.rank, left, right, kernel=kernel))
    methods = [type(layer.lora) for layer in adapters.values()]
    return Analysis(model.name, rows, analyze.notes_of(methods))


def matrices(layer):
    """Two matrices, or stacks of them, whose product is the update."""
    lora, form = layer.lora, layer.form
    if not {"a", "b"} <= set(lora.factor_names):
        raise ValueError(f"{layer.path!r} has no A and B, but {lora.factor_names}.")
    if not form.is_product(layer.kernel_shape):
        matrix, _ = form.as_matrix(torch_layout.to_numpy(lora.delta()))
        return matrix, np.eye(matrix.shape[-1])
    a, b = lora.factors(lora.variable_dtype)
    a, b = torch_layout.to_numpy(a), torch_layout.to_numpy(form.spread(b))
    rank, lead = a.shape[-1], a.shape[: len(form.batch_axes)]
    return a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1)
