"""Bytes of each device under `keras.distribution`: by shapes alone, and measured.

    python -m benchmarks.devices

A Llama of 70 billion parameters is planned for 8 hosts of 8 devices, by KerasHub's
layout map; a small one is planned and measured in two processes of two devices.
"""

import collections
import functools
import gc
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20
LARGE = dict(
    vocabulary_size=32000,
    num_query_heads=64,
    num_key_value_heads=8,
    hidden_dim=8192,
    intermediate_dim=28672,
    dtype="bfloat16",
)
SMALL = dict(
    vocabulary_size=512,
    num_query_heads=8,
    num_key_value_heads=4,
    hidden_dim=256,
    intermediate_dim=1024,
    dtype="float32",
)


def kind_of(variable) -> str:
    """The column of the table that a model's variable belongs to."""
    name = variable.path.split("/")[-1]
    return {"a": "A", "b": "B"}.get(name, "W") if "/lora/" in variable.path else "W"


def share(variable) -> int:
    """The bytes of a variable on each device, by its layout."""
    import keras

    layout = keras.distribution.distribution().get_variable_layout(variable)
    sharding = getattr(layout, "backend_layout", layout)  # JAX's, in Keras 3.12
    shape = sharding.shard_shape(tuple(variable.shape))
    return math.prod(shape) * variable.value.dtype.itemsize


def values_of(model):
    trained, others = model.trainable_variables, model.non_trainable_variables
    return [v.value for v in trained], [v.value for v in others]


def read_backwards(model, rows, length, trained, others) -> list:
    """The arrays of a batch that the backward pass of a step reads."""
    import jax
    from jax import numpy as jnp

    ids = jnp.zeros((rows, length), "int32")
    inputs = {"token_ids": ids, "padding_mask": ids}

    def outputs(trained):
        return model.stateless_call(trained, others, inputs, training=True)[0]

    leaves = jax.tree.leaves(jax.vjp(outputs, trained)[1])
    return [x for x in leaves if x.shape and x.shape[0] in (rows, rows * length)]


def planned(build, rows, length) -> dict:
    """Kind -> bytes of each device, by shapes alone: no weight is made.

    Activations are what the backward pass of one step reads, cut along the batch only.

    Args:
        build: A function that returns an adapted model, compiled; called in a trace.
        rows: Of a batch, over all devices.
        length: Of a row, in tokens.
    """
    import jax
    import keras

    found = collections.Counter()
    mesh = keras.distribution.distribution().device_mesh
    batches = dict(zip(mesh.axis_names, mesh.shape, strict=True))["batch"]

    def trace():
        model = build()
        model.optimizer.build(model.trainable_variables)
        for variable in model.variables:
            found[kind_of(variable)] += share(variable)
        for variable in model.optimizer.variables:
            found["moments"] += share(variable)
        read = functools.partial(read_backwards, model, rows, length)
        for leaf in jax.eval_shape(read, *values_of(model)):
            found["activations"] += leaf.size * leaf.dtype.itemsize // batches
        return 0

    jax.eval_shape(trace)
    return dict(found)


def spread(shape):
    """Lays models out over a mesh by KerasHub's map; returns its backbone."""
    import keras_hub
    from keras import distribution

    devices = distribution.list_devices("cpu")
    mesh = distribution.DeviceMesh(shape, ["batch", "model"], devices)
    backbone = keras_hub.models.LlamaBackbone
    layouts = backbone.get_layout_map(mesh)
    distribution.set_distribution(
        distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
        )
    )
    return backbone


def adapted(backbone, layers, sizes, **options):
    import keras_lora

    model = backbone(num_layers=layers, **sizes)
    keras_lora.apply_lora(model, target="all-linear", **options)
    model.compile("adam", "mse")
    return model


def plan():
    """The large model, by shapes alone."""
    backbone = spread((8, 8))
    return planned(lambda: adapted(backbone, 80, LARGE, rank=16), 8, 2048)


def held() -> int:
    """The bytes that one device of this process holds: each buffer once."""
    import jax

    gc.collect()
    device = jax.local_devices()[0]
    shards = [s.data for x in jax.live_arrays() for s in x.addressable_shards]
    own = [x for x in shards if x.device == device]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in own}.values())


