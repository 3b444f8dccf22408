"""sweep: adapters with many settings, trained at once over one model."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np

from keras_lora.files import save
from keras_lora.files.folder import Adapter
from keras_lora.keras_internals import optimizers
from keras_lora.layers import arguments
from keras_lora.layers.settings import is_number
from keras_lora.models import apply, sites, tables
from keras_lora.serving.bank import AdapterBank


def split_data(data, validation_data):
    """Returns (x, y, weights or None) for training and for validation."""
    checked = []
    for argument, arrays in (("data", data), ("validation_data", validation_data)):
        if arrays is None:
            continue
        if not isinstance(arrays, (tuple, list)) or len(arrays) not in (2, 3):
            raise ValueError(
                f"`{argument}` must be (x, y) or (x, y, sample_weight). Received: "
                f"{type(arrays).__name__}."
            )
        arrays = [
            keras.tree.map_structure(keras.ops.convert_to_numpy, x) for x in arrays[:2]
        ] + [None if x is None else np.asarray(x) for x in (*arrays[2:], None)[:1]]
        sizes = {len(x) for x in keras.tree.flatten(arrays) if x is not None}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"`{argument}` has arrays of {sorted(sizes)} rows.")
        checked.append(arrays)
    if validation_data is None:
        count = len(keras.tree.flatten(checked[0])[0])
        first = count - count // 5
        if first == count:
            raise ValueError(
                f"{count} rows are too few to split: give `validation_data`."
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
    """Batches with each row once for every adapter, in a new order each epoch."""

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
    """Callback that records each adapter's validation loss after each epoch."""

    def __init__(self, bank, names, data, batch_size):
        super().__init__()
        self.bank, self.data, self.batch_size = bank, data, batch_size
        self.losses = {name: [] for name in names}

    def on_epoch_end(self, epoch, logs=None):
        x, y, weights = self.data
        count = len(keras.tree.flatten(x)[0])
        for name, losses in self.losses.items():
            inputs = {"inputs": x, "adapter": self.bank.ids([name] * count)}
            logs = self.bank.evaluate(
                inputs,
                y,
                sample_weight=weights,
                batch_size=self.batch_size,
                verbose=0,
                return_dict=True,
            )
            losses.append(float(logs["loss"]))


# Keywords of other libraries, which a setting may not have.
SETTING_KEYWORDS = {**arguments.MODEL_KEYWORDS, "lr": "learning_rate"}
del SETTING_KEYWORDS["learning_rate"]


class Setting(NamedTuple):
    """A setting and its validation losses after each epoch; NaN is the worst."""

    name: str
    settings: dict
    losses: list

    @property
    def loss(self) -> float:
        """The loss after the last epoch."""
        return self.losses[-1]

    @property
    def order(self):
        return math.inf if math.isnan(self.loss) else self.loss


class Sweep(tables.Rows):
    """Rows (.name .settings .losses .loss), the best one first; it prints as a table.

    Attributes:
        adapters: Name -> `Adapter`, as trained.
    """

    def __init__(self, rows, adapters):
        self.rows = sorted(rows, key=lambda row: row.order)
        self.adapters = adapters

    def __repr__(self):
        return f"<Sweep of {len(self)} settings, best {self.best.name!r}>"

    @property
    def best(self) -> Setting:
        """The setting with the lowest validation loss after the last epoch."""
        return self.rows[0]

    @property
    def adapter(self) -> Adapter:
        """The adapter of the best setting, for `load_adapter` or `save`."""
        return self.adapters[self.best.name]

    def parts(self):
        keys = list(dict.fromkeys(key for row in self for key in row.settings))
        head = ["setting", *keys, "lowest", "last"]
        rows = [
            [
                row.name,
                *(str(row.settings.get(key, "")) for key in keys),
                f"{np.nanmin([*row.losses, math.inf]):.4g}",
                f"{row.loss:.4g}",
            ]
            for row in self
        ]
        return "Validation loss, the best last one first", head, rows, []

    def plot(self, path):
        """Draws validation loss by epoch and by setting into a file, with matplotlib.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If the ending of the path is of no known format.
        """
        tables.draw_sweep(self, path)


