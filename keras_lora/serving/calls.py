"""The calls of a bank, and how calls and changes wait for each other."""

import collections
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import calls, compiled, distribution
from keras_lora.serving import export, id_table, rows
from keras_lora.serving.banked import Hosts
from keras_lora.serving.id_table import SLOTS, FixedIds, IdTable
from keras_lora.serving.rows import SlotChoice

PATIENCE = 60.0  # seconds that a change waits for running calls


def emptied_by(method, model):
    """Returns the model if a method of it empties its variables while it runs."""
    loops = compiled.LOOPS if keras.backend.backend() == "jax" else ()
    return model if method in loops else None


@dataclasses.dataclass(eq=False)
class Call:
    """A call, or a change of the bank.

    Attributes:
        outside: Whether it uses the active adapter, or `rows`.
        exclusive: Whether no other call or change can run at the same time.
        slots: The slots that it may read.
    """

    outside: bool = False
    exclusive: bool = False
    slots: frozenset = frozenset()


class RunningCalls:
    """Counts running calls; changes wait for calls that they would disturb.

    A slot is written only when no call reads it. The variables that outside calls read
    change only when no such call runs, and calls that begin later wait for the change.
    A call inside another call of its thread never waits.

    Args:
        write_active: A function that writes the active adapter into the variables.
        barrier: A function that raises unless all processes call, before each change.
    """

    def __init__(self, write_active, barrier):
        self.write_active, self.barrier = write_active, barrier
        self.is_write_due = False
        self.lock = threading.Condition(threading.RLock())
        self.calls = {}  # thread -> its calls, the outermost first
        self.reads = collections.Counter()  # slot -> how many calls read it
        self.queue, self.changes = [], 0  # waiting calls; number of running changes

    @property
    def own_calls(self) -> list:
        """The calls that the current thread is in."""
        return self.calls.get(threading.get_ident(), [])

    def other_calls(self) -> list:
        me = threading.get_ident()
        other_calls = (calls for thread, calls in self.calls.items() if thread != me)
        return list(itertools.chain(*other_calls))

    # Calls.

    @contextlib.contextmanager
    def call(self, choose, outside=False, emptied=None):
        """Context of a call.

        Args:
            choose: A function that returns what the context yields, and the slots that
                the call reads.
            outside: As in `Call`.
            emptied: The model whose variables it empties, which excludes other calls.
        """
        call = Call(outside, exclusive=emptied is not None)
        with self.lock:
            if not self.own_calls:
                self._wait_for_turn(call)
            chosen, slots = choose()
            call.slots = frozenset(slots)
            self.reads.update(call.slots)
            self.calls.setdefault(threading.get_ident(), []).append(call)
        try:
            with calls.keeping_weights(emptied):
                yield chosen
        finally:
            with self.lock:
                self.reads.subtract(call.slots)
                self.own_calls.remove(call)
                if not self.own_calls:
                    del self.calls[threading.get_ident()]
                if self.is_write_due:
                    self.write_active_soon()
                self.lock.notify_all()

    def _wait_for_turn(self, call, patience=None):
        """Waits for earlier calls that cannot run at the same time.

        Returns whether they ended in time; without a limit, they always do.
        """
        self.queue.append(call)
        try:
            return self.lock.wait_for(lambda: self._has_turn(call), patience)
        finally:
            self.queue.remove(call)
            self.lock.notify_all()

    def _has_turn(self, call):
        before = self.queue[: self.queue.index(call)]
        if call.exclusive:
            return not (self.calls or self.changes or before)
        if call.outside and self.is_write_due:
            return False
        return not any(other.exclusive for other in [*before, *self.other_calls()])

    # Changes.

    def write_active_soon(self):
        """Writes the active adapter as soon as no call reads its slot."""
        with self.lock:
            other_calls = self.other_calls()
            self.is_write_due = any(c.outside for c in [*other_calls, *self.own_calls])
            self.is_write_due |= any(c.exclusive for c in other_calls)
            if not self.is_write_due:
                self.write_active()

    @contextlib.contextmanager
    def writing(self, what):
        """Context of a change, during which no call on JAX empties the variables."""
        self.begin_change(what, lambda call: call.exclusive)
        with self.lock:
            if not self._wait_for_turn(Call(), PATIENCE):
                raise ValueError(timeout_message(what))
            self.changes += 1
        try:
            yield
        finally:
            with self.lock:
                self.changes -= 1
                self.lock.notify_all()

    def begin_change(self, what, test):
        """Raises if the change is made inside a call that `test` is true for.

        Then waits until all processes make the change, and raises unless they do.
        """
        if any(map(test, self.own_calls)):
            raise ValueError(
                f"{what} is not possible inside a call of the same model, for example "
                "in a callback of its `predict`: the call keeps the adapters that it "
                "began with. Nothing was changed. Do it before or after."
            )
        self.barrier()

    def wait(self, what, test):
        """Waits until test() is true; raises if calls do not end in time."""
        if any(call.slots for call in self.own_calls) and not test():
            raise ValueError(
                f"{what} has to wait for running calls, but was called inside one of "
                "them. Nothing was changed. Do it after that call."
            )
        if not self.lock.wait_for(test, PATIENCE):
            raise ValueError(timeout_message(what))


