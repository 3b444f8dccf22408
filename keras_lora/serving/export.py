"""Writes one artifact that serves all adapters of a bank."""

import contextlib
import re

import keras

from keras_lora.layers import quantized_host
from keras_lora.models import atomic
from keras_lora.models.export import refuse_broken_artifact, refuse_occupied_path
from keras_lora.serving import banked


def export_by_name(bank, path):
    """Writes a SavedModel whose functions take names of adapters as strings.

    It holds the model's weights once, and stacks of the adapters in the bank, without
    free slots.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "A bank can only be exported on the TensorFlow backend, which can look up "
            f"names. Received: backend {keras.backend.backend()!r}. Create the same "
            "bank there from the model's file and the adapters' folders."
        )
    import tensorflow as tf

    refuse_occupied_path(path, "tf_saved_model")
    specs, adapters = bank.hosts.input_specs, bank.names
    flat = {spec.name: spec for spec in keras.tree.flatten(specs)}
    artifact = tf.Module()
    artifact.table = table = make_table(adapters)
    with compact_stacks(bank) as stacks:
        artifact.held = [variable.value for variable in bank.model.variables]
        artifact.stacks = [list(own.values()) for own in stacks.values()]

        def serve(inputs, adapter):
            with bank.choice.using(look_up_slots(table, adapter, adapters)):
                return bank.model(inputs, training=False)

        def serving_default(adapter, **inputs):
            values = [inputs[name] for name in flat]
            inputs = keras.tree.pack_sequence_as(specs, values)
            outputs = keras.tree.flatten(serve(inputs, adapter))
            return {f"output_{index}": value for index, value in enumerate(outputs)}

        def swap(adapter, **arrays):
            slot = look_up_slots(table, adapter[None], adapters, lowest=1)[0]
            for key, name in swap_names(bank).items():
                path, factor = key
                banked.write_slot(stacks[path][factor], slot, arrays[name])
            return {"adapter": adapter}

        def spec(like, name=None, shape=None):
            shape = like.shape if shape is None else shape
            return tf.TensorSpec(shape, like.dtype, name)

        names = tf.TensorSpec([None], tf.string, "adapter")
        nested = keras.tree.map_structure(spec, specs)
        artifact.serve = tf.function(serve, input_signature=[nested, names])
        signatures = {
            "serving_default": tf.function(serving_default).get_concrete_function(
                adapter=names, **{name: spec(x, name) for name, x in flat.items()}
            ),
            "swap": tf.function(swap).get_concrete_function(
                adapter=tf.TensorSpec([], tf.string, "adapter"),
                **{
                    name: spec(
                        stacks[path][factor], name, stacks[path][factor].shape[1:]
                    )
                    for (path, factor), name in swap_names(bank).items()
                },
            ),
        }
        with atomic.replacing(path) as new:
            tf.saved_model.save(artifact, str(new), signatures=signatures)


def export_by_id(bank, export, path, **kwargs):
    """Writes an artifact of Keras's in which ids are an input.

    export: The method `keras.Model.export` of the bank.
    """
    refuse_occupied_path(path, kwargs["format"])
    ids = keras.InputSpec(shape=(None,), dtype="int32", name="adapter")
    data = {"inputs": bank.hosts.input_specs, "adapter": ids}
    kwargs = {"verbose": False, "input_signature": [data], **kwargs}
    with atomic.replacing(path) as new, quantized_host.tracing_artifact():
        export(str(new), **kwargs)
        refuse_broken_artifact(new, kwargs["format"])


def swap_names(bank) -> dict:
    """{(path, factor): input of "swap"}, in letters that TensorFlow accepts."""
    names = {}
    for path, layer in bank.hosts.layers.items():
        for factor in layer.lora.stacks.by_name():
            name = f"{re.sub('[^A-Za-z0-9]', '_', path)}_{factor}"
            while name in names.values():
                name += "_"
            names[path, factor] = name
    return names


def swap_arrays(bank, prepared) -> dict:
    """{input of "swap": array}, for layers that an adapter leaves out too."""
    values = {
        path: layer.lora.stacks.slot_values(**prepared.get(path, {}))
        for path, layer in bank.hosts.layers.items()
    }
    return {
        name: values[path][factor] for (path, factor), name in swap_names(bank).items()
    }


@contextlib.contextmanager
def compact_stacks(bank):
    """Context in which layers read stacks without free slots; yields them by path."""
    import tensorflow as tf

    id_table, hosts = bank.id_table, bank.hosts.layers
    order = [id_table.slot_of[name] for name in (None, *bank.names)]
    before = {path: layer.lora.stacks for path, layer in hosts.items()}
    stacks_of = {}
    try:
        for path, layer in hosts.items():
            stacks = {
                factor: tf.Variable(tf.gather(stack.value, order), trainable=False)
                for factor, stack in before[path].by_name().items()
            }
            stacks_of[path] = stacks
            layer.lora.stacks = compact = banked.Stacks()
            vars(compact).update(stacks, variable_dtype=before[path].variable_dtype)
        yield stacks_of
    finally:
        for path, layer in hosts.items():
            layer.lora.stacks = before[path]


def make_table(names):
    """Returns TensorFlow's table of names and their slots; -1 for other names."""
    import tensorflow as tf

    return tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(
            tf.constant(["", *names]), tf.range(len(names) + 1)
        ),
        default_value=-1,
    )


def look_up_slots(table, adapters, names, lowest=0):
    """Returns the slots of names; InvalidArgumentError for an unknown one."""
    import tensorflow as tf

    slots = table.lookup(adapters)
    unknown = tf.boolean_mask(adapters, slots < lowest)
    check = tf.debugging.Assert(
        tf.equal(tf.size(unknown), 0),
        ["There is no adapter", unknown, f"There are: {', '.join(map(repr, names))}."],
    )
    with tf.control_dependencies([check]):
        return tf.identity(slots)


def specs_of(inputs):
    """Returns the shapes and dtypes of a model's inputs, with the batch open.

    An input is called by its key, or "inputs"; without keys "inputs_0" and so on.
    """
    if inputs is None:
        return None
    leaves = keras.tree.flatten_with_path(inputs)
    specs = []
    for path, x in leaves:
        name = "_".join(str(part) for part in path)
        if not isinstance(inputs, dict):
            name = "inputs" if len(leaves) == 1 else f"inputs_{name}"
        dtype = keras.backend.standardize_dtype(x.dtype)
        specs.append(
            keras.InputSpec(shape=(None, *x.shape[1:]), dtype=dtype, name=name)
        )
    return keras.tree.pack_sequence_as(inputs, specs)
