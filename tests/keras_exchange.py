"""Files of adapted models, written with one version of Keras and read with another.

    python tests/keras_exchange.py FOLDER

FOLDER: where the other version is installed (`pip install --target`). Each version
writes .keras and .weights.h5 files of float, DoRA, int8 and int4 models, with their
outputs before and after one more step of training; the other has to come to the same.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np

import keras_lora

CASES = {
    "float": (None, {}),
    "DoRA": (None, {"use_dora": True}),
    "int8": ("int8", {}),
    "int4": ("int4", {}),
}
X = np.random.default_rng(0).standard_normal((8, 16)).astype("float32")


def adapted(mode, settings):
    """A model with adapters; the start is another one each time."""
    layers = [
        keras.layers.Dense(32, "relu", name="first"),
        keras.layers.Reshape((4, 8), name="parts"),
        keras.layers.EinsumDense("abc,cd->abd", (4, 6), name="second"),
        keras.layers.Flatten(name="flat"),
        keras.layers.Dense(3, name="head"),
    ]
    model = keras.Sequential([keras.Input((16,)), *layers], name="model")
    if mode is not None:
        model.quantize(mode)
    keras_lora.apply_lora(model, rank=2, alpha=5, **settings)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    return model


def fit(model):
    model.run_eagerly, model.jit_compile = True, False
    model.fit(X, X[:, :3], batch_size=8, verbose=0)


def results(model):
    """The outputs, and those after one more step."""
    before = keras.ops.convert_to_numpy(model(X, training=False))
    fit(model)
    return [before, keras.ops.convert_to_numpy(model(X, training=False))]


def write(folder):
    for name, case in CASES.items():
        model = adapted(*case)
        fit(model)
        model.save(folder / f"{name}.keras")
        model.save_weights(folder / f"{name}.weights.h5")
        np.save(folder / f"{name}.npy", results(model))


def read(folder):
    for name, case in CASES.items():
        expected = np.load(folder / f"{name}.npy")
        loaded = keras.saving.load_model(folder / f"{name}.keras")
        weights = adapted(*case)
        fit(weights)  # the optimizer has variables then, which the file has too
        weights.load_weights(folder / f"{name}.weights.h5")
        for file, model in (".keras", loaded), (".weights.h5", weights):
            actual = results(model)
            np.testing.assert_allclose(actual, expected, 1e-5, 1e-6, err_msg=name)
            print(f"{keras.__version__} has read {name}{file}", flush=True)


def exchange(other, mine, theirs):
    """Writes here, reads and writes with the other version, reads here."""
    write(mine)
    paths = [other, os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-W", "ignore", __file__, mine, theirs],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
    )
    read(theirs)


if __name__ == "__main__":
    folder, *theirs = sys.argv[1:]
    if theirs:
        read(pathlib.Path(folder))
        write(pathlib.Path(*theirs))
    else:
        new = tempfile.TemporaryDirectory
        with new() as mine, new() as theirs:
            exchange(folder, pathlib.Path(mine), pathlib.Path(theirs))
