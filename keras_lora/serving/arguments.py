"""Checks what a bank is given, and turns ids into slots when a call begins."""

import numbers
from collections.abc import Mapping

import keras
import numpy as np


def checked_adapters(adapters, target) -> dict:
    adapters = {} if adapters is None or adapters == () else adapters
    if not isinstance(adapters, Mapping):
        raise ValueError(
            "`adapters` must be a dict from names to folders or `Adapter`s. Received: "
            f"{adapters!r}."
        )
    for name in adapters:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"The name of an adapter is a string, and not empty. Received: {name!r}"
            )
    if not adapters and target is None:
        raise ValueError(
            "A bank needs `adapters`, or a `target` that says at which layers there is "
            'room, such as "all-linear".'
        )
    return dict(adapters)


def checked_capacity(capacity, adapters):
    capacity = max(len(adapters), 1) if capacity is None else capacity
    if (
        isinstance(capacity, bool)
        or not isinstance(capacity, numbers.Integral)
        or capacity < max(len(adapters), 1)
    ):
        raise ValueError(
            f"`capacity` must be a whole number >= {max(len(adapters), 1)}, as many as "
            f"there are adapters. Received: capacity={capacity!r}."
        )
    return int(capacity)


def refuse_names(x):
    """Raises if names were given instead of ids; Keras's own error is obscure."""
    given = x.get("adapter") if isinstance(x, Mapping) else None
    if isinstance(given, np.ndarray) and given.dtype.kind not in "OUS":
        return
    values = given if isinstance(given, (list, tuple, np.ndarray)) else ()
    if any(value is None or isinstance(value, (str, bytes)) for value in values):
        raise ValueError(
            '"adapter" must hold ids, and not names: `bank.ids(names)` gives them. '
            f"Received: {given!r}"[:300]
        )


def named(name, function, *arguments):
    """function(*arguments), whose errors say which adapter they are about."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"The adapter {name!r}: {error}") from error


SLOTS = "slots"  # in the place of "adapter" among a bank's inputs


class FixedIds:
    """What the ids mean at one moment, for a call that keeps it.

    Args:
        values: What is in the bank's table at that moment.
        no_slot: The slot of ids that name nothing.
    """

    def __init__(self, values, no_slot):
        self.values, self.no_slot = values, no_slot

    def slots(self, ids):
        """The slots of ids, a NumPy array."""
        found = self.values[ids % len(self.values)]
        slots = np.where(found[:, 0] == ids, found[:, 1], self.no_slot)
        return slots.astype("int32")

    def inputs(self, inputs):
        """A bank's inputs with slots; what is no dict with ids stays as it is."""
        if not isinstance(inputs, Mapping) or "adapter" not in inputs:
            return inputs
        ids = inputs["adapter"]
        slots = self.slots(checked_ids(ids))
        if type(ids).__module__ == "torch":
            slots = keras.ops.convert_to_tensor(slots)
        others = {key: value for key, value in inputs.items() if key != "adapter"}
        return {**others, SLOTS: slots}

    def batch(self, batch):
        """A batch: inputs, or these with targets and weights; a tuple of them."""
        inputs, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
        return (self.inputs(inputs), *rest)

    def batches(self, batches):
        """A dataset of another library, or anything else that gives batches."""
        if isinstance(batches, keras.utils.PyDataset):
            return Batches(batches, self)
        if hasattr(batches, "element_spec"):
            return batches.map(self.in_dataset)
        return (self.batch(batch) for batch in batches)

    def in_dataset(self, *batch):
        """`batch` in a tf.data.Dataset, on every backend."""
        import tensorflow as tf

        inputs, *rest = batch
        if isinstance(inputs, Mapping) and "adapter" in inputs:
            inputs = dict(inputs)
            ids = inputs.pop("adapter")
            inputs[SLOTS] = tf.numpy_function(self.slots, [ids], tf.int32)
            inputs[SLOTS].set_shape(ids.shape)
        return (inputs, *rest) if rest else inputs


class Batches(keras.utils.PyDataset):
    """A PyDataset with slots in the place of ids."""

    def __init__(self, given, fixed):
        super().__init__(
            workers=given.workers,
            use_multiprocessing=given.use_multiprocessing,
            max_queue_size=given.max_queue_size,
        )
        self.given, self.fixed = given, fixed

    @property
    def num_batches(self):
        return self.given.num_batches

    def __getitem__(self, index):
        return self.fixed.batch(self.given[index])

    def on_epoch_begin(self):
        self.given.on_epoch_begin()

    def on_epoch_end(self):
        self.given.on_epoch_end()


def checked_ids(ids):
    """Ids as a NumPy array."""
    ids = keras.ops.convert_to_numpy(ids) if keras.ops.is_tensor(ids) else ids
    ids = np.asarray(ids)
    refuse_other_ids(ids)
    return ids


def refuse_other_ids(ids):
    """Raises ValueError for what cannot be ids, an array or a tensor."""
    if "int" not in str(ids.dtype) or len(ids.shape) != 1:
        raise ValueError(
            '"adapter" must be a vector of whole numbers, as `bank.ids(names)` '
            f"gives them. Received: shape {ids.shape}, dtype {ids.dtype}."
        )
