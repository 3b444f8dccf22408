"""How a LoRA layer reads a kernel that Keras has quantized."""

import contextlib
import contextvars

import keras
from keras import ops

from keras_lora.keras_internals import (
    calls,
    classes,
    layer_state,
    private_names,
    probes,
    variable_state,
)
from keras_lora.keras_internals.layer_state import Leaf

MODES = ("int8", "int4")
# Modes that calibrate the integers with sample inputs.
CALIBRATED = ("gptq", "awq")

# Attributes of a layer that apply after the adapter.
WITHOUT_FINISH = {"bias": None, "activation": None, "logit_soft_cap": None}


_in_artifact = contextvars.ContextVar("in_artifact", default=False)


@contextlib.contextmanager
def tracing_artifact():
    """Context for tracing an artifact, in which quantized layers compute as in Keras.

    The operations that order float kernels in a compiled step may not exist in the
    artifact's runtime, and would keep the kernels from being computed in advance.
    """
    token = _in_artifact.set(True)
    try:
        yield
    finally:
        _in_artifact.reset(token)


def in_artifact() -> bool:
    return _in_artifact.get()


class QuantizedHost(Leaf):
    """How a LoRA layer behaves once Keras has quantized its kernel.

        y = finish( quantized(x, W) + linear(drop(x), A) @ (scaling * B) )

    in training and at inference, because no integers represent W + delta. `quantized`
    is Keras's own operation. Its gradient is that of linear(x, dequantized W), with the
    rounding of inputs taken as the identity. Integers, scales and zeros never change.
    """

    variable_dtype: str
    quantization_mode: str | None
    merge_weights: bool
    mends_gradient = False  # whether Keras's gradient of the quantized layer is wrong

    @property
    def is_quantized(self) -> bool:
        return self.quantization_mode is not None

    @property
    def merges_in_call(self) -> bool:
        """Whether a call at training=False may use one kernel for W and adapter."""
        return self.merge_weights and not self.is_quantized

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def plain_call(self, inputs, **options):
        """The call without an adapter."""
        call = super().quantized_call if self.is_quantized else super().call
        return call(inputs, **options)

    def quantize(self, mode=None, type_check=True, config=None, **kwargs):
        """Quantizes W as the plain layer does; A and B stay as they are."""
        if self.lora is not None:
            refuse_quantizing(self, mode)
        super().quantize(mode, type_check=False, config=config, **kwargs)
        if self.lora is not None:  # the frozen kernel was replaced
            self.lora.kernel_place = None
            variable_state.mark_frozen(self.frozen_kernel)
        self.warn_of_quantization()

    @property
    def kernel_dtype(self):
        """The dtype of a kernel that W and the adapter are merged into."""
        return self.variable_dtype if self.is_quantized else self.frozen_kernel.dtype

    def kernel_values(self):
        """W, or its integers, in the kernel's own shape."""
        if is_transposed(self):
            return calibrated_integers(self)
        return getattr(self.plain_class, self.kernel_name).fget(self)

    def dequantized_kernel(self, dtype):
        """Returns W as Keras's quantized operation uses it."""
        scale, zero, groups = quantization(self, self.kernel_name)
        values = self.from_integers(self.kernel_values(), scale, zero, groups)
        if self.quantization_mode == "awq":  # it scales the inputs too
            rows = ops.reshape(self.awq_scales, (-1, 1))
            matrix = ops.divide(ops.reshape(values, (rows.shape[0], -1)), rows)
            values = ops.reshape(matrix, values.shape)
        return ops.cast(values, dtype)

    def other_kernels(self) -> dict:
        """Name -> value of other quantized variables."""
        return {}

    def save_own_variables(self, store):
        if self.quantization_mode not in CALIBRATED or not self.built:
            super().save_own_variables(store)
            return
        # Keras 3.15 leaves the zeros out, and cannot load its own file.
        names = self.variable_serialization_spec[self.quantization_mode]
        values = [getattr(self, name) for name in names]
        for index, value in enumerate(v for v in values if v is not None):
            store[str(index)] = value

    def warn_of_quantization(self):
        """Warns about limits of the kernel's quantization, where a kind has some."""

    # Methods of a kind; the defaults are those of a dense layer.

    def linear_back(self, upstream, kernel):
        """The gradient of `linear` for its inputs."""
        return ops.matmul(upstream, ops.transpose(kernel))

    def from_integers(self, integers, scale, zero, groups):
        """Converts integers to floats, with each output's scale, and zero in blocks."""
        return dequantize(integers, scale, zero, groups)

    def quantized_linear(self, inputs):
        """The plain layer's operation, before bias and activation."""
        return straight_through(
            self,
            inputs,
            lambda plain, inputs: plain.quantized_call(inputs),
            lambda own, upstream: own.linear_back(
                upstream, own.dequantized_kernel(upstream.dtype)
            ),
        )


def refuse_mode(layer, mode):
    """Raises ValueError for a mode that does not support adapters."""
    if mode is None:
        return
    probes.require(private_names.QUANTIZED)
    if mode in MODES or mode in CALIBRATED:
        return
    why = ", whose scales are trained" if mode == "float8" else ""
    raise ValueError(
        f"The layer {layer.name!r} cannot have an adapter over a kernel in "
        f"{mode!r}{why}. Adapters work over float, int8 and int4 kernels, and over "
        "those that GPTQ and AWQ have calibrated."
    )


