"""Which adapters are used by calls of a banked model that do not go by the bank."""

import contextlib

from keras_lora.keras_internals.compiled import take_compiled_functions
from keras_lora.keras_internals.models_around import holders
from keras_lora.serving.directory import Directory


class OutsideCalls:
    """Mixin of the bank: one adapter for all rows, or names for rows, from outside."""

    directory: Directory
    _changes: contextlib.AbstractContextManager

    def activate(self, name: str | None):
        """One adapter for all rows of what calls the model itself, until None.

        It is the model's, not a thread's. The bank's own calls go by their ids.
        """
        with self._changes:
            self._active = self.directory.checked(name)
            self._point()

    @contextlib.contextmanager
    def rows(self, names):
        """Inside, row i of each batch that the model itself gets uses names[i].

        For calls whose inputs cannot be changed, such as `generate`. Functions that
        were compiled for as many rows serve other names too; those that Keras does
        not know of, a user's own tf.function, must be traced inside.

        Raises:
            ValueError: If a name is not known, or a batch has another size
                (InvalidArgumentError inside a compiled call).
        """
        names = self.directory.known(names)
        with self._changes:
            if self._row_names is not None:
                raise ValueError("The bank is inside of `rows` already.")
            self._row_names = names
            self.choice.set_rows(len(names))
            self._point()
            self._compiled.change_to(len(names))
        try:
            yield self
        finally:
            with self._changes:
                self._row_names = None
                self.choice.set_rows(None)
                self._compiled.change_to(None)

    def _point(self):
        """What is active, and the rows, are at the slots that their names have now."""
        slot_of = self.directory.slot_of
        self.choice.active.assign(slot_of[self._active])
        if self._row_names is not None:
            no_slot = self.directory.no_slot
            slots = [slot_of.get(name, no_slot) for name in self._row_names]
            self.choice.rows.assign(slots)


class CompiledFunctions:
    """Those of a model and of all that hold its layers, for each number of `rows`."""

    def __init__(self, model):
        self.model, self.kept, self.count = model, {}, None

    def change_to(self, count):
        """Those for a number of rows take the place of those that are there."""
        self.kept[self.count] = take_compiled_functions(holders(self.model))
        self.count = count
        for owner, name, function in self.kept.pop(count, []):
            setattr(owner, name, function)
