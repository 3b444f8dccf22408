"""The ids of a bank's adapters, and the slots that they mean."""

import collections
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_lora.layers import arguments

BASE = 0  # the slot of the base model: zeros
SLOTS = "slots"  # replaces "adapter" among a bank's inputs
MOST_SPARE = 8  # slots for replaced adapters that calls still read


class IdTable(keras.layers.Layer):
    """The ids of a bank, and the slot of each.

        table   (capacity + 1, 2)   the present id and slot of each entry
        entry = id mod (capacity + 1)

    Each new name in an entry gets a higher id, so no id is used twice. An unknown id,
    or that of a removed name, differs from the id in its entry and means the last slot,
    which gives NaN. If a name gets another adapter, it is written to a free slot that
    no call reads, and then one assignment to the table makes the id mean that slot. So
    there are more slots than names.

    Args:
        capacity: The largest number of names.
    """

    def __init__(self, capacity):
        super().__init__(dtype="float32", trainable=False)
        self.capacity = capacity
        spare = min(capacity, MOST_SPARE) + 1
        self.slot_count = capacity + spare + 2
        self.id_of, self.slot_of = {None: 0}, {None: BASE}
        self.free_slots = collections.deque(range(1, capacity + spare + 1))
        self._next_ids = collections.deque(range(1, capacity + 1))
        self.table = self.add_weight(
            name="table",
            shape=(capacity + 1, 2),
            initializer=lambda shape, dtype: ops.convert_to_tensor(self.values()),
            dtype="int32",
            trainable=False,
            autocast=False,
        )
        self.built = True

    @property
    def no_slot(self):
        """The slot of unknown ids."""
        return self.slot_count - 1

    @property
    def names(self) -> list:
        return [name for name in self.id_of if name is not None]

    def refuse_if_full(self, name):
        if name not in self.id_of and len(self.names) == self.capacity:
            raise ValueError(
                f"The bank holds {self.capacity} adapters, its `capacity`, and has no "
                f"room for {name!r}. Remove one of {self.names[:9]} first, or create "
                "the bank with a higher `capacity`."
            )

    def publish(self, name, slot):
        """Makes a name refer to the adapter in a slot."""
        if name in self.slot_of:
            self.free_slots.append(self.slot_of[name])
        else:
            self.id_of[name] = self._next_ids.popleft()
        self.slot_of[name] = slot
        self.table.assign(self.values())

    def withdraw(self, name):
        self._next_ids.append(self.id_of.pop(name) + self.capacity + 1)
        self.free_slots.append(self.slot_of.pop(name))
        self.table.assign(self.values())

    def values(self):
        """Returns the table's values: an id and its slot in each row."""
        values = np.full((self.capacity + 1, 2), -1, "int32")
        for name, each in self.id_of.items():
            values[each % len(values)] = each, self.slot_of[name]
        return values

    def slots(self, ids):
        """Returns the slots of a batch's ids."""
        entries = ops.take(self.table, ops.mod(ids, self.capacity + 1), axis=0)
        entries = ops.cast(entries, ids.dtype)
        slots = ops.where(entries[:, 0] == ids, entries[:, 1], self.no_slot)
        return ops.cast(slots, "int32")

    def validate_names(self, names):
        """Returns a list of names, or raises if one is not in the bank."""
        if isinstance(names, str) or not hasattr(names, "__iter__"):
            raise ValueError(
                "`names` must be a list with the name of an adapter, or None for the "
                f"base model, for each row. Received: {names!r}."
            )
        return [self.validate_name(name) for name in names]

    def validate_name(self, name):
        if isinstance(name, np.str_):
            name = str(name)
        if name is None or (isinstance(name, str) and name in self.id_of):
            return name
        hint = arguments.closest(name, self.names, cutoff=0.3)
        hint = hint or f" It has {self.names[:9]}."
        raise ValueError(f"The bank has no adapter {name!r}.{hint}")


def refuse_names(x):
    """Raises if names were given instead of ids; Keras's own error is obscure."""
    ids = x.get("adapter") if isinstance(x, Mapping) else None
    if isinstance(ids, np.ndarray) and ids.dtype.kind not in "OUS":
        return
    values = ids if isinstance(ids, (list, tuple, np.ndarray)) else ()
    if any(value is None or isinstance(value, (str, bytes)) for value in values):
        raise ValueError(
            '"adapter" must hold ids, not names: `bank.ids(names)` returns them. '
            f"Received: {ids!r}"[:300]
        )


class FixedIds:
    """A copy of the table: the slots of all ids when a call begins.

    Args:
        values: The values of the bank's table at that moment.
        no_slot: The slot of unknown ids.
    """

    def __init__(self, values, no_slot):
        self.values, self.no_slot = values, no_slot

    def slots(self, ids):
        """Returns the slots of ids, a NumPy array."""
        entries = self.values[ids % len(self.values)]
        slots = np.where(entries[:, 0] == ids, entries[:, 1], self.no_slot)
        return slots.astype("int32")

    def inputs(self, inputs):
        """Replaces ids by slots in inputs of the bank; other inputs are unchanged."""
        if not isinstance(inputs, Mapping) or "adapter" not in inputs:
            return inputs
        ids = inputs["adapter"]
        slots = self.slots(validate_ids(ids))
        if type(ids).__module__ == "torch":
            slots = keras.ops.convert_to_tensor(slots)
        other_inputs = {key: value for key, value in inputs.items() if key != "adapter"}
        return {**other_inputs, SLOTS: slots}

    def batch(self, batch):
        """Replaces ids in a batch: inputs, or inputs with targets and weights."""
        inputs, *targets = batch if isinstance(batch, (tuple, list)) else (batch,)
        return (self.inputs(inputs), *targets)

    def batches(self, batches):
        """Replaces ids in a dataset or any other iterable of batches."""
        if isinstance(batches, keras.utils.PyDataset):
            return BatchesOfSlots(batches, self)
        if hasattr(batches, "element_spec"):
            return batches.map(self.in_dataset)
        return (self.batch(batch) for batch in batches)

    def in_dataset(self, *batch):
        """Does what `batch` does, inside a tf.data.Dataset."""
        import tensorflow as tf

        inputs, *targets = batch
        if isinstance(inputs, Mapping) and "adapter" in inputs:
            inputs = dict(inputs)
            ids = inputs.pop("adapter")
            inputs[SLOTS] = tf.numpy_function(self.slots, [ids], tf.int32)
            inputs[SLOTS].set_shape(ids.shape)
        return (inputs, *targets) if targets else inputs


class BatchesOfSlots(keras.utils.PyDataset):
    """A PyDataset with slots instead of ids."""

    def __init__(self, dataset, fixed):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self.dataset, self.fixed = dataset, fixed

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __getitem__(self, index):
        return self.fixed.batch(self.dataset[index])

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


def validate_ids(ids):
    """Returns ids as a NumPy array."""
    ids = keras.ops.convert_to_numpy(ids) if keras.ops.is_tensor(ids) else ids
    ids = np.asarray(ids)
    refuse_other_ids(ids)
    return ids


def refuse_other_ids(ids):
    """Raises ValueError for an array or tensor that cannot hold ids."""
    if "int" not in str(ids.dtype) or len(ids.shape) != 1:
        raise ValueError(
            '"adapter" must be a vector of whole numbers, as `bank.ids(names)` '
            f"returns it. Received: shape {ids.shape}, dtype {ids.dtype}."
        )
