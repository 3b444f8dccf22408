"""Adapts the network of finetune_digits.py over two processes of JAX.

Each process holds half of every hidden layer: kernels, A, B and what the optimizer
keeps. The same script runs on one process first, and both have to give the same table.
Processes on two machines work alike: start each with the first one's address.

It takes about a minute on two cores.

    python examples/digits_over_processes.py
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import quiet

quiet.import_keras()  # without TensorFlow's log lines

import jax
import keras
import numpy as np
from finetune_digits import HIDDEN, RANK, digits, trained_parameters
from jax.experimental import multihost_utils

import keras_lora

# %% The layout
# The first hidden layer is cut along its units, the second along its inputs, so that
# what the first gives is where the second needs it. A and B follow by themselves.


def spread(address, count, index):
    """Over `count` processes, of which this is number `index`."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # not for GPUs
    keras.distribution.initialize(address, count, index)
    mesh = keras.distribution.DeviceMesh((1, count), ["batch", "model"])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*first/kernel"] = (None, "model")
    layouts[".*second/kernel"] = ("model", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
        )
    )


# %% The network, its training and its size


def network(lora=False, trainable=True):
    make = keras_lora.LoRADense if lora else keras.layers.Dense
    options = {"rank": RANK, "alpha": 2 * RANK} if lora else {}
    hidden = [
        make(units, activation="relu", name=name, trainable=trainable, **options)
        for units, name in zip(HIDDEN, ("first", "second"), strict=True)
    ]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(5)])


def train(model, data, epochs, learning_rate):
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*data, epochs=epochs, batch_size=64, verbose=0)


def bytes_on_disk(model, folder):
    """The size of files that hold what was trained. All processes call this."""
    if any(isinstance(layer, keras_lora.LoRADense) for layer in model.layers):
        keras_lora.save_adapter(model, folder)  # the first process writes
    else:
        values = [
            multihost_utils.process_allgather(weight.value, tiled=True)
            for weight in model.trainable_weights
        ]
        if jax.process_index() == 0:
            folder.mkdir()
            np.savez(folder / "trained.npz", *values)
    multihost_utils.sync_global_devices("written")
    return sum(path.stat().st_size for path in folder.iterdir())


# %% Three ways to learn the digits 5-9, as in finetune_digits.py


def table(folder) -> list:
    keras.utils.set_random_seed(0)  # the same weights and batches on every process
    images, unseen, labels, unseen_labels = digits(range(5))
    pretrained = network()
    train(pretrained, (images, labels), 15, 1e-3)
    images, unseen, labels, unseen_labels = digits(range(5, 10))
    ways = [
        ("Full fine-tuning", network(), 1e-3),
        (f"LoRA, rank {RANK}", network(lora=True), 5e-3),
        ("Head alone", network(trainable=False), 5e-3),
    ]
    lines = [f"{'':18}{'accuracy':>9}{'trained parameters':>20}{'on disk':>12}"]
    for name, model, learning_rate in ways:
        for old, new in zip(pretrained.layers[:-1], model.layers[:-1], strict=True):
            new.kernel.assign(keras.ops.copy(old.kernel))
            new.bias.assign(keras.ops.copy(old.bias))
        train(model, (images, labels), 25, learning_rate)
        accuracy = model.evaluate(unseen, unseen_labels, verbose=0)[1]
        parameters = trained_parameters(model)
        kib = bytes_on_disk(model, Path(folder, name)) / 1024
        lines.append(f"{name:18}{accuracy:>9.1%}{parameters:>20,}{kib:>8.0f} KiB")
    kernel = ways[1][1].layers[0].kernel
    held = kernel.value.addressable_shards[0].data.shape
    lines.append(f"Each process holds {held} of the kernel {kernel.shape}.")
    return lines


# %% The processes


def run(count):
    """The lines that `count` processes give."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, folder, address, f"{count}", f"{index}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
        errors = [process.communicate()[1] for process in processes]
        for process, error in zip(processes, errors, strict=True):
            if process.returncode:
                sys.exit(error)
        return Path(folder, "table 0.txt").read_text().splitlines()


def main():
    tables = []
    for count in (1, 2):
        *table, held = run(count)
        print("\n".join([f"Processes: {count}", *table, held, ""]))
        tables.append(table)
    if tables[0] != tables[1]:
        sys.exit("The tables differ.")


if __name__ == "__main__":
    if len(sys.argv) == 5:
        folder, address, count, index = sys.argv[1:]
        spread(address, int(count), int(index))
        lines = table(folder)
        Path(folder, f"table {index}.txt").write_text("\n".join(lines))
    else:
        main()
