"""The calls of a bank that run now: nobody writes what they read."""

import collections
import contextlib
import dataclasses
import threading

import keras

PATIENCE = 60.0  # seconds that a change of the bank waits for calls to end

# Keras's loops on JAX take the values out of the variables, and put them back.
LOOPS = (
    "predict",
    "predict_on_batch",
    "evaluate",
    "test_on_batch",
    "fit",
    "train_on_batch",
)


def needs_all(method):
    """Whether a model's variables have no values for others while a method runs."""
    return keras.backend.backend() == "jax" and method in LOOPS


@dataclasses.dataclass(eq=False)
class Call:
    """A call, or a change of the bank.

    Attributes:
        outside: Whether it reads what is active, and `rows`.
        alone: Whether no other call can run, and no change be made, meanwhile.
        slots: Those that it may read.
    """

    outside: bool = False
    alone: bool = False
    slots: frozenset = frozenset()


class Running:
    """Counts calls, and lets changes wait for those that they would disturb.

    A slot is written only when no call reads it. What is active for calls from
    outside, a variable, changes only when none of these calls runs; those that begin
    later wait for that. A call inside another one of its thread never waits.

    Args:
        point: A function that writes what is active into the variables.
    """

    def __init__(self, point):
        self.point, self.to_point = point, False
        self.changed = threading.Condition(threading.RLock())
        self.calls = {}  # thread -> its calls, the outermost first
        self.reads = collections.Counter()  # slot -> how many calls read it
        self.queue, self.changes = [], 0  # what waits to begin; changes that run

    @property
    def own(self) -> list:
        """The calls that the current thread is inside of."""
        return self.calls.get(threading.get_ident(), [])

    def others(self) -> list:
        me = threading.get_ident()
        return [c for thread, own in self.calls.items() if thread != me for c in own]

    # Calls.

    @contextlib.contextmanager
    def call(self, choose, outside=False, alone=False):
        """A call; choose() gives what is yielded and the slots that it may read."""
        call = Call(outside, alone)
        with self.changed:
            if not self.own:
                self._wait_for_turn(call)
            chosen, slots = choose()
            call.slots = frozenset(slots)
            self.reads.update(call.slots)
            self.calls.setdefault(threading.get_ident(), []).append(call)
        try:
            yield chosen
        finally:
            with self.changed:
                self.reads.subtract(call.slots)
                self.own.remove(call)
                if not self.own:
                    del self.calls[threading.get_ident()]
                if self.to_point:
                    self.point_soon()
                self.changed.notify_all()

    def _wait_for_turn(self, call, patience=None):
        """In the order in which they came, where they cannot run together."""
        self.queue.append(call)
        try:
            return self.changed.wait_for(lambda: self._has_turn(call), patience)
        finally:
            self.queue.remove(call)
            self.changed.notify_all()

    def _has_turn(self, call):
        before = self.queue[: self.queue.index(call)]
        if call.alone:
            return not (self.calls or self.changes or before)
        if call.outside and self.to_point:
            return False
        return not any(other.alone for other in [*before, *self.others()])

    # Changes.

    def point_soon(self):
        """What is active is written as soon as no call reads it."""
        with self.changed:
            others = self.others()
            self.to_point = any(c.outside for c in [*others, *self.own])
            self.to_point |= any(c.alone for c in others)
            if not self.to_point:
                self.point()

    @contextlib.contextmanager
    def writing(self, what):
        """A change of variables, which no call on JAX has emptied meanwhile."""
        self.refuse_inside(what, lambda call: call.alone)
        with self.changed:
            if not self._wait_for_turn(Call(), PATIENCE):
                raise ValueError(impatient(what))
            self.changes += 1
        try:
            yield
        finally:
            with self.changed:
                self.changes -= 1
                self.changed.notify_all()

    def refuse_inside(self, what, test):
        """An error where the change comes from inside such a call: a callback, say."""
        if any(map(test, self.own)):
            raise ValueError(
                f"{what} is not possible from inside a call of the same model, a "
                "callback of its `predict` for example: the call keeps the adapters "
                "that it began with. Nothing was changed. Do it before or after."
            )

    def wait(self, what, test):
        """Waits for calls of other threads, and not for ever."""
        if any(call.slots for call in self.own) and not test():
            raise ValueError(
                f"{what} has to wait for calls that run, and comes from inside one of "
                "them. Nothing was changed. Do it after that call."
            )
        if not self.changed.wait_for(test, PATIENCE):
            raise ValueError(impatient(what))


def impatient(what):
    return (
        f"{what} has waited {PATIENCE:g} s for calls that began before it, and they "
        "still run. Nothing was changed. Try again when they have ended."
    )
