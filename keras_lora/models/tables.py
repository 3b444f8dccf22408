"""Rows that print as a table, or are drawn."""

import html
import re
from collections.abc import Sequence

import numpy as np

from keras_lora.models import atomic


class Table:
    """Mixin for objects that print as a table."""

    def parts(self):
        """Returns title, head, rows of cells, and the lines below, all as text."""
        raise NotImplementedError

    def __str__(self):
        title, head, rows, lines = self.parts()
        rows = table(head, rows) if rows else []
        return make_printable("\n".join([title, *rows, *lines]))

    def _repr_html_(self):
        title, head, rows, lines = self.parts()
        body = "".join(map(row, rows))
        lines = "<br>".join(map(escape, lines))
        return (
            f"<p>{escape(title)}</p><table><thead>{row(head, 'th')}</thead>"
            f"<tbody>{body}</tbody></table><p>{lines}</p>"
        )


class Rows(Table, Sequence):
    """Mixin for a sequence of `self.rows` that prints as a table."""

    rows: list

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def row(cells, tag="td"):
    cells = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{cells}</tr>"


def escape(text):
    return html.escape(make_printable(text))


def make_printable(text):
    """Replaces control characters; names come from files that are not trusted."""
    return "".join(
        x if x.isprintable() or x == "\n" else ascii(x).strip("'") for x in text
    )


def join(names, most=8):
    """Words such as: a, b and 3 more."""
    further = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{further}"


def format_bytes(number):
    """12 bytes, 1.23 kB, 45 MB."""
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} GB"


def plural(number, noun):
    """1 adapter, 2 adapters."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sort_by_number(names):
    """Sorts names by their numbers: h.9 before h.10."""
    return sorted(
        names,
        key=lambda name: [
            int(part) if part.isdecimal() else part
            for part in re.split(r"([0-9]+)", name)
        ],
    )


def table(head, rows):
    """Lines of text, the first two columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)

    def line(cells):
        pairs = list(zip(cells, widths, strict=True))
        left = [cell.ljust(width) for cell, width in pairs[:2]]
        return "  ".join([*left, *(c.rjust(w) for c, w in pairs[2:])])

    return [line(head), rule, *map(line, rows), rule]


def draw_analysis(analysis, path):
    """Draws the norm of each layer's update, and the singular values of the updates."""
    figure = new_figure(len(analysis))
    norms, spectra = figure.subplots(1, 2, sharey=True)
    over_kernel = all(row.relative_norm is not None for row in analysis)
    places = range(len(analysis))
    lengths = [row.relative_norm if over_kernel else row.norm for row in analysis]
    norms.barh(places, lengths)
    names = [make_printable(row.path) for row in analysis]
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
    with atomic.replacing(path) as new:
        figure.savefig(new)


def draw_sweep(sweep, path):
    """Draws the validation loss after each epoch, and after the last one."""
    figure = new_figure(len(sweep))
    curves, last = figure.subplots(1, 2)
    names = [make_printable(row.name) for row in sweep]
    for name, row in zip(names, sweep, strict=True):
        curves.plot(range(1, len(row.losses) + 1), row.losses, "o-", label=name)
    curves.set(xlabel="epoch", ylabel="validation loss")
    curves.legend(title="setting", fontsize=8)
    last.barh(range(len(sweep)), [row.loss for row in sweep])
    words = [
        ", ".join(f"{key}={value}" for key, value in row.settings.items())
        for row in sweep
    ]
    last.set_yticks(range(len(sweep)), map(make_printable, words), fontsize=8)
    last.set_ylim(len(sweep) - 0.5, -0.5)
    last.set_xlabel("validation loss after the last epoch")
    with atomic.replacing(path) as new:
        figure.savefig(new)


def new_figure(rows):
    try:
        from matplotlib.figure import Figure  # not pyplot, which has state
    except ImportError as error:
        raise ImportError(
            "`plot` draws with matplotlib, which is not installed: "
            "pip install matplotlib."
        ) from error
    if not rows:
        raise ValueError("There are no rows to draw.")
    return Figure((10, min(2 + 0.25 * rows, 60)), layout="constrained")


def shares(analysis):
    """Returns each row's singular values over its largest, padded with NaN."""
    widest = max(1, *(len(row.singular_values) for row in analysis))
    padded = np.full((len(analysis), widest), np.nan)
    for place, row in enumerate(analysis):
        values = row.singular_values
        padded[place, : len(values)] = values / (max(values, default=0) or 1)
    return padded
