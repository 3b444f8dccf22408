"""Names of adapters, the ids that stand for them in a batch, and their slots."""

import collections
import difflib

import keras
import numpy as np
from keras import ops

from keras_lora.serving.slots import BASE

MOST_SPARE = 8  # slots for adapters that were replaced, and that calls still read


class Directory(keras.layers.Layer):
    """Which ids there are, and which slot each means.

        table   (capacity + 1, 2)   for each entry the id that means it, and its slot

    An id is its entry plus a multiple of their number that grows: no id is handed out
    twice. So an id that nobody handed out, or of a name that was removed, finds
    another in its entry, and gets the last slot, which gives NaN. A name that is given
    another adapter gets it in a slot that is free and that no call reads, and keeps its
    id: one assignment replaces it. So there are more slots than names, for what calls
    still read that began before.

    Args:
        capacity: How many names there can be.
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
        """The slot of ids that name nothing."""
        return self.slot_count - 1

    @property
    def names(self) -> list:
        return [name for name in self.id_of if name is not None]

    def refuse_if_full(self, name):
        if name not in self.id_of and len(self.names) == self.capacity:
            raise ValueError(
                f"The bank holds {self.capacity} adapters, its `capacity`: there is no "
                f"room for {name!r}. Remove one of {self.names[:9]} first."
            )

    def publish(self, name, slot):
        """The adapter in a slot is from now on what a name means."""
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
        """What is in the table."""
        values = np.full((self.capacity + 1, 2), -1, "int32")
        for name, each in self.id_of.items():
            values[each % len(values)] = each, self.slot_of[name]
        return values

    def slots(self, ids):
        """The slots that ids of a batch mean."""
        entries = ops.mod(ids, self.capacity + 1)
        found = ops.cast(ops.take(self.table, entries, axis=0), ids.dtype)
        slots = ops.where(found[:, 0] == ids, found[:, 1], self.no_slot)
        return ops.cast(slots, "int32")

    def known(self, names):
        """A list of names, checked."""
        if isinstance(names, str) or not hasattr(names, "__iter__"):
            raise ValueError(
                "`names` must be a list with the name of an adapter, or None for the "
                f"base model, for each row. Received: {names!r}."
            )
        return [self.checked(name) for name in names]

    def checked(self, name):
        if isinstance(name, np.str_):
            name = str(name)
        if name is None or (isinstance(name, str) and name in self.id_of):
            return name
        close = difflib.get_close_matches(str(name), self.names, n=3, cutoff=0.3)
        hint = f" Close are: {close}." if close else f" There are: {self.names[:9]}."
        raise ValueError(f"The bank has no adapter {name!r}.{hint}")
