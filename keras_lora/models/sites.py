"""The sites of a model: path -> weight that has, or can have, an adapter."""

from keras_lora.layers.kinds import sites_of


def site_paths(paths) -> dict:
    """Path -> site, for all weights that can have an adapter, in the model's order.

    A layer with one kernel is a site under its own path. The weights of others have
    their names beside it, and those of a cell stand under the layer that runs it.

    paths: path -> layer.
    """
    found, of_cells = {}, set()
    for path, layer in paths.items():
        if id(layer) in of_cells:
            continue
        for weight, site in sites_of(layer).items():
            if site is layer:
                found[path] = layer
            else:
                found[f"{path}/{weight}" if path else weight] = site
                if site.kernel_owner() is not layer:
                    of_cells.add(id(site.kernel_owner()))
    return found