def measure(folder):
    """The small model: planned, and the bytes of one device after each call."""
    import jax
    import numpy as np

    import keras_lora

    rows, length = 16, 32
    backbone = spread((2, 2))
    build = functools.partial(adapted, backbone, 2, SMALL)
    result = {"planned": planned(functools.partial(build, rank=8), rows, length)}
    before = held()
    after = result["held"] = {}

    def note(name):
        after[name] = held() - before

    def on_device(variables):
        return sum(v.value.addressable_shards[0].data.nbytes for v in variables)

    model = build(rank=8)
    note("apply_lora, before the first step")
    x = {
        name: np.ones((rows // 2, length), "int32")
        for name in ("token_ids", "padding_mask")
    }
    y = np.ones((rows // 2, length, SMALL["hidden_dim"]), "float32")
    fit = functools.partial(model.fit, x, y, batch_size=rows // 2, verbose=0)
    fit()
    note("fit")
    found = collections.Counter()
    for variable in model.variables:
        found[kind_of(variable)] += on_device([variable])
    found["moments"] = on_device(model.optimizer.variables)
    read = functools.partial(read_backwards, model, rows, length)
    arrays = jax.jit(read)(*values_of(model))
    shards = [array.addressable_shards[0].data for array in arrays]
    found["activations"] = sum(shard.nbytes for shard in shards)
    result["measured"] = dict(found)
    del arrays, shards
    keras_lora.save_adapter(model, f"{folder}/adapter")
    note("save_adapter")
    keras_lora.load_adapter(model, f"{folder}/adapter")
    note("load_adapter")
    with keras_lora.disabled(model):
        note("inside disabled")
    with keras_lora.merged(model):
        note("inside merged")
    note("after merged")
    keras_lora.merge_lora(model)
    note("merge_lora")
    keras_lora.load_adapter(model, f"{folder}/adapter")
    keras_lora.remove_lora(model)
    note("load_adapter, remove_lora")
    bank = keras_lora.AdapterBank(model, {"one": f"{folder}/adapter"}, capacity=3)
    note("AdapterBank, 3 adapters of rank 8")
    bank.activate("one")
    bank.activate(None)
    bank.release()
    note("release")
    del model, bank, fit
    return result


def measure_starts():
    """The same for models that are made anew: a start, DoRA."""
    import keras_lora

    after, backbone = {}, spread((2, 2))
    before = held()

    def note(name):
        after[name] = held() - before

    model = adapted(backbone, 2, SMALL, rank=8)
    keras_lora.initialize_lora(model, "pissa")
    note('apply_lora, initialize_lora(model, "pissa")')
    del model
    before = held()
    model = adapted(backbone, 2, SMALL, rank=8, use_dora=True)
    note("apply_lora(use_dora=True)")
    with keras_lora.merged(model):
        note("inside merged, with DoRA")
    return after


def in_process(devices, *arguments, **environment):
    flags = f"--xla_force_host_platform_device_count={devices}"
    settings = {"KERAS_BACKEND": "jax", "XLA_FLAGS": flags, **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.devices", *arguments],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def finished(process):
    output, _ = process.communicate(timeout=500)
    if process.returncode:
        raise RuntimeError(f"A process has ended with {process.returncode}.")
    return json.loads(output.splitlines()[-1])


def main():
    large = finished(in_process(64, "plan"))
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        processes = [in_process(2, "measure", folder, address, f"{i}") for i in "01"]
        small, _ = [finished(process) for process in processes]
    kinds = ("W", "A", "B", "moments", "activations")
    print(f"| MiB on each device | {' | '.join(kinds)} |\n|---|{'---:|' * len(kinds)}")
    for name, row in (
        ("70 billion parameters, planned", large),
        ("small, planned", small["planned"]),
        ("small, measured", small["measured"]),
    ):
        cells = [f"{row[kind] / MIB:,.2f}" for kind in kinds]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| after | MiB on each device |\n|---|---:|")
    for name, size in small["held"].items():
        print(f"| {name} | {size / MIB:.2f} |")


if __name__ == "__main__":
    task, *arguments = [*sys.argv[1:], ""]
    if task == "plan":
        print(json.dumps(plan()))
    elif task == "measure":
        import jax
        import keras

        folder, address, index, _ = arguments
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize(address, 2, int(index))
        keras.utils.set_random_seed(0)
        starts = measure_starts()
        result = measure(folder)
        result["held"] |= starts
        print(json.dumps(result))
    else:
        main()
