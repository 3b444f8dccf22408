"""All benchmarks: ratios in one run, written to docs/benchmarks.md and two pictures.

python -m benchmarks            some twenty minutes on two cores
python -m benchmarks --quick    a few rounds of the first setting of each table,
                                written to a temporary folder
"""

import argparse
import itertools
import os
import platform
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import matplotlib
import tensorflow as tf

from benchmarks import compare_enable_lora
from benchmarks.sections import SECTIONS, TRIED, sentence

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
PEERS = ["keras_lora", "loralib", "PEFT", "Keras enable_lora", "full fine-tuning"]


# Baselines of the columns after them, which get a table of their own.
OTHER_BASELINES = ("torch floor", "PEFT float32", "PEFT's LoRA")


def table(rows):
    """Markdown: a line per setting, a column per variant; a table per baseline."""
    columns = list(dict.fromkeys(name for _, found in rows for name in found))
    starts = [n for n, name in enumerate(columns) if n and name in OTHER_BASELINES]
    parts = itertools.pairwise([0, *starts, len(columns)])
    return "\n\n".join(one_table(rows, columns[a:b]) for a, b in parts)


def one_table(rows, columns):
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for title, found in rows:
        if found.keys() & columns:
            cells = [str(found.get(name, "-")) for name in columns]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_bars(rows, path):
    """Where this library stands between the floor and its peers."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(PEERS)
    for place, name in enumerate(PEERS):
        at = [i + (place - (len(PEERS) - 1) / 2) * width for i in range(len(rows))]
        values = [found[name] for _, found in rows]
        heights = [value.median for value in values]
        errors = [
            [value.median - value.low for value in values],
            [value.high - value.median for value in values],
        ]
        bars = axes.bar(at, heights, width, label=name, yerr=errors, capsize=2)
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    axes.axhline(1, color="black", linewidth=1)
    titles = [title.replace(", ", "\n") for title, _ in rows]
    axes.set_xticks(range(len(rows)), titles, fontsize=8)
    axes.set(ylim=(0.9, None), ylabel="training step over its floor (1 is best)")
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_costs(panels, path):
    """The cost of a step against rows, rank and vocabulary."""
    figure, every = plt.subplots(
        1, len(panels), figsize=(12, 3.6), layout="constrained"
    )
    for axes, (section, rows) in zip(every, panels, strict=True):
        axis = [float(title.split("=")[-1].replace(",", "")) for title, _ in rows]
        names = [name for name in rows[0][1] if name in PEERS]
        for name in names:
            points = [
                (x, row[name])
                for x, (_, row) in zip(axis, rows, strict=True)
                if name in row
            ]
            xs, values = zip(*points, strict=True)
            axes.plot(xs, [value.median for value in values], "o-", label=name)
            axes.fill_between(
                xs,
                [value.low for value in values],
                [value.high for value in values],
                alpha=0.2,
            )
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", xlabel=section.axis, ylabel="step over its baseline")
        axes.set_xticks(axis, [f"{x:,.0f}" for x in axis], fontsize=8)
        axes.minorticks_off()
        axes.set_title(section.title, fontsize=9)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gpus():
    return [
        tf.config.experimental.get_device_details(device).get("device_name", "GPU")
        for device in tf.config.list_physical_devices("GPU")
    ]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    folder = Path(tempfile.mkdtemp()) if quick else DOCS
    work = sum(1 if quick else len(section.settings) for section in SECTIONS)
    bar, done = keras.utils.Progbar(work, unit_name="setting"), 0
    devices = gpus() or ["no GPU, as none was at hand"]
    text = [
        "# Benchmarks",
        f"Written by `python -m benchmarks{' --quick' if quick else ''}` on "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {', '.join(devices)}; "
        f"Keras {keras.version()}, TensorFlow backend. All figures are ratios, "
        "medians over rounds in which the variants take turns; `control` is a second "
        "copy of the baseline, and shows how far a figure can be trusted.",
        "![Training step over its floor](benchmarks.png)",
        "![Cost against rows, rank and vocabulary](benchmark_costs.png)",
    ]
    panels = []
    for section in SECTIONS:
        rows = []
        for name, function, network, arguments, rounds in section.settings[
            : 1 if quick else None
        ]:
            keras.backend.clear_session()
            keras.utils.set_random_seed(0)
            rounds = min(3, rounds) if quick else rounds
            rows.append((name, function(network, arguments, rounds)))
            done += 1
            bar.update(done)
        text += [f"## {section.title}", section.note, table(rows)]
        text += [part for part in (sentence(section.bars, rows), section.why) if part]
        if section.axis:
            panels.append((section, rows))
        if section is SECTIONS[0]:
            draw_bars(rows, folder / "benchmarks.png")
    draw_costs(panels, folder / "benchmark_costs.png")
    text += ["## Beside Keras's own `layer.enable_lora`", compare_enable_lora.table()]
    tried = ["| what | figure | why not kept |", "|---|---|---|"]
    tried += [f"| {' | '.join(row)} |" for row in TRIED]
    text += ["## What was tried and not kept", "\n".join(tried)]
    target = folder / "benchmarks.md"
    target.write_text("\n\n".join(text) + "\n")
    print(f"Written: {target}")


if __name__ == "__main__":
    main()
