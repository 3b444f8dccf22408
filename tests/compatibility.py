"""Real architectures with random weights: adapt, train, reload, merge, compare.

python tests/compatibility.py       writes docs/compatibility.md, some minutes
"""

import collections
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import backbones
import keras
import numpy as np
from page_sections import write_section

import keras_lora

IMAGES = {"weights": None, "include_top": False, "input_shape": (64, 64, 3)}
APPLICATIONS = {
    "ConvNeXtTiny": {},
    "DenseNet121": {},
    "EfficientNetB0": {},
    "EfficientNetV2B0": {},
    "InceptionV3": {"input_shape": (75, 75, 3)},
    "InceptionResNetV2": {"input_shape": (75, 75, 3)},
    "MobileNet": {},
    "MobileNetV2": {},
    "MobileNetV3Small": {},
    "NASNetMobile": {},
    "ResNet50": {},
    "ResNet50V2": {},
    "VGG16": {},
    "Xception": {"input_shape": (71, 71, 3)},
}


def application(name):
    return getattr(keras.applications, name)(**{**IMAGES, **APPLICATIONS[name]})


def inputs_of(model):
    """Random inputs that fit the model's input specification."""
    random = np.random.default_rng(0)
    specs = model.input
    names = list(specs) if isinstance(specs, dict) else []
    rows = 1 if "masks" in names else 2  # SAM gives some outputs one row always

    def one(name, spec):
        size = 64 if len(spec.shape) > 3 else 12  # of axes that are left open
        size = {"latents": 4, "masks": 0, "boxes": 1, "box_labels": 1}.get(name, size)
        if name.startswith("encoder") and "encoder_input_values" in names:
            size = 1024  # Moonshine hears sound
        shape = [rows, *(axis or size for axis in spec.shape[1:])]
        if "mask" in name:
            return np.ones(shape, spec.dtype)
        if "segment" in name or "label" in name:
            return np.zeros(shape, spec.dtype)
        if name == "position_ids":
            return np.tile(np.arange(shape[1], dtype="int32"), (rows, 1))
        if name in ("boxes", "points", "timesteps", "guidance"):
            return random.uniform(0.1, 0.9, shape).astype("float32")
        if "int" in str(spec.dtype):
            return random.integers(1, 50, shape).astype("int32")
        return random.uniform(-3, 3, shape).astype("float32")

    if isinstance(specs, dict):
        return {name: one(name, spec) for name, spec in specs.items()}
    if isinstance(specs, list):
        return [one(spec.name, spec) for spec in specs]
    return one("", specs)


def flat(outputs):
    """All outputs of a model in a row."""
    parts = [keras.ops.convert_to_numpy(t) for t in keras.tree.flatten(outputs)]
    return np.concatenate([part.ravel() for part in parts]).astype("float64")


def check(model):
    """One row of the table; an AssertionError says what did not hold."""
    inputs = inputs_of(model)
    before = flat(model(inputs, training=False))
    report = keras_lora.apply_lora(model, rank=2, alpha=4)
    scale = np.abs(before).max()
    start = np.abs(flat(model(inputs, training=False)) - before).max() / scale
    assert start == 0, f"the starting outputs differ by {start:.1e}"

    targets = keras.tree.map_structure(
        lambda t: np.ones(t.shape, "float32"), model(inputs, training=False)
    )
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
    sites = [row.layer.sites()[row.weight] for row in report]
    kernels = [keras.ops.convert_to_numpy(site.frozen_kernel) for site in sites]
    factors = [keras.ops.convert_to_numpy(site.lora.b) for site in sites]
    model.fit(inputs, targets, epochs=2, verbose=0)
    for site, kernel in zip(sites, kernels, strict=True):
        now = keras.ops.convert_to_numpy(site.frozen_kernel)
        assert np.array_equal(now, kernel), f"the kernel of {site.name} moved"
    untrained = [
        site
        for site, b in zip(sites, factors, strict=True)
        if np.array_equal(keras.ops.convert_to_numpy(site.lora.b), b)
    ]
    random = np.random.default_rng(1)
    for site in sites:
        b = site.lora.b
        b.assign(random.standard_normal(b.shape) * 0.02)

    adapted = flat(model(inputs, training=False))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        reloaded = keras.models.load_model(path)
    reload_difference = np.abs(flat(reloaded(inputs, training=False)) - adapted).max()
    assert reload_difference == 0, f"a reload differs by {reload_difference:.1e}"

    for row in report:
        row.layer.merge_weights = False
    low_rank = flat(model(inputs, training=False))
    for row in report:
        row.layer.merge_weights = True
    merged = np.abs(low_rank - adapted).max() / np.abs(adapted).max()
    parameters = sum(row.parameters for row in report)
    keras_lora.merge_lora(model)
    moved = np.abs(flat(model(inputs, training=False)) - adapted).max()
    assert moved == 0, f"merging changes the outputs by {moved:.1e}"
    assert_no_gradient(model, inputs, untrained)
    return [
        str(len(report)),
        f"{parameters:,}",
        f"{len(report) - len(untrained)} of {len(report)}",
        f"{merged:.0e}",
        "exact",
        "",
    ]


def rows_in_a_bank(model):
    """What the leading axes of the layers are, or why a bank refuses them."""
    try:
        bank = keras_lora.AdapterBank(model, target="all-linear")
        if not bank.choice.leading_axes_known:  # the inputs it had made up did not do
            inputs = inputs_of(model)
            count = len(keras.tree.flatten(inputs)[0])
            bank({"inputs": inputs, "adapter": np.zeros(count, "int32")})
    except ValueError as error:
        return "refused: " + " ".join(str(error).split())[:200]
    except Exception as error:
        return f"not known: three rows are a {type(error).__name__} for the model"
    kinds = [layer.lora.leading for layer in bank.hosts.layers.values()]
    found = collections.Counter(kind for kind in kinds if kind is not None)
    bank.release()
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())


