"""What the adapters of a sweep learn from, and how each is validated."""

import keras
import numpy as np


def split(data, validation_data):
    """(x, y, weights or None) for training and for validation."""
    checked = []
    for argument, given in (("data", data), ("validation_data", validation_data)):
        if given is None:
            continue
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            raise ValueError(
                f"`{argument}` must be (x, y) or (x, y, sample_weight). Received: "
                f"{type(given).__name__}."
            )
        given = [
            keras.tree.map_structure(keras.ops.convert_to_numpy, x) for x in given[:2]
        ] + [None if x is None else np.asarray(x) for x in (*given[2:], None)[:1]]
        sizes = {len(x) for x in keras.tree.flatten(given) if x is not None}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"`{argument}` has arrays of {sorted(sizes)} rows.")
        checked.append(given)
    if validation_data is None:
        count = len(keras.tree.flatten(checked[0])[0])
        first = count - count // 5
        if first == count:
            raise ValueError(
                f"{count} rows are too few for a fifth of them: give `validation_data`."
            )
        whole = checked[0]
        checked = [rows_of(whole, slice(first)), rows_of(whole, slice(first, None))]
    return checked


def rows_of(data, rows):
    return [
        None if x is None else keras.tree.map_structure(lambda part: part[rows], x)
        for x in data
    ]


class Batches(keras.utils.PyDataset):
    """Each batch's rows once for every adapter, in a new order each epoch."""

    def __init__(self, bank, names, data, batch_size):
        super().__init__()
        self.bank, self.names, self.data = bank, names, data
        self.batch_size = batch_size
        self.count = len(keras.tree.flatten(data)[0])
        self.random = np.random.default_rng(0)
        self.order = self.random.permutation(self.count)

    def __len__(self):
        return -(-self.count // self.batch_size)

    def __getitem__(self, index):
        first = index * self.batch_size
        rows = self.order[first : first + self.batch_size]
        ids = self.bank.ids(np.repeat(self.names, len(rows)))
        x, y, weights = rows_of(self.data, np.tile(rows, len(self.names)))
        batch = {"inputs": x, "adapter": ids}, y
        return batch if weights is None else (*batch, weights)

    def on_epoch_end(self):
        self.order = self.random.permutation(self.count)


class Validator(keras.callbacks.Callback):
    """Each adapter's validation loss after each epoch."""

    def __init__(self, bank, names, data, batch_size):
        super().__init__()
        self.bank, self.data, self.batch_size = bank, data, batch_size
        self.losses = {name: [] for name in names}

    def on_epoch_end(self, epoch, logs=None):
        x, y, weights = self.data
        count = len(keras.tree.flatten(x)[0])
        for name, losses in self.losses.items():
            inputs = {"inputs": x, "adapter": self.bank.ids([name] * count)}
            found = self.bank.evaluate(
                inputs,
                y,
                sample_weight=weights,
                batch_size=self.batch_size,
                verbose=0,
                return_dict=True,
            )
            losses.append(float(found["loss"]))