def timeout_message(what):
    return (
        f"{what} has waited {PATIENCE:g} s for calls that began before it and are "
        "still running. Nothing was changed. Try again when they have ended."
    )


INPUTS = {"inputs", "adapter"}, {"inputs", SLOTS}


class Calls:
    """Mixin of the bank: its calls.

    A call, and all batches of a `predict` or `evaluate`, keep the adapters that the ids
    meant when it began.
    """

    model: keras.Model
    id_table: IdTable
    choice: SlotChoice
    hosts: Hosts
    running: RunningCalls

    def ids(self, names: Sequence) -> np.ndarray:
        """Returns one id per name, for the rows of a batch; None means the base model.

        Raises:
            ValueError: If a name is not known.
        """
        names = self.id_table.validate_names(names)
        return np.array([self.id_table.id_of[name] for name in names], "int32")

    def __call__(self, inputs, *args, **kwargs):
        id_table.refuse_names(inputs)
        self._refuse_released()
        if calls.in_a_trace(inputs):
            return super().__call__(inputs, *args, **kwargs)
        with self._reading(inputs) as inputs:
            return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs, training=False):
        if not isinstance(inputs, Mapping) or set(inputs) not in INPUTS:
            raise ValueError(unlike_inputs(inputs))
        if SLOTS in inputs:
            slots = inputs[SLOTS]
        else:
            ids = ops.convert_to_tensor(inputs["adapter"])
            if distribution.in_cross_replica_context():
                # Keras infers shapes here, from what the replicas get.
                ids = ops.cast(ids, "int32")
            id_table.refuse_other_ids(ids)
            slots = self.id_table.slots(ids)
        self._find_leading_axes(inputs["inputs"])
        trainees = self.trainees.members if training and self.trainees else None
        with self.choice.using(slots, trainees):
            return self.model(inputs["inputs"], training=training)

    def compute_output_spec(self, inputs, training=False):
        return self.model.compute_output_spec(inputs["inputs"], training=training)

    def _find_leading_axes(self, inputs):
        if not self.choice.leading_axes_known:
            try:
                inputs = keras.tree.map_structure(rows.probe_rows, inputs)
            except Exception:  # a symbolic value, inside a traced function
                return
            rows.find_leading_axes(self, [inputs], raising=True)
            if self.hosts.input_specs is None:
                self.hosts.input_specs = export.specs_of(inputs)

    def _refuse_released(self):
        if not self.hosts.layers:
            raise ValueError(f"{self.name!r} was released.")

    @contextlib.contextmanager
    def _reading(self, x, method="call"):
        """Context of a call of the bank; yields x with slots instead of ids.

        The slots keep their adapters inside the context.
        """
        id_table.refuse_names(x)
        self._refuse_released()
        one = isinstance(x, Mapping) or method not in ("predict", "evaluate")
        if one and not (isinstance(x, Mapping) and set(x) in INPUTS):
            raise ValueError(unlike_inputs(x))
        ids = id_table.validate_ids(x["adapter"]) if one and "adapter" in x else None
        if ids is not None and method != "call":
            # Before: on JAX the model has no values during Keras's loops.
            self._find_leading_axes(x["inputs"])

        def choose():
            fixed = FixedIds(self.id_table.values(), self.id_table.no_slot)
            if ids is not None:
                return fixed.inputs(x), fixed.slots(ids).tolist()
            return (x if one else fixed.batches(x)), self.id_table.slot_of.values()

        with self.running.call(choose, emptied=emptied_by(method, self)) as fixed:
            yield fixed

    def evaluate(self, x=None, *args, **kwargs):
        """Evaluates as `keras.Model.evaluate`; x as in `predict`."""
        with self._reading(x, "evaluate") as x:
            return super().evaluate(x, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        """Predicts as `keras.Model.predict`, with an adapter for each row.

        Args:
            x: {"inputs": what the model takes, "adapter": ids}, where `ids` has one
                whole number for each row, as the method `ids` gives them.
            *args: Of `keras.Model.predict`.
            **kwargs: Likewise.

        Returns:
            What the model returns. A row whose id means no adapter is NaN.
        """
        with self._reading(x, "predict") as x:
            return super().predict(x, *args, **kwargs)

    def predict_on_batch(self, x):
        with self._reading(x, "predict_on_batch") as x:
            return super().predict_on_batch(x)

    def test_on_batch(self, x, *args, **kwargs):
        with self._reading(x, "test_on_batch") as x:
            return super().test_on_batch(x, *args, **kwargs)


def unlike_inputs(inputs):
    if isinstance(inputs, dict):
        received = f"a dict with the keys {list(inputs)}"
    else:
        received = f"{inputs!r}"[:300]
    expected = '{"inputs": ..., "adapter": ids}'
    return f"A bank is called with {expected}. Received: {received}."
