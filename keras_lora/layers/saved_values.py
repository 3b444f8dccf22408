"""Values of a layer in files: factors as in PEFT, and weights that trained."""

import contextlib
import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import distribution
from keras_lora.layers import torch_layout
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.settings import Settings
from keras_lora.layers.torch_layout import MethodFiles

HELD = "_lora_held"


@dataclasses.dataclass
class Held:
    """The trained value of a variable, and how many contexts have replaced it."""

    trained: Any
    contexts: int = 1


@contextlib.contextmanager
def temporary_values(pairs, lock):
    """Gives variables other values inside the context.

    pairs: [(variable, its value inside)]. lock: taken at the beginning and end.
    """
    held = []
    try:
        with lock:
            for variable, value in pairs:
                hold(variable, value)
                held.append(variable)
        yield
    finally:
        with lock:
            for variable in held:
                release(variable)


def hold(variable, value):
    if HELD in vars(variable):
        vars(variable)[HELD].contexts += 1
    else:
        vars(variable)[HELD] = Held(ops.copy(variable))
        distribution.assign(variable, value)


def release(variable):
    held = vars(variable)[HELD]
    held.contexts -= 1
    if not held.contexts:
        del vars(variable)[HELD]
        variable.assign(held.trained)


def is_held_once(variable) -> bool:
    return vars(variable)[HELD].contexts == 1


def trained_value(variable):
    """The value to save: the trained one, while a context holds another."""
    held = getattr(variable, HELD, None)
    return variable if held is None else held.trained


class TrainedValues:
    """Wraps a store of Keras so that it saves trained values instead of variables."""

    def __init__(self, store):
        self.store = store

    def __setitem__(self, key, value):
        self.store[key] = trained_value(value)

    def __getattr__(self, name):
        return getattr(self.store, name)


class AdapterFiles(MethodFiles):
    """Mixin of the adapter: its configuration and its files."""

    settings: Settings
    dropout: float
    a_initializer: keras.initializers.Initializer | None
    b_initializer: keras.initializers.Initializer | None
    form: LowRankForm
    has_start: bool
    a: keras.Variable
    b: keras.Variable
    a_start: keras.Variable
    b_start: keras.Variable

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # Without alpha the tensors cannot be interpreted. With the seed's state, the
        # next dropout masks are those of a run without a stop.
        store["alpha"] = self.alpha
        store["use_rslora"] = self.use_rslora
        if self.seed_generator is not None:
            store["seed"] = self.seed_generator.state

    def load_own_variables(self, store):
        values = {key: store[key] for key in store.keys()}  # noqa: SIM118
        if not values:
            raise ValueError(
                f"The file has no A and B for {self.path!r}: it was saved from a plain "
                "layer, for example after merge_lora or remove_lora, but the model "
                "that loads it has a LoRA layer there. Build the model, call "
                "merge_lora on it too, and load the file with load_weights."
            )
        if "alpha" in values:
            alpha = values.pop("alpha")[()]
            self.set_alpha(alpha, values.pop("use_rslora")[()])
        seed = values.pop("seed", None)
        if seed is not None and self.seed_generator is not None:
            self.seed_generator.state.assign(seed)
        super().load_own_variables(values)

    def options(self) -> dict:
        """Returns the constructor's arguments, for the host's config."""
        options = {
            "rank": self.settings.rank,
            "alpha": self.settings.alpha,
            "dropout": self.dropout,
            "use_rslora": self.settings.use_rslora,
            "a_initializer": keras.initializers.serialize(self.a_initializer),
            "b_initializer": keras.initializers.serialize(self.b_initializer),
        }
        if self.has_start:
            options["frozen_start"] = True
        return options | ({self.keyword: True} if self.keyword else {})

    @classmethod
    def of_plain_layer(cls, weight) -> dict:
        """Suffix -> array for a slice without an adapter in a module with adapters.

        weight: (outputs, inputs), as NumPy. For methods that have `more_suffixes`.
        """
        raise ValueError(
            f"{cls.__name__} needs an adapter on all slices of a module. Adapt them."
        )

    @property
    def file_rank(self) -> int:
        """The rank that a file's arrays have: G * r for a merged dense layer."""
        return self.form.file_rank or self.product_rank  # type: ignore[attr-defined]

    def to_file(self, suffixes) -> dict:
        """Suffix -> array, as a file has the factors; suffixes: the host's for A, B.

        With a start two pairs of factors lie side by side.
        """
        a, b = torch_layout.to_numpy(self.a), torch_layout.to_numpy(self.b)
        pairs = [(a, b)]
        if self.has_start:
            a_start = torch_layout.to_numpy(self.a_start)
            b_start = torch_layout.to_numpy(self.b_start)
            pairs = [(a - a_start, b), (a_start, b - b_start)]
        arrays = zip(*(self.form.to_file(*pair) for pair in pairs), strict=True)
        axes = self.form.rank_axes_in_file
        return {
            suffix: np.ascontiguousarray(
                np.concatenate(parts, axis) if self.has_start else parts[0]
            )
            for suffix, axis, parts in zip(suffixes, axes, arrays, strict=True)
        }

    def from_file(self, arrays, suffixes) -> dict:
        """Name of a factor -> array, from a file's. Shapes were compared before."""
        pair = [arrays[suffix] for suffix in suffixes]
        if not self.has_start:
            return dict(zip(("a", "b"), self.form.read_file(*pair), strict=True))
        axes = self.form.rank_axes_in_file
        halves = [np.split(x, 2, axis) for x, axis in zip(pair, axes, strict=True)]
        (a_change, b), (a_start, b_change) = (
            self.form.read_file(*half) for half in zip(*halves, strict=True)
        )
        return {
            "a": a_start + a_change,
            "b": b,
            "a_start": a_start,
            "b_start": b - b_change,
        }

    def get_config(self):
        options = self.options()
        options.pop(self.keyword, None)
        return {**super().get_config(), **options}