def assert_no_gradient(model, inputs, layers):
    """Where an adapter got no gradient, the plain kernel must get none either."""
    if not layers or keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    kernels = [site.frozen_kernel.value for site in layers]
    with tf.GradientTape() as tape:
        tape.watch(kernels)
        outputs = keras.tree.flatten(model(inputs, training=True))
        loss = sum(tf.reduce_mean((tf.cast(x, "float32") - 1) ** 2) for x in outputs)
    for layer, gradient in zip(layers, tape.gradient(loss, kernels), strict=True):
        assert gradient is None or not np.abs(gradient).max() > 0, (
            f"the adapter of {layer.name} got no gradient"
        )


def row(make, name):
    """The model's row; where something fails, the row says what."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return [name, *check(make(name)), rows_in_a_bank(make(name))]
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            return [name, "-", "-", "-", "-", "-", reason, "-"]


def share(make, name):
    """How much of a model "all-linear" and "all" reach, and what "all" leaves out."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(name)
        found = [
            keras_lora.apply_lora(model, rank=2, target=target, dry_run=True)
            for target in ("all-linear", "all")
        ]
        percents = [
            f"{100 * report.adapted_parameters / report.plain:.1f}%" for report in found
        ]
        inputs = inputs_of(model)
        before = flat(model(inputs, training=False))
        report = keras_lora.apply_lora(model, rank=2, target="all")
        assert np.array_equal(flat(model(inputs, training=False)), before), name
        adapted = {id(row.layer.sites()[row.weight].frozen_kernel) for row in report}
        own = {id(v) for row in report for v in row.adapter.weights}
        random = np.random.default_rng(1)
        for row in report:
            b = row.adapter.b
            b.assign(random.standard_normal(b.shape) * 0.02)
        moved = flat(model(inputs, training=False))
        others = collections.Counter()
        for weight in model.weights:
            if len(weight.shape) > 1 and id(weight) not in adapted | own:
                others[weight.path.split("/", 1)[-1]] += int(np.prod(weight.shape))
        keras_lora.merge_lora(model)
        difference = np.abs(flat(model(inputs, training=False)) - moved).max()
        assert difference <= 1e-5 * np.abs(moved).max(), f"{name}: {difference}"
    total = max(report.plain, 1)
    left = [
        f"{path} ({100 * size / total:.1f}%)" for path, size in others.most_common(3)
    ]
    more = f", {len(others) - 3} more" if len(others) > 3 else ""
    return [
        name,
        *percents,
        f"{100 * others.total() / total:.1f}%",
        ", ".join(left) + more,
    ]


def write_shares(names):
    lines = [
        "Written by `python tests/compatibility.py shares` with Keras "
        f"{keras.version()} on {keras.backend.backend()}: the share of the model's "
        'parameters whose weight gets an adapter with target="all-linear" and with '
        '"all". With "all" each model starts with its own outputs to the bit, and '
        "merging moves them by less than 1e-5. The next column is the share of other "
        "weights of two axes or more, of which the last column names the largest: "
        "what makes the outputs, weights called bias, kernels that the layer around "
        "reads itself, and weights that never train.",
        "",
        '| model | "all-linear" | "all" | other matrices | the largest of them |',
        "|---|---:|---:|---:|---|",
    ]
    for make, name in names:
        try:
            cells = share(make, name)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            cells = [name, "-", "-", "-", reason]
        print(*cells, sep="  ", flush=True)
        lines.append("| " + " | ".join(cells) + " |")
    write_section("## How much of a model the adapters reach", "\n".join(lines))


def main():
    head = ["model", "layers adapted", "parameters", "with a gradient"]
    head += ["two paths differ by", "reload and merge"]
    lines = [
        f"Written by `python tests/compatibility.py` with Keras {keras.version()} on "
        f"{keras.backend.backend()}: random weights, `apply_lora(model, rank=2)`. Each "
        "model starts with its own outputs to the bit, trains two steps with its "
        "kernels at rest, is saved and loaded, and merged. Where an adapter got no "
        "gradient, the plain model's kernel gets none either: its output reaches none "
        "of the model's with these inputs.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * 5,
    ]
    banks = [
        "What an `AdapterBank` finds the leading axis of a model's layers to be: the "
        "batch's rows, or each of them repeated (windows, routers), or all of them "
        "tiled; layers that are never called are left out.",
        "",
        "| model | leading axes |",
        "|---|---|",
    ]
    failures = [""]
    names = [(application, name) for name in APPLICATIONS]
    names += [(backbones.backbone, name) for name in backbones.names()]
    if sys.argv[1:] == ["shares"]:
        write_shares(names)
        return
    only = sys.argv[1:]
    for make, name in names:
        if not only or name in only:
            cells = row(make, name)
            print(*cells, sep="  ", flush=True)
            *found, reason, axes = cells
            lines.append("| " + " | ".join(found) + " |")
            banks.append(f"| {name} | {axes} |")
            failures += [f"- {name}: {reason}"] if reason else []
    if not only:
        write_section("## Models", "\n".join([*lines, *failures]))
        write_section("## Leading axes in a bank", "\n".join(banks))


if __name__ == "__main__":
    main()