@arguments.refusing_foreign_keywords
def sweep(
    model: keras.Model,
    data: tuple,
    settings: Sequence | Mapping,
    validation_data: tuple | None = None,
    loss: object = None,
    optimizer: keras.optimizers.Optimizer | str = "adamw",
    epochs: int = 1,
    batch_size: int = 32,
    verbose: str | int = "auto",
) -> Sweep:
    """Trains one adapter for each setting in one fit, and compares them.

    The adapters are in one `AdapterBank` and get the same batches in the same order.
    Each trains as it would alone. The model is left unchanged.

    Args:
        model: A Keras model that is built and holds no adapter.
        data: (x, y) or (x, y, sample_weight), each a NumPy array or nested arrays.
        settings: A list of dicts, or a dict from names to dicts, of `learning_rate` and
            arguments of `apply_lora`.
        validation_data: Like `data`. The default is the last fifth of `data`.
        loss: As in `keras.Model.compile`. The default is the loss of the model, if it
            is compiled.
        optimizer: A Keras optimizer or its name; each setting gets a copy.
        epochs: Number of passes over the data.
        batch_size: Rows of a step for each setting. A step computes n times as many
            rows for n settings.
        verbose: As in `keras.Model.fit`.

    Returns:
        A sequence of rows, the best first, which prints as a table. `.adapter` is the
        best adapter, and `.plot(path)` draws the losses.

    Raises:
        ValueError: If a setting, the data or the loss does not fit. The model is left
            unchanged.

    Examples:
        >>> rates = [{"rank": 4, "learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)]
        >>> result = keras_lora.sweep(
        ...     base, (x, y), rates, loss="mse", validation_data=(x, y), verbose=0
        ... )
        >>> report = keras_lora.load_adapter(base, result.adapter)
    """
    sites.refuse_adapters(sites.Paths(model))
    settings = name_settings(settings)
    if loss is None:
        loss = getattr(model, "loss", None)
    if loss is None:
        raise ValueError("Give a `loss`: the model is not compiled with one.")
    data, validation_data = split_data(data, validation_data)
    optimizer = keras.optimizers.get(optimizer)
    copies, adapters = {}, {}
    for name, setting in settings.items():
        setting = dict(setting)
        copies[name] = optimizers.copy_unbuilt(optimizer)
        if "learning_rate" in setting:
            copies[name].learning_rate = setting.pop("learning_rate")
        adapters[name] = fresh_adapter(model, setting)
    bank = AdapterBank(model, adapters)
    try:
        bank.compile(copies, loss)
        batches = Batches(bank, [*settings], data, batch_size)
        validator = Validator(bank, [*settings], validation_data, batch_size)
        bank.fit(batches, epochs=epochs, callbacks=[validator], verbose=verbose)
        rows = [
            Setting(name, dict(setting), validator.losses[name])
            for name, setting in settings.items()
        ]
        return Sweep(rows, {name: bank.adapter(name) for name in settings})
    finally:
        bank.release()


def name_settings(settings) -> dict:
    if not isinstance(settings, (Mapping, list, tuple)) or not settings:
        raise ValueError(
            "`settings` must be a list of dicts, or a dict from names to dicts. "
            f"Received: {settings!r}."
        )
    values = settings.values() if isinstance(settings, Mapping) else settings
    for setting in values:
        if not isinstance(setting, Mapping) or "dry_run" in setting:
            raise ValueError(
                "A setting is a dict of `learning_rate` and arguments of apply_lora. "
                f"Received: {setting!r}."
            )
        arguments.refuse_foreign_keywords("A setting", setting, SETTING_KEYWORDS)
        validate_rate(setting.get("learning_rate", 0.0))
    if isinstance(settings, Mapping):
        return dict(settings)
    return {f"{number}": setting for number, setting in enumerate(settings, start=1)}


def validate_rate(rate):
    """Raises ValueError for a rate with which a Keras optimizer would fail.

    Schedules and other functions are allowed.
    """
    if callable(rate) or (is_number(rate) and math.isfinite(rate) and rate >= 0):
        return
    raise ValueError(
        "`learning_rate` must be a finite number >= 0 or a schedule. Received: "
        f"learning_rate={rate!r}."
    )


def fresh_adapter(model, settings) -> Adapter:
    """Returns the adapter that apply_lora would create; the model is not changed."""
    options = arguments.with_defaults(apply.apply_lora, model, **settings)
    with apply.apply_tentatively(**options):
        return save.adapter_of(model)
