"""The layers of a bank, and the stacks of adapters in them."""

import contextlib
import functools

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import classes, distribution
from keras_lora.layers import methods, torch_layout
from keras_lora.serving import reading


class Stacks:
    """The stacked adapters of one layer of a bank."""

    a = b = bias = gain = None

    def by_name(self) -> dict:
        stacks = {"a": self.a, "b": self.b, "bias": self.bias, "gain": self.gain}
        return {name: stack for name, stack in stacks.items() if stack is not None}


class StackVariables(Stacks, keras.layers.Layer):
    """Variables that stack the values of all adapters of a layer, one in each slot.

        A   (slots, *A's shape)   padded with zeros to the highest rank
        B   (slots, *B's shape)   scaling * B
        bias, gain (slots, ...)   in the shapes in which they combine with outputs

    The first slot is that of the base model: zeros, and 1 for the gain. The last one
    has NaN in B, for unknown ids.

    Args:
        count: The number of slots.
        rank: The highest rank.
        form: The layer's form at that rank.
        bias_shape: The shape of a bias for the outputs; None if no bias is kept.
        gain_shape: The shape of a gain for the outputs; None if no gain is kept.
        dtype: The dtype of the layer's variables; at least float32 is used.
    """

    def __init__(self, count, rank, form, bias_shape, gain_shape, dtype):
        super().__init__(dtype=methods.wide_dtype(dtype), trainable=False)
        self.count, self.rank = count, rank
        self.a = self._stack("a", form.a_shape)
        self.b = self._stack("b", form.b_shape)
        self.write(count - 1, b=np.nan)
        if bias_shape is not None:
            self.bias = self._stack("bias", bias_shape)
        if gain_shape is not None:
            self.gain = self._stack("gain", gain_shape, "ones")
        self.built = True

    def _stack(self, name, shape, initializer="zeros"):
        return self.add_weight(
            name=name,
            shape=(self.count, *shape),
            initializer=initializer,
            trainable=False,
            autocast=False,
        )

    def slot_values(self, **values) -> dict:
        """Name -> value for one slot, by default that of the base model."""
        return {
            name: np.ascontiguousarray(
                np.broadcast_to(values.get(name, base_value(name)), stack.shape[1:]),
                self.variable_dtype,
            )
            for name, stack in self.by_name().items()
        }

    def write(self, slot, **values):
        for name, value in self.slot_values(**values).items():
            write_slot(self.by_name()[name], slot, value)


class StacksWithTrainees(Stacks):
    """The stacks of a layer, followed by the values of each trainee."""

    def __init__(self, host, adapters, trainees):
        stacks, path = adapters.stacks, adapters.name
        self.variable_dtype = stacks.variable_dtype
        parts = [trainee.parts.get(path) for trainee in trainees]
        own_values = [{} if part is None else part.slot_values(host) for part in parts]
        for name, stack in stacks.by_name().items():
            shape = stack.shape[1:]
            values = [
                ops.broadcast_to(own[name], shape)
                if name in own
                else ops.full(shape, base_value(name), stack.dtype)
                for own in own_values
            ]
            setattr(self, name, ops.concatenate([stack, ops.stack(values)], axis=0))
        rates = [0.0 if part is None else part.dropout for part in parts]
        self.dropout = np.array([0.0] * stacks.count + rates, "float32")


def base_value(name) -> float:
    """Returns the value with which a slot gives the base model."""
    return 1.0 if name == "gain" else 0.0


def write_slot(stack, slot, value):
    """Assigns stack[slot] = value; other threads read the old stack or the new one.

    The whole stack is assigned, because TensorFlow copies a variable on every read once
    it was updated in place.
    """
    value = ops.convert_to_tensor(value[None])
    stack.assign(ops.scatter_update(stack, [[slot]], value))


class BankAdapters:
    """The adapters of a bank in one layer, which holds them as its `lora`.

        y = gain[s] * (linear(x, W) + linear(x, A[s]) @ B[s]) + bias[s]

    for each row of the inputs, where s is the slot of its adapter.

    It is not a Keras layer, so that it is not in the files of the plain model.
    """

    removal_hint = "release() on the bank"
    is_bank = True
    stand_in = None

    def __init__(self, choice, form, stacks, name):
        self.choice, self.form, self.stacks, self.name = choice, form, stacks, name
        self.leading = None  # kind of the inputs' leading axis, None until it is known
        self.around_call = lambda *_: contextlib.nullcontext()  # a context of each call

    @property
    def variables(self):
        return [*self.stacks.variables, *self.choice.variables]

    def outputs(self, host, inputs, training):
        trainees, seen = self.choice.thread.trainees, self.choice.thread.seen
        if training and trainees is None:
            raise ValueError(
                f"{self.name!r} holds the adapters of an AdapterBank, which train only "
                "in `bank.fit`: it cannot be called with training=True."
            )
        inputs = ops.convert_to_tensor(inputs, sparse=False)
        if seen is not None:
            seen.setdefault(self, []).append(torch_layout.to_numpy(inputs))
            return host.frozen_linear(inputs)
        chosen = self.choice.current().for_layer(self, ops.shape(inputs)[0])
        stacks = self.stacks
        if training:
            stacks = StacksWithTrainees(host, self, trainees)
        dtype = stacks.variable_dtype if host.form.looks_up else host.compute_dtype
        gain, backwards = stacks.gain, host.form.input_axes != self.form.input_axes
        if gain is not None and backwards:
            inputs = times(inputs, chosen.for_outputs(gain, len(inputs.shape)))
        outputs = ops.cast(host.frozen_linear(inputs), dtype)
        dropped = inputs
        if training and stacks.dropout.any():
            dropped = chosen.apply_dropout(inputs, stacks.dropout, self.choice.seed)
        low_rank = chosen.bypass(host.form, dropped, stacks.a, stacks.b, training)
        outputs = outputs + ops.cast(low_rank, dtype)
        if gain is not None and not backwards:
            outputs = times(outputs, chosen.for_outputs(gain, len(outputs.shape)))
        if stacks.bias is not None:
            bias = chosen.for_outputs(stacks.bias, len(outputs.shape))
            outputs = outputs + ops.cast(bias, dtype)
        return outputs


