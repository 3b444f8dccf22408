"""The layers of a bank: what room each has, and what an adapter writes into it."""

import numpy as np
from keras import ops

from keras_lora.layers.torch_layout import to_numpy
from keras_lora.serving.banked import BankAdapters
from keras_lora.serving.banked import bank_layer
from keras_lora.serving.banked import unbank_layer
from keras_lora.serving.reading import as_host
from keras_lora.serving.slots import Slots


class Hosts:
    """The layers of a model, and those among them that hold the bank's adapters.

    Attributes:
        paths: Path -> layer, all.
        layers: Path -> layer, those.
        input_specs: Shapes and dtypes of the model's inputs; None: not known yet.
    """

    def __init__(self, paths, choice, count):
        self.paths, self.choice, self.count = paths, choice, count
        self.layers, self.input_specs = {}, None

    def take(self, path, layer, rank, with_gain):
        """The layer holds the bank's adapters from now on."""
        host = as_host(layer)
        form = host.low_rank_form(rank)
        bias = getattr(layer, "bias", None)
        bias_shape = gain_shape = None
        if bias is not None:
            bias_shape = laid_out(host.over_outputs, np.zeros(bias.shape)).shape
        if with_gain:
            gain_shape = laid_out(
                form.over_outputs, np.ones(outputs_of(host, form))
            ).shape
        dtype = layer.variable_dtype
        slots = Slots(self.count, rank, form, bias_shape, gain_shape, dtype)
        bank_layer(layer, BankAdapters(self.choice, form, slots, path))
        self.layers[path] = layer
        # Its functions know the layer that it is now.
        layer.lora.form = layer.low_rank_form(rank)
        return slots

    def release(self):
        for layer in self.layers.values():
            unbank_layer(layer)
        self.layers = {}

    def prepared(self, parts) -> dict:
        """{path: what `Slots.write` takes} of an adapter; a ValueError without room."""
        no_room, prepared = {}, {}
        for path, part in parts.items():
            layer = self.layers.get(path)
            if layer is None:
                no_room[path] = "the layer is none of the bank's"
                continue
            slots = layer.lora.slots
            if part.rank > slots.rank:
                no_room[path] = f"rank {part.rank}, there is room for {slots.rank}"
            elif part.has_gain and slots.gain is None:
                no_room[path] = "DoRA's lengths"
            else:
                rows = part.rows(layer.form, layer.over_outputs)
                prepared[path] = {name: to_numpy(x) for name, x in rows.items()}
        if no_room:
            reasons = "; ".join(f"{path!r}: {why}" for path, why in no_room.items())
            raise ValueError(
                f"The bank has no room for this adapter at {reasons}. Make the bank "
                "with this adapter, or with `target` and `max_rank` that include it."
            )
        return prepared

    def write(self, slot, prepared):
        """Writes one adapter; layers that it leaves out get the base model's."""
        for path, layer in self.layers.items():
            layer.lora.slots.write(slot, **prepared.get(path, {}))


def outputs_of(host, form):
    """The shape of the kernel's axes that are not summed over."""
    return [
        n for axis, n in enumerate(host.kernel_shape) if axis not in form.input_axes
    ]


def laid_out(function, value):
    """A bias or gain as it is combined with outputs."""
    return to_numpy(function(ops.convert_to_tensor(value)))
