"""Compiled functions of a model in a bank, for each number of rows."""

from keras_lora.keras_internals.tracing import holders
from keras_lora.keras_internals.tracing import take_compiled_functions


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
