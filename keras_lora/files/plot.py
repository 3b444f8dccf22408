"""The picture of an analysis."""

import numpy as np

from keras_lora.models.atomic import replacing
from keras_lora.models.tables import printable


def draw(analysis, path):
    """Draws the norm of each layer's update, and the singular values of the updates."""
    figure = new_figure(len(analysis))
    norms, spectra = figure.subplots(1, 2, sharey=True)
    over_kernel = all(row.relative_norm is not None for row in analysis)
    places = range(len(analysis))
    lengths = [row.relative_norm if over_kernel else row.norm for row in analysis]
    norms.barh(places, lengths)
    names = [printable(row.path) for row in analysis]
    norms.set_yticks(places, names, fontsize=8, parse_math=False)
    norms.set_xlabel("norm of the update" + ", over that of W" * over_kernel)
    norms.set_ylim(len(analysis) - 0.5, -0.5)
    values = shares(analysis)
    extent = (0, values.shape[1], len(analysis) - 0.5, -0.5)
    image = spectra.imshow(values, vmin=0, vmax=1, aspect="auto", extent=extent)
    spectra.tick_params(labelleft=False)
    for energy, color in ((0.9, "orange"), (0.99, "red")):
        used = [row.effective_rank(energy) for row in analysis]
        spectra.plot(
            used,
            places,
            "|",
            color=color,
            markersize=12,
            markeredgewidth=3,
            label=f"{energy:.0%} of the squares",
            clip_on=False,
        )
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    spectra.set_xlabel("singular values, the largest first: how many")
    figure.colorbar(image, label="over the layer's largest")
    with replacing(path) as new:
        figure.savefig(new)


def draw_sweep(sweep, path):
    """Draws the validation loss after each epoch, and after the last one."""
    figure = new_figure(len(sweep))
    curves, last = figure.subplots(1, 2)
    names = [printable(row.name) for row in sweep]
    for name, row in zip(names, sweep, strict=True):
        curves.plot(range(1, len(row.losses) + 1), row.losses, "o-", label=name)
    curves.set(xlabel="epoch", ylabel="validation loss")
    curves.legend(title="setting", fontsize=8)
    last.barh(range(len(sweep)), [row.loss for row in sweep])
    words = [
        ", ".join(f"{key}={value}" for key, value in row.settings.items())
        for row in sweep
    ]
    last.set_yticks(range(len(sweep)), map(printable, words), fontsize=8)
    last.set_ylim(len(sweep) - 0.5, -0.5)
    last.set_xlabel("validation loss after the last epoch")
    with replacing(path) as new:
        figure.savefig(new)


def new_figure(rows):
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no state
    except ImportError as error:
        raise ImportError(
            "`plot` draws with matplotlib, which is not installed: "
            "pip install matplotlib."
        ) from error
    if not rows:
        raise ValueError("There is no row to draw.")
    return Figure((10, min(2 + 0.25 * rows, 60)), layout="constrained")


def shares(analysis):
    """Each row's singular values over its largest; none where there are no more."""
    widest = max(1, *(len(row.singular_values) for row in analysis))
    found = np.full((len(analysis), widest), np.nan)
    for place, row in enumerate(analysis):
        values = row.singular_values
        found[place, : len(values)] = values / (max(values, default=0) or 1)
    return found