def times(values, gain):
    """Multiplies in the gain's dtype; half precision would round whole columns."""
    return ops.cast(ops.multiply(ops.cast(values, gain.dtype), gain), values.dtype)


class Banked:
    """Mixin for the class of a layer in a bank; files have its class from before."""

    class_before = None

    def call_with_adapter(self, inputs, training, **options):
        if hasattr(inputs, "with_flat_values"):
            raise ValueError(
                f"{self.name!r} got a ragged tensor, whose values are not rows of the "
                "batch, so a bank cannot tell which adapter they use."
            )
        with self.lora.around_call(self, inputs):
            return super().call_with_adapter(inputs, training, **options)

    @property
    def variables(self):
        variables = super().variables
        if keras.backend.backend() != "jax":
            return variables
        # JAX has to pass the variables; otherwise they would become constants.
        known = set(map(id, variables))
        return variables + [v for v in self.lora.variables if id(v) not in known]

    def get_config(self):
        return classes.view_as(self, self.class_before).get_config()

    def save_own_variables(self, store):
        classes.view_as(self, self.class_before).save_own_variables(store)

    def load_own_variables(self, store):
        classes.view_as(self, self.class_before).load_own_variables(store)

    def quantize(self, *args, **kwargs):
        raise ValueError(
            f"{self.name!r} holds the adapters of an AdapterBank. Call "
            f"{self.lora.removal_hint} first, quantize, and create the bank again."
        )


@functools.cache
def banked_class(cls):
    """Returns the class of a layer in a bank, which has the name of its own class."""
    attributes = {"__module__": cls.__module__, "class_before": cls}
    banked = type(cls.__name__, (Banked, reading.lora_class_for(cls)), attributes)
    package, _, name = keras.saving.get_registered_name(cls).rpartition(">")
    if package:
        for each in (banked, cls):  # the last one keeps the name
            keras.saving.register_keras_serializable(package, name)(each)
    return banked


class Hosts:
    """The layers of a bank's model, and those among them that hold adapters.

    Attributes:
        paths: The `Paths` of the model.
        layers: Path -> layer, for the layers that hold adapters.
        input_specs: Shapes and dtypes of the model's inputs; None if not known yet.
    """

    def __init__(self, paths, choice, count):
        self.paths, self.choice, self.count = paths, choice, count
        self.layers, self.input_specs = {}, None

    def add(self, path, layer, rank, with_gain):
        """Makes a layer hold the bank's adapters."""
        host = reading.host_view(layer)
        form = host.low_rank_form(rank)
        bias = getattr(layer, "bias", None)
        bias_shape = gain_shape = None
        if bias is not None:
            bias_shape = host.over_outputs(ops.zeros(bias.shape)).shape
        if with_gain:
            gain_shape = form.over_outputs(ops.ones(outputs_of(host, form))).shape
        dtype = layer.variable_dtype
        layout = distribution.layout_of(host.frozen_kernel)
        axes = {} if layout is None else form.factor_axes(layout.axes)
        axes["gain"] = axes.get("magnitude", ())
        axes = {name: [None, *own] for name, own in axes.items()}
        with distribution.laid_out_by(axes, layout):
            stacks = StackVariables(
                self.count, rank, form, bias_shape, gain_shape, dtype
            )
        classes.change_class(layer, banked_class(type(layer)))
        vars(layer)["lora"] = BankAdapters(self.choice, form, stacks, path)
        self.layers[path] = layer
        # A new form, because its functions refer to the layer with its new class.
        layer.lora.form = layer.low_rank_form(rank)
        return stacks

    def release(self):
        for layer in self.layers.values():
            vars(layer).pop("lora", None)
            classes.change_class(layer, type(layer).class_before)
        self.layers = {}

    def prepare(self, parts) -> dict:
        """Returns {path: arguments of `StackVariables.write`}.

        Raises:
            ValueError: If a layer has no room for the adapter.
        """
        no_room, prepared = {}, {}
        for path, part in parts.items():
            layer = self.layers.get(path)
            if layer is None:
                no_room[path] = "the layer is not in the bank"
                continue
            stacks = layer.lora.stacks
            if part.rank > stacks.rank:
                no_room[path] = f"rank {part.rank}, with room for {stacks.rank}"
            elif part.has_gain and stacks.gain is None:
                no_room[path] = "DoRA's magnitudes"
            else:
                values = part.slot_values(layer)
                prepared[path] = {
                    name: torch_layout.to_numpy(x) for name, x in values.items()
                }
        if no_room:
            reasons = "; ".join(f"{path!r}: {why}" for path, why in no_room.items())
            raise ValueError(
                f"The bank has no room for this adapter at {reasons}. Create the bank "
                "with this adapter, or with a `target` and `max_rank` that include it."
            )
        return prepared

    def write(self, slot, prepared):
        """Writes an adapter into a slot, and the base model where it has no layer."""
        for path, layer in self.layers.items():
            layer.lora.stacks.write(slot, **prepared.get(path, {}))


def outputs_of(host, form):
    """Returns the sizes of the kernel's axes that are not summed over."""
    return [
        n for axis, n in enumerate(host.kernel_shape) if axis not in form.input_axes
    ]