def refuse_quantizing(layer, mode):
    """Raises ValueError for a mode to which Keras cannot quantize an adapted layer."""
    refuse_mode(layer, mode)
    if mode in CALIBRATED:
        raise ValueError(
            f"The layer {layer.name!r} has an adapter, and Keras skips it when it "
            f"calibrates for {mode!r}. Quantize the model first, then adapt it."
        )


def is_calibrated(layer, name):
    """Whether integers have replaced the float kernel, and are not kept next to it."""
    if layer.quantization_mode not in CALIBRATED:
        return False
    return sum(variable.name == name for variable in layer.variables) == 1


def refuse_uncalibrated(layer, name):
    """Raises if Keras still computes with the float kernel, or has none."""
    calibrates = layer.built and layer.quantization_mode in CALIBRATED
    if calibrates and not (
        is_calibrated(layer, name) and is_reported_calibrated(layer)
    ):
        raise ValueError(
            f"The layer {layer.name!r} is quantized to {layer.quantization_mode!r} but "
            "was not calibrated: Keras computes with its float kernel, or has none. "
            "Calibrate it with `Model.quantize`, in a block of the "
            "`quantization_layer_structure`, load its weights from a .keras file, or "
            "leave it out with `exclude`."
        )


def is_reported_calibrated(layer):
    """Whether Keras calls a layer calibrated, which one made from a policy is not."""
    pending = f"is_{layer.quantization_mode}_calibrated"  # before Keras 3.16
    if hasattr(layer, pending):
        return getattr(layer, pending)
    return not getattr(layer, "calibration_pending", False)


def own_kernel(layer, name):
    """Returns the kernel's variable; a quantized layer's property may unpack it."""
    if layer.quantization_mode is None:
        return getattr(layer, name)
    return next(variable for variable in layer.variables if variable.name == name)


def quantization(layer, name):
    """Returns (scale, zero, groups); zero and groups are None unless it has blocks."""
    scale, zero = (getattr(layer, f"{name}_{x}", None) for x in ("scale", "zero"))
    if is_transposed(layer):
        scale, zero = ops.transpose(scale), ops.transpose(zero)
    return scale, zero, None if zero is None else layer.g_idx


def is_transposed(layer):
    """Whether integers are (outputs, inputs): GPTQ and AWQ before Keras 3.16."""
    calibrated = layer.quantization_mode in CALIBRATED
    return calibrated and not hasattr(layer, "calibration_pending")


def calibrated_integers(layer):
    """Returns the integers of GPTQ or AWQ in the kernel's own shape."""
    values = layer.quantized_kernel
    if policy_of(layer).weight_bits == 4:  # two in a byte
        outputs = layer.kernel_scale.shape[0]
        values = keras.quantizers.unpack_int4(values, outputs, axis=0, dtype="uint8")
    values = ops.transpose(values)
    return ops.reshape(values, getattr(layer, "original_kernel_shape", values.shape))


def policy_of(layer):
    """Returns a layer's policy, also from a map of policies for the whole model."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[layer.path]
    return policy


def dequantize(integers, scale, zero=None, groups=None, axis=0):
    """integers / scale, or in blocks along an axis (integers - zero) * scale."""
    scale = ops.convert_to_tensor(scale)
    values = ops.cast(integers, scale.dtype)
    if zero is None:
        return ops.divide(values, scale)
    groups = ops.cast(groups, "int32")
    scale, zero = (ops.take(x, groups, axis=axis) for x in (scale, zero))
    return ops.multiply(ops.subtract(values, ops.cast(zero, scale.dtype)), scale)


def straight_through(layer, inputs, forward, backward):
    """forward(plain layer, inputs), with the gradient backward(layer, upstream).

    Both get views of the layer without bias and activation, whose variables are values.
    The layer itself does not change, and only these values are kept for the gradient.
    """
    if in_artifact():
        return forward(
            classes.view_with(layer, layer.plain_class, WITHOUT_FINISH), inputs
        )
    names, variables = zip(*layer_state.kernel_variables(layer).items(), strict=True)

    def ordered_view(cls, values, tensor):
        values = [order_after(tensor, value) for value in values]
        values = dict(zip(names, values, strict=True))
        return classes.view_with(layer, cls, {**WITHOUT_FINISH, **values})

    @ops.custom_gradient
    def call(inputs, *values):
        def gradient(*args, upstream=None):
            if upstream is None:  # torch passes it as an argument
                (upstream,) = args
            result = backward(ordered_view(type(layer), values, upstream), upstream)
            return (ops.cast(result, dtype), *[None] * len(values))

        inputs = ops.stop_gradient(inputs)
        return forward(
            ordered_view(layer.plain_class, values, inputs), inputs
        ), gradient

    inputs = ops.convert_to_tensor(inputs)
    dtype = inputs.dtype
    return call(inputs, *map(ops.convert_to_tensor, variables))


def order_after(tensor, value):
    """Makes a value depend on a tensor, so that no compiler computes it earlier.

    Otherwise it would form the float kernels of all layers at the start, or keep them
    for the backward pass, and lose the memory that quantization saved.
    """
    if not calls.in_tensorflow_graph() and keras.backend.backend() != "jax":
        return value
    first = ops.reshape(tensor, (-1,))[:1]
    # Always false, which a compiler cannot see.
    never = ops.logical_and(ops.equal(first, first), ops.not_equal(first, first))
    return ops.add(value, ops.cast(ops.any(never), value.dtype))
