"""The layers of a bank, and how adapters are written into them."""

import contextlib
import functools

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import classes, distribution
from keras_lora.layers import kinds, torch_layout
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.serving import reading
from keras_lora.serving.slots import Slots, WithTrainees


class BankAdapters:
    """The adapters of a bank in one layer, instead of the layer's own adapter.

        y = gain[s] * (linear(x, W) + linear(x, A[s]) @ B[s]) + bias[s]

    where s is the slot of a row's adapter.

    It is not a Keras layer and not tracked, so the plain model's files leave it out.
    """

    removal_hint = "release() on the bank"
    is_bank = True
    stand_in = None

    def __init__(self, choice, form, slots, name):
        self.choice, self.form, self.slots, self.name = choice, form, slots, name
        self.leading = None  # the kind of the inputs' leading axis; None: not known yet
        self.around_call = lambda *_: contextlib.nullcontext()  # counts calls

    @property
    def variables(self):
        return [*self.slots.variables, *self.choice.variables]

    def outputs(self, host, inputs, training):
        trainees = self.choice.trainees
        if training and trainees is None:
            raise ValueError(
                f"{self.name!r} holds the adapters of an AdapterBank, which train only "
                "in `bank.fit`: it cannot be called with training=True."
            )
        inputs = ops.convert_to_tensor(inputs, sparse=False)
        if self.choice.probe is not None:
            self.choice.probe.record(self, inputs)
            return host.frozen_linear(inputs)
        chosen = self.choice.current().for_layer(self, ops.shape(inputs)[0])
        slots = self.slots
        if training:
            slots = WithTrainees(host, self, trainees)
        dtype = slots.variable_dtype if host.form.looks_up else host.compute_dtype
        gain, backwards = slots.gain, host.form.input_axes != self.form.input_axes
        if gain is not None and backwards:
            inputs = times(inputs, chosen.over(gain, len(inputs.shape)))
        outputs = ops.cast(host.frozen_linear(inputs), dtype)
        dropped = inputs
        if training and slots.dropout.any():
            dropped = chosen.dropped(inputs, slots.dropout, self.choice.seed)
        more = chosen.bypass(host.form, dropped, slots.a, slots.b, training)
        outputs = outputs + ops.cast(more, dtype)
        if gain is not None and not backwards:
            outputs = times(outputs, chosen.over(gain, len(outputs.shape)))
        if slots.bias is not None:
            bias = chosen.over(slots.bias, len(outputs.shape))
            outputs = outputs + ops.cast(bias, dtype)
        return outputs


def times(values, gain):
    """Multiplies in the gain's dtype, because half precision would shift columns."""
    return ops.cast(ops.multiply(ops.cast(values, gain.dtype), gain), values.dtype)


class Banked:
    """Mixin for a layer in a bank; in files the layer has its class from before."""

    class_before = None

    def adapted_call(self, inputs, training, **options):
        if hasattr(inputs, "with_flat_values"):
            raise ValueError(
                f"{self.name!r} got a ragged tensor, whose values are not rows of the "
                "batch, so a bank cannot tell which adapter they use."
            )
        with self.lora.around_call(self, inputs):
            return super().adapted_call(inputs, training, **options)

    @property
    def variables(self):
        found = super().variables
        if keras.backend.backend() != "jax":
            return found
        # JAX has to pass the variables; otherwise they would become constants.
        known = set(map(id, found))
        return found + [v for v in self.lora.variables if id(v) not in known]

    def get_config(self):
        return classes.seen_as(self, self.class_before).get_config()

    def save_own_variables(self, store):
        classes.seen_as(self, self.class_before).save_own_variables(store)

    def load_own_variables(self, store):
        classes.seen_as(self, self.class_before).load_own_variables(store)

    def quantize(self, *args, **kwargs):
        raise ValueError(
            f"{self.name!r} holds the adapters of an AdapterBank. Call "
            f"{self.lora.removal_hint} first, quantize, and create the bank again."
        )


@functools.cache
def banked_class(cls):
    """The class of a layer in a bank, under the name of its own class."""
    own = cls if issubclass(cls, LoRALayer) else kinds.lora_class_of(cls)
    attributes = {"__module__": cls.__module__, "class_before": cls}
    banked = type(cls.__name__, (Banked, own), attributes)
    package, _, name = keras.saving.get_registered_name(cls).rpartition(">")
    if package:
        for each in (banked, cls):  # the last one keeps the name
            keras.saving.register_keras_serializable(package, name)(each)
    return banked


def bank_layer(layer, adapters):
    classes.change_class(layer, banked_class(type(layer)))
    vars(layer)["lora"] = adapters


def unbank_layer(layer):
    vars(layer).pop("lora", None)
    classes.change_class(layer, type(layer).class_before)


class Hosts:
    """The layers of a model, and those that hold the bank's adapters.

    Attributes:
        paths: Path -> layer, for the whole model.
        layers: Path -> layer, for the layers that hold adapters.
        input_specs: Shapes and dtypes of the model's inputs; None if not known yet.
    """

    def __init__(self, paths, choice, count):
        self.paths, self.choice, self.count = paths, choice, count
        self.layers, self.input_specs = {}, None

    def take(self, path, layer, rank, with_gain):
        """Makes a layer hold the bank's adapters."""
        host = reading.as_host(layer)
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
        layout = distribution.layout_of(host.frozen_kernel)
        axes = {} if layout is None else form.factor_axes(layout.axes)
        axes["gain"] = axes.get("magnitude", ())
        axes = {name: [None, *own] for name, own in axes.items()}
        with distribution.laid_out_by(axes, layout):
            slots = Slots(self.count, rank, form, bias_shape, gain_shape, dtype)
        bank_layer(layer, BankAdapters(self.choice, form, slots, path))
        self.layers[path] = layer
        # Made again, because its functions refer to the changed layer.
        layer.lora.form = layer.low_rank_form(rank)
        return slots

    def release(self):
        for layer in self.layers.values():
            unbank_layer(layer)
        self.layers = {}

    def prepared(self, parts) -> dict:
        """Returns {path: arguments of `Slots.write`}; raises if there is no room."""
        no_room, prepared = {}, {}
        for path, part in parts.items():
            layer = self.layers.get(path)
            if layer is None:
                no_room[path] = "the layer is not in the bank"
                continue
            slots = layer.lora.slots
            if part.rank > slots.rank:
                no_room[path] = f"rank {part.rank}, with room for {slots.rank}"
            elif part.has_gain and slots.gain is None:
                no_room[path] = "DoRA's lengths"
            else:
                rows = part.rows(layer.form, layer.over_outputs)
                prepared[path] = {
                    name: torch_layout.to_numpy(x) for name, x in rows.items()
                }
        if no_room:
            reasons = "; ".join(f"{path!r}: {why}" for path, why in no_room.items())
            raise ValueError(
                f"The bank has no room for this adapter at {reasons}. Create the bank "
                "with this adapter, or with a `target` and `max_rank` that include it."
            )
        return prepared

    def write(self, slot, prepared):
        """Writes an adapter; layers that it leaves out get the base model's values."""
        for path, layer in self.layers.items():
            layer.lora.slots.write(slot, **prepared.get(path, {}))


def outputs_of(host, form):
    """The shape of the kernel's axes that are not summed over."""
    return [
        n for axis, n in enumerate(host.kernel_shape) if axis not in form.input_axes
    ]


def laid_out(function, value):
    """Returns a bias or gain in the shape for combining it with outputs."""
    return torch_layout.to_numpy(function(ops.convert_to_tensor(value)))
