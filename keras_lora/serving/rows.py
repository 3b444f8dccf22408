"""Which slots the rows of a call use, and how rows reach inner layers."""

import contextlib
import random
import threading

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import variable_state
from keras_lora.layers import torch_layout

# Kinds of leading axes of a layer's inputs: the batch's rows, each of them repeated
# in turn, or all of them repeated.
ROWS, REPEAT, TILE = "rows", "repeat", "tile"


class OneSlot:
    """All rows use one slot, which is a scalar variable."""

    def __init__(self, slot):
        self.slot = slot

    def for_layer(self, adapters, size):
        return self

    def bypass(self, form, inputs, a, b, training):
        a, b = (ops.take(stack, self.slot, axis=0) for stack in (a, b))
        if not form.looks_up:
            dtype = keras.backend.standardize_dtype(inputs.dtype)
            a, b = ops.cast(a, dtype), ops.cast(b, dtype)
        return form.bypass(inputs, a, b)

    def for_outputs(self, stack, ndim):
        """Returns the slot's value, in the shape in which it combines with outputs."""
        return ops.take(stack, self.slot, axis=0)


class RowByRow:
    """Row i uses slots[i]."""

    def __init__(self, slots):
        self.slots = slots

    def for_layer(self, adapters, size):
        """Returns the choice for a layer whose leading axis may be longer.

        Args:
            adapters: The layer's adapters.
            size: The size of its inputs' leading axis, a number or a tensor.
        """
        if adapters.leading is None:
            raise ValueError(
                f"The leading axis of {adapters.name!r} is not known yet. "
                "Call the bank once, with real inputs and outside other functions: "
                'bank({"inputs": ..., "adapter": ...}).'
            )
        rows = ops.shape(self.slots)[0]
        if adapters.leading == ROWS:
            refuse_other_row_count(size, rows, adapters.name)
            return self
        row, rows = ops.arange(size), ops.maximum(rows, 1)  # 0 in an empty batch
        if adapters.leading == REPEAT:
            times = ops.maximum(ops.floor_divide(size, rows), 1)
            row = ops.floor_divide(row, times)
        else:
            row = ops.mod(row, rows)
        return RowByRow(ops.take(self.slots, row))

    def bypass(self, form, inputs, a, b, training):
        return form.bypass_by_row(inputs, a, b, self.slots, training)

    def apply_dropout(self, inputs, rates, seed):
        """Applies dropout with the rate of each row's slot."""
        rates = ops.take(ops.cast(rates, inputs.dtype), self.slots)
        rates = ops.reshape(rates, (-1, *[1] * (len(inputs.shape) - 1)))
        drawn = keras.random.uniform(ops.shape(inputs), dtype="float32", seed=seed)
        kept = ops.cast(drawn >= ops.cast(rates, "float32"), inputs.dtype)
        return inputs * kept / (1 - rates)

    def for_outputs(self, stack, ndim):
        """Returns a row of the stack for each row of the outputs.

        A value starts with the outputs' first axis, of size 1, or has fewer axes.
        """
        value = ops.take(stack, self.slots, axis=0)
        shape = value.shape[1:]
        shape = ((1,) * (ndim - len(shape)) + tuple(shape))[1:]
        return ops.reshape(value, (-1, *shape))


def refuse_other_row_count(size, rows, name):
    """Raises unless the leading axis of a layer's inputs is as long as the ids."""
    message = (
        f"{name!r} got another number of rows than there are adapters. Give one name "
        "or id for each row of the batch."
    )
    if isinstance(size, int) and isinstance(rows, int):
        if size != rows:
            raise ValueError(f"{message} Received: {size} rows, {rows} adapters.")
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.debugging.assert_equal(size, rows, message)


class ThreadState(threading.local):
    """What one thread does with the layers of a bank.

    Attributes:
        slots: The slots of the rows in this call of the bank, or None outside.
        trainees: The adapters that train in this call; None if it does not train.
        seen: {adapters of a layer: its inputs, call by call} while they are recorded.
    """

    slots = trainees = seen = None


class SlotChoice(keras.layers.Layer):
    """Chooses which slots the layers of a bank use in this call.

    They are the slots of the ids inside a call of the bank, which are a value of the
    calling thread; else those of `bank.rows`; else `active`, one slot for all rows.
    """

    def __init__(self, count):
        super().__init__(dtype="float32", trainable=False)
        self.active = self.add_slots_variable((), "active")
        # For each slot the one that training uses: itself, or that of a trainee.
        self.slots_in_training = self.add_slots_variable((count,), "slots_in_training")
        self.slots_in_training.assign(ops.arange(count, dtype="int32"))
        self.seed = keras.random.SeedGenerator(random.randrange(2**31))
        self._rows_by_count = {}  # number of rows -> variable
        self.rows = None
        self.leading_axes_known = False  # of all layers in the bank
        self.thread = ThreadState()
        self.built = True

    def add_slots_variable(self, shape, name):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            dtype="int32",
            trainable=False,
            autocast=False,
        )

    def set_rows(self, count):
        """Sets the number of rows; None means one slot for all rows."""
        if count is not None and count not in self._rows_by_count:
            with variable_state.unlocked(self):
                self._rows_by_count[count] = self.add_slots_variable(
                    (count,), f"rows_{count}"
                )
        self.rows = None if count is None else self._rows_by_count[count]

    def current(self):
        slots = self.rows if self.thread.slots is None else self.thread.slots
        return OneSlot(self.active) if slots is None else RowByRow(slots)

    @property
    def is_inside(self):
        """Whether this thread is inside a call of the bank, or records inputs."""
        return self.thread.slots is not None or self.thread.seen is not None

    @contextlib.contextmanager
    def using(self, slots, trainees=None):
        """Context in which calls of this thread use slots, and train the trainees."""
        if trainees is not None:
            slots = ops.take(self.slots_in_training, slots)
        thread = self.thread
        before = thread.slots, thread.trainees
        thread.slots, thread.trainees = slots, trainees
        try:
            yield
        finally:
            thread.slots, thread.trainees = before


