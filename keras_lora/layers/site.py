"""Site: one weight of one layer, and checks whether it can be adapted."""

from typing import Any

import keras
from keras import ops

from keras_lora.keras_internals import (
    calls,
    classes,
    distribution,
    layer_state,
    variable_state,
)
from keras_lora.layers.torch_layout import TorchLayout


def refuse_constraint(layer, name, constraint):
    """Raises if W has a constraint, which A and B could not keep."""
    if constraint is not None:
        raise ValueError(
            f"`{name}` of layer {layer.name!r} cannot be kept by a low-rank update. "
            f"Received: {constraint!r}. Leave it out, or use rank=0."
        )


def refuse_keras_adapter(layer):
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"The layer {layer.name!r} has Keras's own adapter (`enable_lora`). Save "
            "the model and load it again, which merges that adapter, and then adapt "
            "it."
        )


def refuse_bound_functions(layer):
    """Raises if a layer holds functions that would compute with W alone.

    The layer's call runs on a view with W + delta; such functions use the layer itself.
    """
    names = classes.bound_functions(layer)
    if names:
        raise ValueError(
            f"The layer {layer.name!r} keeps {' and '.join(map(repr, names))}, created "
            "from one of its methods, in which an adapter would have no effect. "
            "Create it in `call`, as keras.remat(lambda x: self.method(x))(x), or "
            "leave the layer out with `exclude`."
        )
    refuse_remat_of_weights(layer)


def refuse_remat_of_weights(layer):
    """Raises if TensorFlow may have no gradient for W + delta.

    Under `keras.remat`, it has gradients only for variables.
    """
    if keras.backend.backend() == "tensorflow" and classes.calls_remat(layer):
        raise ValueError(
            f"The layer {layer.name!r}, a {type(layer).__name__}, calls keras.remat, "
            "under which TensorFlow has no gradient for A and B. Make the layer in a "
            "keras.RematScope instead, or leave it out with `exclude`."
        )


def watch_kernel(kernel):
    """Wraps the kernel's property, to warn if another layer computes with the kernel.

    This package reads W by `frozen_kernel`. Any read of the property inside a call
    therefore comes from another layer, which gets W without the adapter.
    SpectralNormalization reads it when it is built, and is refused there, because an
    error in `fit` on JAX would cost the weights.
    """

    def read(layer):
        if layer.lora is None:
            return kernel.fget(layer)
        if isinstance(calls.innermost_layer(), keras.layers.SpectralNormalization):
            raise ValueError(
                "SpectralNormalization assigns to its layer's kernel in every training "
                f"call, and that of {layer.name!r} is frozen, as it has an adapter. "
                "Wrap the plain layer, or use the LoRA layer without the wrapper."
            )
        variable_state.warn_of_read(f"kernel of {layer.name!r}")
        return kernel.fget(layer)

    return property(read, doc=kernel.__doc__)


class Site(TorchLayout):
    """One weight W of one layer, with its form and its adapter.

    All functions over models use sites. A layer with one kernel is its own site, under
    its own path; a layer with several weights has a `WeightSite` for each.

    Attributes:
        lora: The adapter, or None.
        lora_class: The LoRA class that adapts it.
        weight_name: The name of W, the key of `layer.loras`.
        frozen_kernel: The variable W.
        kernel_is_matrix: Whether W is a matrix, or a stack of them, that multiplies
            rows of inputs (`input_rows`), so that `initialize_lora` can decompose it.
        in_all_linear: Whether the target "all-linear" includes it.
        takes_dropout: Whether the adapter has its own inputs, to which dropout applies.
    """

    lora: Any = None
    adapter_attribute = "lora"  # of the LoRA layer
    kernel_is_matrix = False
    in_all_linear = True
    takes_dropout = True

    @property
    def is_quantized(self) -> bool:
        return False

    def lora_layer(self):
        """Returns the layer whose call uses the adapter."""
        return self

    def kernel_owner(self):
        """Returns the layer that holds W: a cell, inside a recurrent layer."""
        return self

    @property
    def lora_class(self):
        return type(self)

    @property
    def factor_regularizer(self):
        """The regularizer of W, which acts on A and B instead."""
        return self.frozen_kernel.regularizer

    @property
    def form(self):
        return self.lora.form

    def low_rank_form(self, rank):
        """Returns the `LowRankForm` of the kernel for a rank."""
        raise NotImplementedError

    def base_kernel(self, dtype):
        """Returns W as a tensor of a dtype."""
        kernel = variable_state.without_watch(self.frozen_kernel)
        return ops.cast(ops.convert_to_tensor(kernel), dtype)

    def merged_kernel(self, dtype):
        """The merged kernel W + delta, rounded once."""
        kernel = self.base_kernel(self.lora.variable_dtype)
        return ops.convert_to_tensor(self.lora.effective_kernel(kernel), dtype)

    def attach_adapter(self, adapter):
        layer_state.attach(self.lora_layer(), self.adapter_attribute, adapter)

    def detach_adapter(self):
        layer_state.detach(self.lora_layer(), self.adapter_attribute)

    def build_adapter(self):
        """Creates A and B for W."""
        form = self.low_rank_form(self.lora.rank)
        layout = distribution.layout_of(self.frozen_kernel)
        axes = {} if layout is None else self.lora.factor_axes(form, layout.axes)
        with distribution.laid_out_by(axes, layout):
            self.lora.build(form, self.factor_regularizer, self.base_kernel)

    def freeze_kernel(self):
        """Freezes W, and remembers its old position for `release_kernel`."""
        if self.is_quantized:  # then it is frozen already
            variable_state.mark_frozen(self.frozen_kernel)
            self.warn_of_quantization()
        else:
            self.lora.kernel_place = variable_state.freeze(
                self.kernel_owner(), self.frozen_kernel
            )

    def release_kernel(self, place):
        """Makes W trainable again; `place`, its old position, is None if quantized."""
        if place is None:
            variable_state.mark_frozen(self.frozen_kernel, False)
        else:
            variable_state.unfreeze(self.kernel_owner(), self.frozen_kernel, place)
