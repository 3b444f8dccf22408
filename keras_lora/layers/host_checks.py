"""Checks whether a Keras layer can be adapted, and who reads its kernel."""

import keras

from keras_lora.keras_internals.callers import warn_caller
from keras_lora.keras_internals.calls import in_a_call
from keras_lora.keras_internals.classes import bound_functions
from keras_lora.keras_internals.classes import calls_remat
from keras_lora.layers.quantized_host import own_kernel
from keras_lora.layers.quantized_host import refuse_mode
from keras_lora.layers.quantized_host import refuse_uncalibrated


class HostChecks:
    """Mixin of a LoRA layer's class: what it asks of the layer that it extends."""

    @classmethod
    def check_host(cls, layer):
        """Raises ValueError if an adapter would not work in the Keras layer."""
        name = f"{cls.kernel_name}_constraint"
        refuse_constraint(layer, name, getattr(layer, name, None))
        refuse_mode(layer, layer.quantization_mode)
        refuse_uncalibrated(layer, cls.kernel_name)
        refuse_keras_adapter(layer)
        if layer.built and not isinstance(
            own_kernel(layer, cls.kernel_name), keras.Variable
        ):
            raise ValueError(
                f"`{cls.kernel_name}` of layer {layer.name!r}, a "
                f"{type(layer).__name__}, is computed and is not a variable, so there "
                "is nothing to freeze."
            )


def refuse_constraint(layer, name, constraint):
    """Raises if W has a constraint: A and B train, and not W."""
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

    Its call runs on a view, in which W + delta is W; they know the layer itself.
    """
    names = bound_functions(layer)
    if names:
        raise ValueError(
            f"The layer {layer.name!r} keeps {' and '.join(map(repr, names))}, created "
            "from one of its methods, in which an adapter would have no effect. "
            "Create it in `call`, as keras.remat(lambda x: self.method(x))(x), or "
            "leave the layer out with `exclude`."
        )
    refuse_remat_of_weights(layer)


def refuse_remat_of_weights(layer):
    """Raises if TensorFlow may have no gradient for what stands in for W.

    What a function under `keras.remat` reads there has one if it is a variable.
    """
    if keras.backend.backend() == "tensorflow" and calls_remat(layer):
        raise ValueError(
            f"The layer {layer.name!r}, a {type(layer).__name__}, calls keras.remat, "
            "under which TensorFlow has no gradient for A and B. Make the layer in a "
            "keras.RematScope instead, or leave it out with `exclude`."
        )


def watched(kernel):
    """Wraps the kernel's property, to warn if another layer computes with the kernel.

    This library reads W by `frozen_kernel`. What reads the property inside of a call
    is another layer, and it gets W without the adapter.
    """

    def read(layer):
        if layer.lora is not None and in_a_call():
            warn_caller(
                f"A layer reads the kernel of {layer.name!r}, which has an adapter, in "
                "its own call: there the adapter has no effect until it is merged. "
                "Leave that layer out with exclude=, or merge first."
            )
        return kernel.fget(layer)

    return property(read, doc=kernel.__doc__)