LEADING_AXES = (ROWS, REPEAT, TILE)
PROBE_ROWS = 3
OPEN_SIZES = (11, 64, 5)  # to try for axes that the model leaves open


def find_leading_axes(bank, samples, raising=False):
    """Finds the kind of each layer's leading axis, by runs of the model.

    Args:
        bank: A bank that has all its layers.
        samples: Inputs of three rows; the first ones that the model accepts are used.
        raising: Whether to raise if it does not accept inputs.

    Raises:
        ValueError: If a layer's leading axis is not made of the batch's rows.
    """
    choice = bank.choice

    def run(inputs):
        choice.thread.seen = seen = {}
        try:
            bank.model(inputs, training=False)
            return seen
        finally:
            choice.thread.seen = None

    for inputs in samples:
        try:
            kinds = leading_axes(run, inputs)
        except Exception:  # a model may reject made-up inputs with any error
            if raising:
                raise
            continue
        wrong = {x.name: kind for x, kind in kinds.items() if kind not in LEADING_AXES}
        if wrong:
            text = "; ".join(f"{name!r}: {kind}" for name, kind in wrong.items())
            raise ValueError(
                "The rows of a batch cannot be told apart at layers whose leading axis "
                f"is another: {text}. Leave them out of the adapters, or of `target`."
            )
        for adapters, kind in kinds.items():
            adapters.leading = kind
        choice.leading_axes_known = True
        return


def leading_axes(run, inputs) -> dict:
    """{adapters of a layer: ROWS, REPEAT, TILE, or a description of another kind}.

    Each row is changed in turn, to see which rows of a layer's inputs change with it.

    Args:
        run: A function of inputs that runs the model and returns what was `seen`.
        inputs: Nested arrays of three rows.
    """
    first = run(inputs)
    changed = [
        run(keras.tree.map_structure(lambda x, row=row: change_row(x, row), inputs))
        for row in range(PROBE_ROWS)
    ]
    axes = {}
    for adapters, calls in first.items():
        kinds = set()
        for number, values in enumerate(calls):
            others = [each.get(adapters, []) for each in changed]
            if any(len(other) != len(calls) for other in others):
                kinds.add("called on other rows as the data decide")
                continue
            kinds.add(order_of(values, [other[number] for other in others]))
        axes[adapters] = kinds.pop() if len(kinds) == 1 else " and ".join(sorted(kinds))
    return axes


def order_of(values, others):
    """Returns how the rows of a layer's inputs follow those of the batch.

    others: The same inputs when one row of the batch is changed, for each row.
    """
    size = len(values) if values.ndim else 0
    if any(other.shape != values.shape for other in others):
        return "of a size that the data decide"
    touched = [
        {at for at in range(size) if not np.array_equal(values[at], other[at])}
        for other in others
    ]
    if size == PROBE_ROWS:
        if all(at <= {row} for row, at in enumerate(touched)):
            return ROWS
    elif size % PROBE_ROWS == 0 and any(touched):
        times = size // PROBE_ROWS
        if all({x // times for x in at} <= {row} for row, at in enumerate(touched)):
            return REPEAT
        if all({x % PROBE_ROWS for x in at} <= {row} for row, at in enumerate(touched)):
            return TILE
    if not any(touched):
        return f"{size} in size whatever the batch is"
    return f"{size} in size for {PROBE_ROWS} rows, which mix in it"


def change_row(array, row):
    """Returns a copy with one row changed."""
    array = np.array(array)
    turned = np.flip(array[row])
    if array.dtype.kind == "f":
        turned = turned * 0.5 + 0.25
    elif turned.size == 1:
        turned = np.where(turned > 0, 0, 1)
    array[row] = turned
    return array


def probe_rows(array):
    """Returns three rows of a user's batch."""
    array = (
        torch_layout.to_numpy(array)
        if keras.ops.is_tensor(array)
        else np.asarray(array)
    )
    return array[np.arange(PROBE_ROWS) % len(array)]


def specs_in(model):
    """The specs of a model's inputs; None for a subclassed model, which has none."""
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError):
        return None


def sample_inputs(model):
    """Yields three rows of inputs, for each size to try for open axes."""
    specs = specs_in(model)
    for size in OPEN_SIZES if specs is not None else ():
        random = np.random.default_rng(0)
        yield keras.tree.map_structure(
            lambda spec, size=size, random=random: sample_input(spec, size, random),
            specs,
        )


def sample_input(spec, size, random):
    shape = [PROBE_ROWS, *(axis or size for axis in spec.shape[1:])]
    if "mask" in spec.name:
        return np.ones(shape, spec.dtype)
    if "float" in str(spec.dtype):
        return random.uniform(-1, 1, shape).astype("float32")
    return random.integers(0, 2, shape).astype(spec.dtype)
