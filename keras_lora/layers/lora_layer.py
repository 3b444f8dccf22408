"""Base class of all LoRA layers: building, calls, configuration and files."""

import inspect

import keras
from keras import ops

from keras_lora.keras_internals import calls, layer_state
from keras_lora.layers import (
    arguments,
    methods,
    quantized_host,
    rematerialized,
    settings,
    torch_layout,
)
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.quantized_host import QuantizedHost
from keras_lora.layers.rematerialized import Rematerialized
from keras_lora.layers.saved_values import TrainedValues
from keras_lora.layers.site import (
    Site,
    refuse_constraint,
    refuse_keras_adapter,
    watch_kernel,
)


class LoRALayer(Rematerialized, QuantizedHost, Site):
    """Mixin that gives a Keras layer a frozen kernel W and an adapter A, B.

        training=True    y = finish( linear(x, W) + linear(drop(x), A) @ (scaling * B) )
        training=False   y = finish( linear(x, round(W + delta)) )

    Over a quantized kernel, the first line holds for both.

    A kind of layer is `class LoRAKind(LoRALayer, keras.layers.Kind)`. It implements
    `linear` and `low_rank_form`, and `finish` if a call ends with more than bias and
    activation. `keras_lora.register_lora_layer` registers it for all functions.

    Attributes of a kind:
        plain_class: The Keras class that it extends.
        kernel_name: The attribute of that class that holds W.
        more_weights: Names of further weights that can have adapters.
        keras_dropout: Whether the Keras layer has its own `dropout`.
        replaces: Methods of the Keras class that this class replaces. A subclass that
            overrides one of them computes something else, and is not adapted.
    """

    plain_class: type | None = None
    kernel_name: str | None = "kernel"
    more_weights: tuple[str, ...] = ()
    keras_dropout = False
    replaces: tuple[str, ...] = ("call",)

    built: bool  # Keras's

    # Defaults for a plain layer that is turned into this class.
    lora: LowRankAdapter | None = None
    merge_weights = True
    frozen_names = ()  # of variables that are frozen in its config, such as a bias

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "plain_class" in cls.__dict__:
            cls.__doc__ = (
                inspect.cleandoc(cls.__doc__ or "") + arguments.COMMON_ARGUMENTS
            )
            cls.__signature__ = arguments.full_signature(cls, LoRALayer)
            kernel = getattr(cls.plain_class, cls.kernel_name or "", None)
            if isinstance(kernel, property):
                setattr(cls, cls.kernel_name, watch_kernel(kernel))

    def __init__(
        self,
        *args,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        a_initializer=None,
        b_initializer=None,
        merge_weights: bool = True,
        **kwargs,
    ):
        arguments.refuse_foreign_keywords(type(self).__name__, kwargs)
        method = methods.take_method(kwargs)
        frozen_start = kwargs.pop("frozen_start", False)  # only in configurations
        adapters = kwargs.pop("adapters", {})  # only in configurations
        if self.keras_dropout:
            kwargs["dropout"], dropout = dropout, 0.0
        if kwargs.get("name") is None:
            kwargs["name"] = arguments.default_name(type(self))
        super().__init__(*args, **kwargs)
        self.merge_weights = bool(merge_weights)
        if settings.validate_rank(rank, lowest=0):
            self.check_host(self)
            options = {
                "rank": rank,
                "alpha": alpha,
                "dropout": dropout,
                "use_rslora": use_rslora,
                "use_dora": use_dora,
                "a_initializer": a_initializer,
                "b_initializer": b_initializer,
                "frozen_start": frozen_start,
                "adapters": adapters,
            }
            self.attach_adapters({**options, **method})
            if self.built:  # an Embedding with `weights` is built by its constructor
                with layer_state.name_scope_of(self):
                    self.build_adapters()

    # Methods that a kind implements.

    @classmethod
    def check_host(cls, layer):
        """Raises ValueError if an adapter would not work in the Keras layer."""
        name = f"{cls.kernel_name}_constraint"
        refuse_constraint(layer, name, getattr(layer, name, None))
        quantized_host.refuse_mode(layer, layer.quantization_mode)
        quantized_host.refuse_uncalibrated(layer, cls.kernel_name)
        refuse_keras_adapter(layer)
        if layer.built and not isinstance(
            quantized_host.own_kernel(layer, cls.kernel_name), keras.Variable
        ):
            raise ValueError(
                f"`{cls.kernel_name}` of layer {layer.name!r}, a "
                f"{type(layer).__name__}, is computed and is not a variable, so there "
                "is nothing to freeze."
            )

    def linear(self, inputs, kernel):
        """Applies the layer's own operation: matmul, einsum, gather or convolution."""
        raise NotImplementedError

    def low_rank_form(self, rank: int) -> LowRankForm:
        """Returns the `LowRankForm` of the built kernel for a rank."""
        raise NotImplementedError

    def input_rows(self, inputs):
        """Returns inputs as the rows (n, fan in) that W multiplies.

        None if W does not multiply rows.
        """
        return None

    def over_outputs(self, bias):
        """Reshapes a bias so that it can be added to the outputs."""
        return bias

    def finish(self, outputs):
        """Adds the bias and applies the activation."""
        bias, activation = (getattr(self, x, None) for x in ("bias", "activation"))
        if bias is not None:
            outputs = ops.add(outputs, self.over_outputs(bias))
        return outputs if activation is None else activation(outputs)

    # The only methods that read W.

    @property
    def frozen_kernel(self):
        """The variable W, under the same name for every kind."""
        if self.is_quantized:
            return quantized_host.own_kernel(self, self.kernel_name)
        kernel = getattr(self.plain_class, self.kernel_name, None)
        if isinstance(kernel, property):
            return kernel.fget(self)
        return getattr(self, self.kernel_name)

    @property
    def kernel_shape(self) -> tuple:
        if "kernel_shape" in vars(self):  # set by Keras's Dense for GPTQ and AWQ
            return tuple(vars(self)["kernel_shape"])
        kernel = self.kernel_values() if self.is_quantized else self.frozen_kernel
        return tuple(kernel.shape)

    @kernel_shape.setter
    def kernel_shape(self, shape):
        vars(self)["kernel_shape"] = shape

    def base_kernel(self, dtype):
        """Returns W as a tensor of a dtype, dequantized if it is quantized."""
        if self.is_quantized:
            return self.dequantized_kernel(dtype)
        return super().base_kernel(dtype)

    def frozen_linear(self, inputs):
        """linear(inputs, W), without a gradient of W."""
        if self.is_quantized:
            return self.quantized_linear(inputs)
        kernel = ops.stop_gradient(self.base_kernel(self.compute_dtype))
        return self.linear(inputs, kernel)

    def apply_kernel(self, inputs, kernel):
        """linear(inputs, kernel) for a kernel of another dtype, rounded once."""
        return self.linear(inputs, ops.cast(kernel, self.compute_dtype))

    # Methods that all kinds share.

    def sites(self) -> dict:
        """Weight -> site, of those that have an adapter."""
        return {} if self.lora is None else {self.weight_name: self}

    @property
    def loras(self) -> dict:
        """Weight -> adapter."""
        return {weight: site.lora for weight, site in self.sites().items()}

    @property
    def weight_name(self):
        return self.kernel_name

    @property
    def factor_regularizer(self):
        return getattr(self, f"{self.kernel_name}_regularizer", None)

    def attach_adapters(self, options):
        """Gives the layer the adapters of its constructor's options."""
        self.refuse_dropout(options)
        del options["adapters"]
        self.attach_adapter(methods.make_adapter(options, self.variable_dtype))

    def refuse_dropout(self, options):
        if settings.validate_dropout(options["dropout"]) > 0 and not self.takes_dropout:
            raise ValueError(
                f"`dropout` must be 0 for {type(self).__name__}: the adapter has no "
                f"inputs that could be dropped. Received: dropout={options['dropout']}."
            )

    def build_adapters(self):
        for site in self.sites().values():
            site.build_adapter()
            site.freeze_kernel()

    def build(self, input_shape=None):
        super().build(input_shape)
        self.after_build()

    def after_build(self):
        self.build_adapters()
        for variable in layer_state.own_variables(self):
            if variable.name in self.frozen_names:
                variable.trainable = False

    def call(self, inputs, training=None):
        return self.call_with_adapter(inputs, training)

    def call_with_adapter(self, inputs, training, **options):
        """Calls the layer with its adapter or stand-in.

        options: Further arguments of the Keras layer's own call.
        """
        if hasattr(inputs, "with_flat_values"):  # TensorFlow's ragged tensors
            values = self.call_with_adapter(inputs.flat_values, training, **options)
            return inputs.with_flat_values(values)
        host = None if self.lora is None else self.host(inputs, **options)
        if host is None:
            return self.plain_call(inputs, **options)
        training = rematerialized.training_of(self.lora, training)
        if calls.is_traced(training):
            return ops.cond(
                training,
                lambda: self.call_with_adapter(inputs, True, **options),
                lambda: self.call_with_adapter(inputs, False, **options),
            )
        strategy = self.lora.stand_in or self.lora
        return host.finish(strategy.outputs(host, inputs, training))

    def host(self, inputs):
        """Returns the layer that the adapter acts on, or None if it does not act."""
        return self

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Keras's own adapter was requested for {self.name!r}, a "
            f"{type(self).__name__}, which has an adapter of its own. Choose its rank "
            "with `rank=` when it is constructed, or call "
            "`keras_lora.merge_lora(model)` first."
        )

    enable_dora = enable_lora  # in coming releases of Keras

    # Configuration and files.

    def get_config(self):
        options = {**self.adapter_config(), "merge_weights": self.merge_weights}
        if self.trainable and self.loras:
            own = layer_state.own_variables(self)
            frozen = [v.name for v in own if not v.trainable]
            options |= {"frozen": frozen} if frozen else {}
        return {**super().get_config(), **options}

    def adapter_config(self):
        """The constructor's arguments for these adapters."""
        return {"rank": 0} if self.lora is None else self.lora.options()

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        frozen = config.pop("frozen", ())
        layer = super().from_config(config)
        layer.frozen_names = tuple(frozen)
        return layer

    def save_own_variables(self, store):
        super().save_own_variables(TrainedValues(store))
        if self.loras:
            # With this extra entry a plain layer refuses the file. Without it, some
            # plain layers would silently ignore A and B.
            store["adapter"] = max(x.settings.rank for x in self.loras.values())

    def load_own_variables(self, store):
        names = [name for name in store.keys() if name != "adapter"]  # noqa: SIM118
        if self.loras and layer_state.own_variables(self) and not list(store.keys()):
            raise ValueError(
                f"The file has no weights for {self.name!r}, a {type(self).__name__}. "
                "If it is the file of a plain model, load it into the plain model and "
                "call keras_lora.apply_lora on that, or copy its weights: "
                "`lora_layer.set_weights(plain_layer.get_weights())`."
            )
        super().load_own_variables({name: store[name] for name in names})

    def set_weights(self, weights):
        """Sets all weights; those of the plain layer alone leave A and B unchanged."""
        variables = self.plain_weights()
        if not self.loras or len(weights) != len(variables):
            return super().set_weights(weights)
        for variable, value in zip(variables, weights, strict=True):
            if tuple(variable.shape) != tuple(value.shape):
                raise ValueError(
                    f"The weight {variable.path!r} has the shape {variable.shape}. "
                    f"Received: {tuple(value.shape)}. Give the weights of a plain "
                    "layer of the same settings, in the order of its get_weights()."
                )
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value)
        for lora in self.loras.values():
            if lora.has_gain and not torch_layout.to_numpy(lora.delta()).any():
                lora.start_from_kernel()  # m of a new DoRA adapter starts from W
        return None

    def plain_weights(self):
        """The variables of the plain layer, in the order of its `weights`."""
        sites = [site for site in self.sites().values() if site.lora.kernel_place]
        moved = {id(site.frozen_kernel) for site in sites}
        moved |= {id(v) for lora in self.loras.values() for v in lora.weights}
        variables = [v for v in self.weights if id(v) not in moved]
        for site in reversed(sites):  # in the reverse order of freezing
            variables.insert(site.lora.kernel_place.position, site.frozen_kernel)
        return variables


def has_adapters(layer):
    """Whether a layer has an adapter at one of its sites."""
    return isinstance(layer, LoRALayer) and bool(layer.sites())


def is_adapted(site):
    """Whether this is a site that has an adapter, such as a layer with one kernel."""
    is_site = isinstance(site, Site) and site.weight_name is not None
    return is_site and site.lora is not None
