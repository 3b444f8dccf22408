"""Bytes of each device under `keras.distribution`: by shapes alone, and measured.

    python -m benchmarks.devices

A Llama of 70 billion parameters is planned for 8 hosts of 8 devices, by KerasHub's
layout map; a small one is planned and measured in two processes of two devices.
"""

import collections
import contextlib
import functools
import gc
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import types
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


def measure():
    """The small model: planned, and what one device holds after a step."""
    import jax
    import numpy as np

    rows, length = 16, 32
    backbone = spread((2, 2))
    build = functools.partial(adapted, backbone, 2, SMALL, rank=8)

    def on_device(variables):
        return sum(v.value.addressable_shards[0].data.nbytes for v in variables)

    plan, model = planned(build, rows, length), build()
    names = ("token_ids", "padding_mask")
    x = {name: np.ones((rows // 2, length), "int32") for name in names}
    y = np.ones((rows // 2, length, SMALL["hidden_dim"]), "float32")
    model.fit(x, y, batch_size=rows // 2, verbose=0)
    found = collections.Counter()
    for variable in model.variables:
        found[kind_of(variable)] += on_device([variable])
    found["moments"] = on_device(model.optimizer.variables)
    read = functools.partial(read_backwards, model, rows, length)
    arrays = jax.jit(read)(*values_of(model))
    found["activations"] = on_device(map(types.SimpleNamespace, arrays))
    return {"planned": plan, "measured": dict(found)}


class Watch(threading.Thread):
    """What one device of this process holds while calls run, looked at all the time.

    The second device, as a process without accelerators has its host's values on the
    first. Arrays inside of a program are seen in what XLA writes of each that it makes.
    """

    def __init__(self, programs):
        import jax

        super().__init__(daemon=True)
        self.device, self.ended = jax.local_devices()[1], threading.Event()
        self.programs, self.read = Path(programs), set()
        self.rows, self.most, self.largest = [], 0, 0

    def sizes(self) -> list:
        """Bytes of each buffer."""
        import jax

        found: dict = {}
        for array in jax.live_arrays():
            try:
                for shard in array.addressable_shards:
                    if shard.device == self.device:
                        found[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
            except RuntimeError:  # deleted meanwhile
                continue
        return list(found.values()) or [0]

    def run(self):
        while not self.ended.wait(0.001):
            sizes = self.sizes()
            self.most = max(self.most, sum(sizes))
            self.largest = max(self.largest, *sizes)

    def in_programs(self) -> int:
        """Bytes of the largest array in programs that were not read yet.

        Of those for several devices: the others run on a host.
        """
        found = [0]
        new = {*self.programs.glob("*after_optimizations.txt")} - self.read
        self.read |= new
        for text in map(Path.read_text, new):
            cut = "num_partitions" in text.partition("\n")[0]
            for bits, shape in ARRAY.findall(text) if cut else ():
                size = math.prod(int(n) for n in shape.split(",") if n)
                found.append(size * int(bits) // 8)
        return max(found)

    def see(self, name, call, *arguments, **options):
        """Calls, and adds a row: bytes before, the most meanwhile, and after."""
        gc.collect()
        self.in_programs()
        before = self.most = sum(self.sizes())
        self.largest = 0
        result = call(*arguments, **options)
        gc.collect()
        after, largest = sum(self.sizes()), max(self.largest, self.in_programs())
        self.rows.append((name, before, max(self.most, after), after, largest))
        return result

    @contextlib.contextmanager
    def inside(self, name, context):
        self.see(name, context.__enter__)
        try:
            yield
        finally:
            context.__exit__(None, None, None)


ARRAY = re.compile(r"\b(?:f|bf|s|u)(\d+)\[([\d,]*)\]")
WIDTH = 1024


def lay_out_by_rules():
    """The model axis over all devices, for the layers of `network`."""
    from keras import distribution

    devices = distribution.list_devices("cpu")
    mesh = distribution.DeviceMesh((1, len(devices)), ["batch", "model"], devices)
    layouts = distribution.LayoutMap(mesh)
    layouts[".*up/_?kernel"] = (None, "model")
    layouts[".*heads/_?kernel"] = (None, "model", None)
    layouts[".*down/_?kernel"] = ("model", None)
    distribution.set_distribution(
        distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
        )
    )
    return mesh


def network(dtype=None, optimizer="adam"):
    import keras

    layers = [
        keras.layers.Dense(WIDTH, activation="tanh", name="up", dtype=dtype),
        keras.layers.EinsumDense(
            "abc,cde->abde", (None, 16, WIDTH // 16), name="heads", dtype=dtype
        ),
        keras.layers.Reshape((4, WIDTH)),
        keras.layers.Dense(WIDTH, name="down", dtype=dtype),
        keras.layers.Dense(8, name="head"),
    ]
    model = keras.Sequential([keras.Input((4, WIDTH)), *layers])
    model.compile(optimizer, "mse")
    return model


def measure_calls(folder, programs):
    """Rows of `Watch` for each call on `network`."""
    import jax
    import keras
    import numpy as np

    import keras_lora

    mesh = lay_out_by_rules()
    random = np.random.default_rng(0)
    x = random.standard_normal((8, 4, WIDTH), "float32")
    y = random.standard_normal((8, 4, 8), "float32")
    saved = f"{folder}/saved"

    def adapt(model, **options):
        keras_lora.apply_lora(model, rank=8, target=["up", "heads", "down"], **options)
        return model

    def fit(model, **options):
        model.fit(x, y, batch_size=8, verbose=0, **options)

    def placed(value):
        layout = keras.distribution.TensorLayout([None] * value.ndim, mesh)
        return jax.device_put(value, layout.backend_layout)

    watch = Watch(programs)
    watch.start()
    see = watch.see
    model = see("a plain model", network)
    see("`fit` of the plain model", fit, model)
    model = None
    model = network()
    see("`apply_lora`", adapt, model)
    see("`fit`", fit, model)
    see("`save_adapter`", keras_lora.save_adapter, model, saved)
    see("`load_adapter`", keras_lora.load_adapter, model, saved)
    checkpoint = keras_lora.AdapterCheckpoint(f"{folder}/best")
    see("`fit` with `AdapterCheckpoint`", fit, model, callbacks=[checkpoint])
    with watch.inside("inside `disabled`", keras_lora.disabled(model)):
        pass
    with watch.inside("inside `merged`", keras_lora.merged(model)):
        predict = functools.partial(model.predict, batch_size=8, verbose=0)
        see("`predict` inside `merged`", predict, x)
    see("`merge_lora`", keras_lora.merge_lora, model)
    see("`fit` after `merge_lora`", fit, model)
    base = network()
    see("`extract_adapter`", keras_lora.extract_adapter, base, model, rank=8)
    model = checkpoint = predict = None
    see("`load_adapter` into a plain model", keras_lora.load_adapter, base, saved)
    see("`remove_lora`", keras_lora.remove_lora, base)
    base = None
    for method in ("pissa", "olora", "orthogonal", "eva"):
        model = adapt(network())
        data = x if method == "eva" else None
        start = functools.partial(keras_lora.initialize_lora, model, method, data)
        see(f'`initialize_lora(model, "{method}")`', start)
        model = start = None
    model = network(optimizer=keras_lora.LoRAPlus(keras.optimizers.Adam(0.01), 4.0))
    options = {"use_dora": True, "dropout": 0.1}
    see("`apply_lora(use_dora=True, dropout=0.1)`", adapt, model, **options)
    see("`fit` of it with `LoRAPlus`", fit, model)
    with watch.inside("inside `merged`, DoRA", keras_lora.merged(model)):
        pass
    see("`merge_lora`, DoRA", keras_lora.merge_lora, model)
    model = None
    for way in ("dequantize", "requantize"):
        model = network("int8_from_float32")
        see("`apply_lora`, int8 kernels", adapt, model)
        see("`fit`, int8 kernels", fit, model)
        merge = functools.partial(keras_lora.merge_lora, model, quantized=way)
        see(f'`merge_lora(quantized="{way}")`', merge)
        model = merge = None
    model, adapters = network(), {"one": saved, "two": saved}
    bank = see("`AdapterBank`", keras_lora.AdapterBank, model, adapters, 3)
    rows = bank.ids(["one", None] * 4)
    inputs = {"inputs": x, "adapter": rows}
    arrays = {"inputs": placed(x), "adapter": placed(rows)}
    see("a call of the bank", bank, arrays)
    see("`bank.predict`", bank.predict, inputs, batch_size=8, verbose=0)
    see("`bank.add`", bank.add, "three", saved)
    bank.compile("adam", "mse")
    inputs["adapter"] = bank.ids(["one", "three"] * 4)
    see("`bank.fit`", bank.fit, inputs, y, batch_size=8, verbose=0)
    see("`bank.activate`", bank.activate, "one")
    bank.activate(None)
    see("`bank.remove`", bank.remove, "two")
    see("`bank.release`", bank.release)
    bank = arrays = None
    see("`load_adapter` again", keras_lora.load_adapter, model, saved)
    see("`export`", keras_lora.export, model, f"{folder}/artifact")
    watch.ended.set()
    watch.join()
    return watch.rows


def in_process(devices, *arguments, flags=""):
    count = f"--xla_force_host_platform_device_count={devices}"
    settings = {"KERAS_BACKEND": "jax", "XLA_FLAGS": f"{count} {flags}"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.devices", *arguments],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def in_two_processes(folder, task):
    """What the first of two processes with two devices prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in "01":
        flags = f"--xla_dump_to={folder}/{task}{index} --xla_dump_hlo_as_text"
        started.append(in_process(2, task, folder, address, index, flags=flags))
    first, _ = [finished(process) for process in started]
    return first


def finished(process):
    output, _ = process.communicate(timeout=500)
    if process.returncode:
        raise RuntimeError(f"A process has ended with {process.returncode}.")
    return json.loads(output.splitlines()[-1])


def main():
    large = finished(in_process(64, "plan"))
    with tempfile.TemporaryDirectory() as folder:
        small = in_two_processes(folder, "measure")
        calls = in_two_processes(folder, "calls")
    kinds = ("W", "A", "B", "moments", "activations")
    print(f"| MiB on each device | {' | '.join(kinds)} |\n|---|{'---:|' * len(kinds)}")
    for name, row in (
        ("70 billion parameters, planned", large),
        ("small, planned", small["planned"]),
        ("small, measured", small["measured"]),
    ):
        cells = [f"{row[kind] / MIB:,.2f}" for kind in kinds]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| MiB on a device | before | most | after | largest array |")
    print("|---|---:|---:|---:|---:|")
    for name, *sizes in calls:
        print(f"| {name} | {' | '.join(f'{size / MIB:.2f}' for size in sizes)} |")


if __name__ == "__main__":
    task, *arguments = [*sys.argv[1:], ""]
    if task == "plan":
        print(json.dumps(plan()))
    elif task in ("measure", "calls"):
        import jax
        import keras

        folder, address, index, _ = arguments
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize(address, 2, int(index))
        keras.utils.set_random_seed(0)
        programs = f"{folder}/calls{index}"
        print(
            json.dumps(
                measure() if task == "measure" else measure_calls(folder, programs)
            )
        )
    else:
        main()
