"""Calls of a bank's model that do not go through the bank: which adapters they use."""

import contextlib
import functools
from collections.abc import Sequence

from keras_lora.keras_internals import calls, compiled, layer_state
from keras_lora.serving.banked import Banked
from keras_lora.serving.calls import Calls, emptied_by

TRAINING = ("fit", "train_on_batch")
COUNTED = ("call", "generate", *compiled.LOOPS)


class OutsideCalls(Calls):
    """Mixin of the bank: adapters for calls of the model itself."""

    _row_names: Sequence | None

    def activate(self, name: str | None):
        """Selects the adapter that direct calls of the model use; None: the base model.

        It applies to all threads. Running calls keep the adapter that they began with,
        and later calls wait until those have ended. Calls of the bank use their ids.

        Raises:
            ValueError: If the name is not known, or inside a call of the model.
        """
        self.running.begin_change("bank.activate", disturbed)
        with self.running.lock:
            self._active = self.id_table.validate_name(name)
            self.running.write_active_soon()

    @contextlib.contextmanager
    def rows(self, names: Sequence):
        """Makes row i of each batch in calls of the model itself use names[i].

        This context is for calls whose inputs cannot be changed, such as `generate`.
        Functions that Keras has compiled for the same number of rows are used again
        for other names; your own tf.function has to be traced inside the context.

        Raises:
            ValueError: If a name is not known, a batch has another size
                (InvalidArgumentError inside a compiled call), or inside a call of the
                model.
        """
        self.running.begin_change("bank.rows", disturbed)
        with self.running.lock:
            names = self.id_table.validate_names(names)
            if self._row_names is not None:
                raise ValueError("The bank is already inside `rows`.")
            self._row_names = names
            self.running.write_active_soon()
        try:
            yield self
        finally:
            with self.running.lock:
                self._row_names = None
                self.running.write_active_soon()

    def _write_active(self):
        """Writes the slots of the active adapter and of the rows into the variables."""
        slot_of, names = self.id_table.slot_of, self._row_names
        count = None if names is None else len(names)
        if count != self._compiled.count:
            self.choice.set_rows(count)
            self._compiled.change_to(count)
        self.choice.active.assign(slot_of[self._active])
        slots = [slot_of[self._active]]
        if names is not None:
            slots = [slot_of.get(name, self.id_table.no_slot) for name in names]
            self.choice.rows.assign(slots)
        self._slots_outside = slots

    def _count_outside_calls(self):
        """Counts calls of the model, of models around it, and of their parts."""
        for layer in compiled.models_sharing_layers(self.model):
            inside = any(
                isinstance(part, Banked) for part in layer_state.flatten_layers(layer)
            )
            if inside and layer is not self and not isinstance(layer, Banked):
                self._count_calls_of(layer)
        for layer in self.hosts.layers.values():
            layer.lora.around_call = self._around_call

    def _count_calls_of(self, layer):
        if layer not in self.counted_layers:
            self.counted_layers.add(layer)
            for name in COUNTED:
                if hasattr(layer, name):
                    vars(layer)[name] = self._count(layer, name)

    def _around_call(self, layer, inputs):
        """Returns a context for a call of a layer in the bank."""
        if self.choice.is_inside or self.running.own_calls:
            return contextlib.nullcontext()
        if (outermost := calls.outermost_layer()) not in (layer, None):
            self._count_calls_of(outermost)  # a model that was made later
        if calls.in_a_trace(inputs):
            return contextlib.nullcontext()
        return self._outside_call()

    def _outside_call(self, emptied=None):
        choose = lambda: (None, self._slots_outside)  # noqa: E731
        return self.running.call(choose, outside=True, emptied=emptied)

    def _count(self, layer, name):
        method, emptied = getattr(layer, name), emptied_by(name, layer)

        @functools.wraps(method)
        def run(*args, **kwargs):
            inside = self.choice.is_inside or (
                name == "call" and self.running.own_calls
            )
            if inside or calls.in_a_trace((args, kwargs)):
                return method(*args, **kwargs)
            if name in TRAINING:
                raise ValueError(
                    f"{layer.name!r} holds the adapters of an AdapterBank, which train "
                    "only in `bank.fit`."
                )
            with self._outside_call(emptied):
                return method(*args, **kwargs)

        return run

    def _stop_counting(self):
        for layer in self.counted_layers:
            for name in COUNTED:
                vars(layer).pop(name, None)
        self.counted_layers.clear()


def disturbed(call):
    return call.outside or call.exclusive


class CompiledFunctions:
    """Keeps the compiled functions of a model for each number of rows.

    Also those of all models that share layers with it.
    """

    def __init__(self, model):
        self.model, self.kept, self.count = model, {}, None

    def change_to(self, count):
        """Puts back the functions for a number of rows; keeps the present ones."""
        self.kept[self.count] = compiled.take_compiled_functions(
            compiled.models_sharing_layers(self.model)
        )
        self.count = count
        for owner, name, function in self.kept.pop(count, []):
            setattr(owner, name, function)
