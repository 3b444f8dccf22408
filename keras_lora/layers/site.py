"""The site: one weight W of one layer, with its form and its adapter."""

from typing import Any

from keras import ops

from keras_lora.keras_internals.distribution import layout_of
from keras_lora.keras_internals.layers import attach
from keras_lora.keras_internals.layers import detach
from keras_lora.keras_internals.layers import freeze
from keras_lora.keras_internals.layers import mark_frozen
from keras_lora.keras_internals.layers import unfreeze
from keras_lora.layers.torch_layout import TorchLayout


class Site(TorchLayout):
    """One weight W of one layer, with its form and its adapter.

    It is what all functions over models go through. A layer with one kernel is its
    own site, under its own path; a layer with several has a `WeightSite` for each.

    Attributes:
        lora: The adapter, or None.
        lora_layer: The layer in whose call the adapter acts.
        lora_class: The LoRA class that adapts it.
        kernel_owner: The layer that holds W: a cell, inside a recurrent layer.
        weight_name: The name of W, the key of `layer.loras`.
        frozen_kernel: The variable W.
        kernel_is_matrix: Whether W is a matrix, or a stack of them, that multiplies
            the inputs' rows (`input_rows`): what `initialize_lora` can decompose.
        in_all_linear: Whether the target "all-linear" means it.
        takes_dropout: Whether the adapter has inputs of its own that can be dropped.
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
        return self

    def kernel_owner(self):
        return self

    @property
    def lora_class(self):
        return type(self)

    @property
    def factor_regularizer(self):
        """That of W, which A and B take over: they train in its place."""
        return self.frozen_kernel.regularizer

    @property
    def form(self):
        return self.lora.form

    def low_rank_form(self, rank):
        """How a kernel of this shape is made of A and B."""
        raise NotImplementedError

    def base_kernel(self, dtype):
        """W as a value."""
        return ops.cast(ops.convert_to_tensor(self.frozen_kernel), dtype)

    def merged_kernel(self, dtype):
        """The merged kernel W + delta, rounded once."""
        kernel = self.base_kernel(self.lora.variable_dtype)
        return ops.cast(self.lora.effective_kernel(kernel), dtype)

    def attach_adapter(self, adapter):
        attach(self.lora_layer(), self.adapter_attribute, adapter)

    def detach_adapter(self):
        detach(self.lora_layer(), self.adapter_attribute)

    def build_factors(self):
        """Makes A and B to fit W."""
        form = self.low_rank_form(self.lora.rank)
        self.lora.build(form, self.factor_regularizer, self.base_kernel)
        layout = layout_of(self.frozen_kernel)
        if layout is not None:
            self.lora.lay_out_factors(layout)

    def build_adapter(self):
        """Makes A and B to fit W, and freezes W."""
        self.build_factors()
        if self.is_quantized:  # and born frozen
            mark_frozen(self.frozen_kernel)
            self.warn_of_quantization()
        else:
            self.lora.kernel_place = freeze(self.kernel_owner(), self.frozen_kernel)

    def release_kernel(self, place):
        """Makes W trainable again, at its old position; None if it is quantized."""
        if place is None:
            mark_frozen(self.frozen_kernel, False)
        else:
            unfreeze(self.kernel_owner(), self.frozen_kernel, place)
