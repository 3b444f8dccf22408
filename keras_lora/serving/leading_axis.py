"""How the leading axis of a layer's inputs is made of the rows of the batch.

It is found by running the base model on three rows, of which one is changed at a time,
and never guessed.
"""

import keras
import numpy as np

from keras_lora.layers.torch_layout import to_numpy
from keras_lora.serving.rows import REPEAT
from keras_lora.serving.rows import ROWS
from keras_lora.serving.rows import TILE

KNOWN = (ROWS, REPEAT, TILE)
COUNT = 3
OPEN_SIZES = (11, 64, 5)  # of axes that are left open, the first that the model takes


class Probe:
    """Sees the inputs of all banked layers in one run of the model."""

    def __init__(self):
        self.seen = {}  # adapters of a layer -> its inputs, call by call

    def record(self, adapters, inputs):
        self.seen.setdefault(adapters, []).append(to_numpy(inputs))


def find_leading_axes(bank, samples, raising=False):
    """Tells the banked layers of a bank what their leading axis is.

    Args:
        bank: The bank, of which all layers are there.
        samples: Inputs of three rows; the first that the model takes are used.
        raising: Whether inputs that it does not take are an error.

    Raises:
        ValueError: If a layer's leading axis is not made of the batch's rows.
    """
    choice = bank.choice

    def run(inputs):
        choice.probe = Probe()
        try:
            bank.model(inputs, training=False)
            return choice.probe.seen
        finally:
            choice.probe = None

    for inputs in samples:
        try:
            found = leading_axes(run, inputs)
        except Exception:  # whatever a model has to say of numbers that were made up
            if raising:
                raise
            continue
        wrong = {x.name: kind for x, kind in found.items() if kind not in KNOWN}
        if wrong:
            listed = "; ".join(f"{name!r}: {kind}" for name, kind in wrong.items())
            raise ValueError(
                "The rows of a batch cannot be told apart at layers whose leading axis "
                f"is another: {listed}. Leave them out of the adapters, or of `target`."
            )
        for adapters, kind in found.items():
            adapters.leading = kind
        choice.all_known = True
        return


def leading_axes(run, inputs) -> dict:
    """{adapters of a layer: ROWS, REPEAT, TILE, or a word on what it is}.

    Args:
        run: A function of inputs that runs the model and returns a `Probe`'s `seen`.
        inputs: Nested arrays of three rows.
    """
    first = run(inputs)
    changed = [
        run(keras.tree.map_structure(lambda x, row=row: with_other_row(x, row), inputs))
        for row in range(COUNT)
    ]
    found = {}
    for adapters, calls in first.items():
        kinds = set()
        for number, values in enumerate(calls):
            others = [each.get(adapters, []) for each in changed]
            if any(len(other) != len(calls) for other in others):
                kinds.add("called on other rows as the data decide")
                continue
            kinds.add(order_of(values, [other[number] for other in others]))
        found[adapters] = (
            kinds.pop() if len(kinds) == 1 else " and ".join(sorted(kinds))
        )
    return found


def order_of(values, others):
    """Of one call's inputs, and the same after each of the rows was changed."""
    size = len(values) if values.ndim else 0
    if any(other.shape != values.shape for other in others):
        return "of a size that the data decide"
    touched = [
        {at for at in range(size) if not np.array_equal(values[at], other[at])}
        for other in others
    ]
    if size == COUNT:
        if all(at <= {row} for row, at in enumerate(touched)):
            return ROWS
    elif size % COUNT == 0 and any(touched):
        times = size // COUNT
        if all({x // times for x in at} <= {row} for row, at in enumerate(touched)):
            return REPEAT
        if all({x % COUNT for x in at} <= {row} for row, at in enumerate(touched)):
            return TILE
    if not any(touched):
        return f"{size} in size whatever the batch is"
    return f"{size} in size for {COUNT} rows, which mix in it"


def with_other_row(array, row):
    """Returns a copy with one row changed."""
    array = np.array(array)
    turned = np.flip(array[row])
    if array.dtype.kind == "f":
        turned = turned * 0.5 + 0.25
    elif turned.size == 1:
        turned = np.where(turned > 0, 0, 1)
    array[row] = turned
    return array


def as_rows(array):
    """Returns three rows of a user's batch."""
    array = to_numpy(array) if keras.ops.is_tensor(array) else np.asarray(array)
    return array[np.arange(COUNT) % len(array)]


def specs_in(model):
    """The specs of a model's inputs; None for a subclassed model, which has none."""
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError):
        return None


def made_inputs(model):
    """Three rows that fit a model's inputs, for each guess of what they leave open."""
    specs = specs_in(model)
    for size in OPEN_SIZES if specs is not None else ():
        random = np.random.default_rng(0)
        yield keras.tree.map_structure(
            lambda spec, size=size, random=random: made(spec, size, random), specs
        )


def made(spec, size, random):
    shape = [COUNT, *(axis or size for axis in spec.shape[1:])]
    if "mask" in spec.name:
        return np.ones(shape, spec.dtype)
    if "float" in str(spec.dtype):
        return random.uniform(-1, 1, shape).astype("float32")
    return random.integers(0, 2, shape).astype(spec.dtype)
