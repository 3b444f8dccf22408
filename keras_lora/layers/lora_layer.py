"""What every LoRA layer shares: building, the two paths of `call`, its config."""

import inspect
import re
import textwrap
import types

import keras
from keras import ops

from keras_lora.keras_internals import freeze
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.adapter import checked_rank

# Words of other libraries, and the keyword that means the same here.
FOREIGN_KEYWORDS = {
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "rslora": "use_rslora",
    "lora_a_initializer": "a_initializer",
    "lora_b_initializer": "b_initializer",
    "init_lora_weights": "a_initializer` and `b_initializer",
}

COMMON_ARGUMENTS = """
LoRA arguments (keyword-only, after those of the Keras layer):
    rank: Whole number >= 0, the rank r of the update. 0 means no adapter: the
        layer is its Keras base class and its kernel trains.
    alpha: Number > 0, default `rank`. The update is scaled by alpha / rank.
    dropout: Number in [0, 1): dropout on the adapter's input while training.
    use_rslora: Boolean, scale by alpha / sqrt(rank) instead.
    a_initializer, b_initializer: Initializers of A and B; None means the
        starting values given above.
    merge_weights: Boolean. True: with training=False the call uses the merged
        kernel W + delta, formed in float32 and rounded once, so that what is
        evaluated is what is exported. False: the low-rank path there too.

A kernel regularizer applies to A and B, which train in the kernel's place.
`layer.lora` holds the adapter (.rank .alpha .scaling .a .b .delta()), None with
rank=0; the kernel attribute of the Keras layer is the frozen W.

Raises:
    ValueError: If an argument is out of range, a keyword is another library's
        word for one of the above, or the kernel has a constraint.

Reference:
    [LoRA: Hu et al., 2021](https://arxiv.org/abs/2106.09685)
"""


class LoRALayer:
    """Mixin that gives a Keras layer a frozen kernel W and an adapter A, B.

        training=True    y = finish( linear(x, W) + linear(drop(x), A) @ (scaling * B) )
        training=False   y = finish( linear(x, round(W + delta)) )

    A kind of layer is `class LoRAKind(LoRALayer, keras.layers.Kind)`. It answers
    `linear` and `low_rank_form`, and `finish` where a bias is not added last.
    """

    plain_class = None  # the Keras class this kind extends
    kernel_name = "kernel"
    # What a plain layer gets when it is turned into this class, beside `lora`.
    own_attributes = types.MappingProxyType(
        {"merge_weights": True, "_fixed_kernel": None}
    )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "plain_class" in cls.__dict__:
            cls.__doc__ = textwrap.dedent(cls.__doc__ or "") + COMMON_ARGUMENTS
            cls.__signature__ = full_signature(cls)

    def __init__(
        self,
        *args,
        rank=8,
        alpha=None,
        dropout=0.0,
        use_rslora=False,
        a_initializer=None,
        b_initializer=None,
        merge_weights=True,
        **kwargs,
    ):
        refuse_foreign_keywords(type(self).__name__, kwargs)
        if kwargs.get("name") is None:
            kwargs["name"] = default_name(type(self))
        super().__init__(*args, **kwargs)
        self.merge_weights = bool(merge_weights)
        self.lora = None
        self._fixed_kernel = None
        if checked_rank(rank, lowest=0):
            refuse_unsupported_host(self, self.kernel_name)
            self.lora = LowRankAdapter(
                rank,
                alpha=alpha,
                dropout=dropout,
                use_rslora=use_rslora,
                a_initializer=a_initializer,
                b_initializer=b_initializer,
                dtype=adapter_dtype(self),
                name="lora",
            )

    # What a kind answers.

    def linear(self, inputs, kernel):
        """The host's own operation: matmul, einsum, gather or convolution."""
        raise NotImplementedError

    def low_rank_form(self, rank):
        """How the kernel that has just been built is made of A and B."""
        raise NotImplementedError

    def finish(self, outputs):
        """Bias and activation."""
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        if self.activation is not None:
            outputs = self.activation(outputs)
        return outputs

    # What all kinds do.

    @property
    def frozen_kernel(self):
        """The variable W, under the same name for every kind."""
        return getattr(self, self.kernel_name)

    def build(self, input_shape=None):
        super().build(input_shape)
        if self.lora is not None:
            self.build_adapter()

    def build_adapter(self):
        """Makes A and B to fit W, and freezes W."""
        regularizer = getattr(self, f"{self.kernel_name}_regularizer")
        self.lora.build(self.low_rank_form(self.lora.rank), regularizer)
        self._kernel_place = freeze(self, self.frozen_kernel)

    def call(self, inputs, training=None):
        if self.lora is None:
            return super().call(inputs)
        dtype = self.compute_dtype
        if self._fixed_kernel is not None:  # inside merged() or disabled()
            kernel = ops.stop_gradient(self._fixed_kernel.kernel)
            outputs = self.linear(inputs, ops.cast(kernel, dtype))
        elif training or not self.merge_weights:
            outputs = self.low_rank_path(inputs, dtype, training)
        else:
            outputs = self.linear(inputs, self.merged_kernel(dtype))
        return self.finish(outputs)

    def low_rank_path(self, inputs, dtype, training):
        """linear(x, W) + linear(drop(x), A) @ (scaling * B)"""
        kernel = ops.cast(ops.stop_gradient(self.frozen_kernel), dtype)
        return ops.add(
            self.linear(inputs, kernel), self.lora.bypass(inputs, dtype, training)
        )

    def merged_kernel(self, dtype):
        """W + delta, formed in the adapter's dtype and rounded once."""
        kernel = ops.cast(self.frozen_kernel, self.lora.variable_dtype)
        return ops.cast(ops.add(kernel, self.lora.delta()), dtype)

    def get_config(self):
        options = {"rank": 0} if self.lora is None else self.lora.options()
        options["merge_weights"] = self.merge_weights
        return {**super().get_config(), **options}

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"`enable_lora()` was called on {self.name!r}, a "
            f"{type(self).__name__}, which brings its own adapter. Choose its rank "
            "with `rank=` when it is constructed, or call "
            "`keras_lora.merge_lora(model)` first."
        )

    def quantize(self, *args, **kwargs):
        raise ValueError(
            f"`quantize()` was called on {self.name!r}, a {type(self).__name__}: "
            "the quantized call would leave the adapter out. Call "
            "`keras_lora.merge_lora(model)` first, then quantize."
        )


