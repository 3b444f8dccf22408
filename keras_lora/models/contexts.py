"""Contexts in which a model's adapters are merged, or switched off."""

import contextlib
import threading

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import (
    compiled,
    distribution,
    layer_state,
    variable_state,
    warn_caller,
)
from keras_lora.layers import quantized_host, saved_values
from keras_lora.layers.adapter import FixedKernel
from keras_lora.models import merge, training_state
from keras_lora.models.sites import built_sites, sites_outside_contexts

UNTRAINED = (
    "Adapters do not train inside `{}(model)`: they are frozen there, and heads and "
    "biases may have other values. Leave the context first."
)

CHANGING = threading.Lock()  # contexts of several threads may overlap


def merged(model: keras.layers.Layer):
    """Merges all adapters inside a `with` block, so calls cost as in a plain model.

    W is not changed: W + delta is kept separately and dropped at the end. The block is
    for inference: `fit` and `train_on_batch` raise an error, also for models that
    contain this one. A model that is saved inside is saved with its W, A and B.
    `disabled` can be used inside and gives the base model. The context belongs to the
    model, not to a thread: all threads that call the model see the same.

    Args:
        model: Any Keras model or layer that holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA layer, a kernel is quantized, values are not
            finite, or the model is inside `merged` or `disabled` already.

    Examples:
        >>> with keras_lora.merged(model):
        ...     predictions = model.predict(x, verbose=0)
    """
    sites = sites_outside_contexts(model)
    for site in sites:
        if site.is_quantized:
            raise ValueError(
                f"The kernel of {site.name!r} is quantized. W + delta would be a "
                "float kernel, which gives other outputs than the model and needs the "
                "memory that was saved. Call the model as it is, or merge permanently: "
                'merge_lora(model, quantized="dequantize").'
            )
        merge.refuse_factors_not_finite(site)
    return _merged(model)


@contextlib.contextmanager
def _merged(model):
    sites = sites_outside_contexts(model)  # as they are at entry
    functions = compiled.take_compiled_functions(layer_state.flatten_layers(model))
    refusing = compiled.refusing_to_train(model, UNTRAINED.format("merged"))
    try:
        with standing_in(sites), refusing:
            yield model
    finally:
        compiled.take_compiled_functions(layer_state.flatten_layers(model))
        for owner, name, function in functions:
            setattr(owner, name, function)


def disabled(model: keras.layers.Layer):
    """Switches the adapters off inside a `with` block, which gives the base model.

    Heads and biases that trained together with A and B have their values from before
    the training inside the block; files and copies made there hold the trained values.
    The adapters are off wherever the layers are called, also in functions that were
    traced before: these read the scaling, which is 0 inside. A call costs as much as
    with adapters. `fit` and `train_on_batch` raise an error, also for models that
    contain this one. If your own training loop changes heads and biases inside, these
    changes are lost at the end, with a warning. Contexts can be nested. They belong to
    the model, not to a thread.

    Layers are switched one after the other: a call that runs in another thread while
    the context is entered or left may see some with their adapters and some without.

    Args:
        model: Any Keras model or layer that holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA layer.

    Examples:
        >>> with keras_lora.disabled(model):
        ...     without = model.predict(x, verbose=0)
    """
    built_sites(model)
    training_state.warn_of_variables_without_base(layer_state.flatten_layers(model))
    return _disabled(model)


@contextlib.contextmanager
def _disabled(model):
    sites = built_sites(model)
    values = [
        pair
        for layer in layer_state.flatten_layers(model)
        for pair in training_state.base_values(layer)
    ]
    # Inside `merged`, its kernels get the values of W too.
    kernels = [
        (site.lora.stand_in.kernel, site.frozen_kernel)
        for site in sites
        if site.lora.stand_in is not None
    ]
    refusing = compiled.refusing_to_train(model, UNTRAINED.format("disabled"))
    adapters = [site.lora for site in sites]
    with (
        refusing,
        switched_off(adapters),
        saved_values.temporary_values(values + kernels, CHANGING),
    ):
        yield
        warn_of_lost_training(values)


@contextlib.contextmanager
def switched_off(adapters):
    with CHANGING:
        for adapter in adapters:
            adapter.switch(on=False)
    try:
        yield
    finally:
        with CHANGING:
            for adapter in adapters:
                adapter.switch(on=True)


def warn_of_lost_training(values):
    """values: [(variable, its value at entry)]."""
    changed = [
        variable.path
        for variable, value in values
        if saved_values.is_held_once(variable)
        and not np.array_equal(
            distribution.fetch(variable),
            distribution.fetch(ops.cast(value, variable.dtype)),
        )
    ]
    if changed:
        warn_caller(
            f"{', '.join(changed)} changed inside `disabled(model)`. The values from "
            "before are restored now, so the change is lost. Train outside the "
            "context."
        )


@contextlib.contextmanager
def standing_in(sites):
    """Replaces adapters by fixed, merged kernels; W itself is not written."""
    stand_ins = [
        FixedKernel(kernel_variable(site, merge.finite_merged_kernel(site)))
        for site in sites
    ]
    try:
        for site, stand_in in zip(sites, stand_ins, strict=True):
            site.lora.stand_in = stand_in
            variable_state.track_resource(site.lora, "stand_in", stand_in.kernel)
        yield stand_ins
    finally:
        for site in sites:
            if site.lora.stand_in is not None:
                site.lora.stand_in = None
                variable_state.untrack_resource(site.lora, "stand_in")


@contextlib.contextmanager
def listing_merged_kernels(model):
    """Yields the model with W + delta listed among its weights instead of W, A and B.

    Calls compute as before, in other threads too; only `export` sees other weights.
    """
    sites = sites_outside_contexts(model)
    for site in sites:
        merge.refuse_factors_not_finite(site)
    # Quantized ones keep A and B.
    floats = [site for site in sites if not site.is_quantized]
    with contextlib.ExitStack() as undo:
        for site, stand_in in zip(
            floats, undo.enter_context(standing_in(floats)), strict=True
        ):
            undo.enter_context(
                layer_state.listed_instead(
                    site.kernel_owner(), site.frozen_kernel, stand_in.kernel
                )
            )
            undo.enter_context(layer_state.unlisted(site.lora_layer(), site.lora))
        layer_state.refresh_torch_parameters(layer_state.flatten_layers(model))
        undo.enter_context(quantized_host.tracing_artifact())
        yield model
    layer_state.refresh_torch_parameters(layer_state.flatten_layers(model))


def kernel_variable(site, values):
    """Returns a variable with the merged kernel, to list instead of the site's own."""
    return distribution.variable_like(
        site.frozen_kernel,
        values,
        dtype=site.frozen_kernel.dtype,
        trainable=False,
        autocast=False,
        name=site.frozen_kernel.name,
    )
