"""All benchmarks: ratios in one run, written to docs/benchmarks.md and a picture.

python -m benchmarks            about ten minutes on two cores
python -m benchmarks --quick    a few rounds of the smaller settings
"""

import argparse
import os
import platform
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import matplotlib

from benchmarks import compare_enable_lora
from benchmarks import inference
from benchmarks import memory
from benchmarks import training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"

# Section, the peers of its columns, and (row, function, arguments); the last number
# is how many rounds a full run takes. Rows of the first setting make a quick run.
SECTIONS = [
    (
        "Training step: Dense stacks",
        "Six square layers with AdamW, over the floor: the same network, frozen, "
        "without adapters. loralib and PEFT stand over torch's own floor.",
        [
            ("d=1024, 512 rows, r=8", training.dense, (1024, 512, 8), 25),
            ("d=1024, 2048 rows, r=8", training.dense, (1024, 2048, 8), 12),
            ("d=1024, 2048 rows, r=64", training.dense, (1024, 2048, 64), 12),
            ("d=2048, 1024 rows, r=16", training.dense, (2048, 1024, 16), 8),
        ],
    ),
    (
        "Training step: query, key and value in one kernel",
        "Two of three slices adapted, over the frozen layer.",
        [("d=1024, 1024 rows, r=8", training.fused, (1024, 1024, 8), 25)],
    ),
    (
        "Training step: a transformer block",
        "MultiHeadAttention and two Dense layers, all adapted, over the frozen block.",
        [
            ("d=512, 8 x 64 tokens, r=8", training.attention, (512, 64, 8), 25),
            ("d=768, 8 x 128 tokens, r=8", training.attention, (768, 128, 8), 12),
        ],
    ),
    (
        "Training step: Conv2D",
        "Three 3x3 convolutions, over the frozen network.",
        [
            ("64 channels, 8 x 16x16, r=8", training.convolution, (64, 16, 8), 25),
            ("256 channels, 8 x 16x16, r=8", training.convolution, (256, 16, 8), 12),
        ],
    ),
    (
        "Training step: Embedding",
        "SGD on 2048 ids of width 256, over the plain layer that trains its table.",
        [
            ("vocabulary 1,000, r=8", training.embedding, (1_000, 8), 25),
            ("vocabulary 50,000, r=8", training.embedding, (50_000, 8), 25),
            ("vocabulary 1,000,000, r=8", training.embedding, (1_000_000, 8), 15),
        ],
    ),
    (
        "Inference: LoRADense",
        "One call of a 1024 x 1024 layer, over the plain layer.",
        [
            (f"{rows} rows, r=8", inference.dense, (1024, rows, 8), 40)
            for rows in (1, 16, 128, 512, 2048)
        ],
    ),
    (
        "Inference: Embedding",
        "2048 ids of width 256, over the plain layer.",
        [
            ("vocabulary 1,000, r=8", inference.embedding, (1_000, 8), 25),
            ("vocabulary 50,000, r=8", inference.embedding, (50_000, 8), 25),
            ("vocabulary 1,000,000, r=8", inference.embedding, (1_000_000, 8), 15),
        ],
    ),
    (
        "Peak memory of a training process",
        "The first setting's growth over the imports, over the floor's.",
        [("d=2048, 1024 rows, r=16", memory.dense, (2048, 1024, 16), 1)],
    ),
]


def table(rows):
    """Markdown: a line per setting, a column per variant."""
    columns = list(dict.fromkeys(name for _, found in rows for name in found))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for title, found in rows:
        cells = [str(found.get(name, "-")) for name in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows, path):
    """Bars against the floor: where this library stands between it and its peers."""
    names = ["keras_lora", "loralib", "PEFT", "Keras enable_lora", "full fine-tuning"]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        at = [i + (place - (len(names) - 1) / 2) * width for i in range(len(rows))]
        values = [found[name] for _, found in rows]
        heights = [value.median for value in values]
        errors = [
            [value.median - value.low for value in values],
            [value.high - value.median for value in values],
        ]
        bars = axes.bar(at, heights, width, label=name, yerr=errors, capsize=2)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(rows)), [title for title, _ in rows], fontsize=8)
    axes.set(ylim=(0.9, None), ylabel="training step over its floor (1 is best)")
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    work = sum(1 if quick else len(rows) for _, _, rows in SECTIONS)
    bar, done = keras.utils.Progbar(work, unit_name="setting"), 0
    text = [
        "# Benchmarks",
        f"Written by `python -m benchmarks{' --quick' if quick else ''}` on "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Keras "
        f"{keras.version()}, TensorFlow backend, float32. All figures are ratios, "
        "medians over rounds in which the variants take turns; `control` is a second "
        "copy of the baseline, and shows how far a figure can be trusted. There was "
        "no GPU: nothing here was measured on one.",
    ]
    for title, note, settings in SECTIONS:
        rows = []
        for name, function, arguments, rounds in settings[: 1 if quick else None]:
            keras.backend.clear_session()
            keras.utils.set_random_seed(0)
            found = function(*arguments, rounds=3 if quick else rounds)
            rows.append((name, found))
            done += 1
            bar.update(done)
        text += [f"## {title}", note, table(rows)]
        if title == SECTIONS[0][0]:
            draw(rows, DOCS / "benchmarks.png")
            text.append("![Training step over its floor](benchmarks.png)")
    text += ["## Beside Keras's own `layer.enable_lora`", compare_enable_lora.table()]
    target = DOCS / "benchmarks.md"
    target.write_text("\n\n".join(text) + "\n")
    print(f"Written: {target}")


if __name__ == "__main__":
    main()