def is_adapted(layer):
    """Whether a layer is a LoRA layer that holds an adapter."""
    return isinstance(layer, LoRALayer) and layer.lora is not None


def adapter_dtype(layer):
    """float32 also beside half-precision kernels, float64 beside float64 ones."""
    return "float64" if layer.variable_dtype == "float64" else "float32"


def refuse_unsupported_host(layer, kernel_name):
    """A ValueError where an adapter cannot do justice to the Keras layer."""
    constraint = getattr(layer, f"{kernel_name}_constraint")
    if constraint is not None:
        raise ValueError(
            f"`{kernel_name}_constraint` of layer {layer.name!r} cannot be kept by a "
            f"low-rank update. Received: {constraint!r}. Leave it out, or use rank=0."
        )
    if layer.quantization_mode is not None:
        raise ValueError(
            f"The layer {layer.name!r} is quantized, and its quantized call would "
            f"leave the adapter out. Received: dtype={layer.dtype_policy.name!r}. Use "
            "a float policy."
        )
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"The layer {layer.name!r} has Keras's own adapter (`enable_lora`). Save "
            "the model and load it again, which folds that adapter, and start there."
        )


def refuse_foreign_keywords(class_name, kwargs):
    for keyword, ours in FOREIGN_KEYWORDS.items():
        if kwargs.get(keyword) is not None:
            raise ValueError(
                f"{class_name} has no `{keyword}`; the keyword here is `{ours}`. "
                f"Received: {keyword}={kwargs[keyword]!r}."
            )


def default_name(cls):
    """lora_dense, lora_dense_1, ..., counted as Keras counts."""
    name = snake_case(cls.__name__)
    count = keras.backend.get_uid(name)
    return name if count == 1 else f"{name}_{count - 1}"


def snake_case(class_name):
    """Keras's rule for names, but lora_dense where that gives lo_ra_dense."""
    name = class_name.replace("LoRA", "Lora")
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def full_signature(cls):
    """What `help()` and editors show: Keras's arguments, then LoRA's."""
    hidden = ("self", "args", "kwargs", "lora_rank", "lora_alpha")
    constructors = [cls.plain_class.__init__]
    constructors += [
        base.__dict__["__init__"]
        for base in cls.__mro__
        if issubclass(base, LoRALayer) and "__init__" in base.__dict__
    ]
    parameters = {}
    for constructor in constructors:
        for name, parameter in inspect.signature(constructor).parameters.items():
            if name not in hidden:
                parameters.setdefault(name, parameter)
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*parameters.values(), rest])
