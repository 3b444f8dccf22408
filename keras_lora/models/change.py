"""Turns layers of a model into LoRA layers, all of them or none.

Used by apply_lora, load_adapter, extract_adapter and mark_only_lora_as_trainable.
"""

import contextlib
import dataclasses

from keras_lora.keras_internals import classes, compiled, distribution, processes
from keras_lora.keras_internals.layers import flatten_layers, refresh_torch_parameters
from keras_lora.layers import kinds
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.models import keras_files, quantized, record, sites
from keras_lora.models.adapt import adapt, make_plain, new_adapter


@contextlib.contextmanager
def adapting(model, paths, adapters):
    """Adapts a model inside the context, and for good if `keep()` is called.

    Otherwise, or if anything fails, everything is restored: classes, order of weights,
    flags, records, the optimizer and compiled functions.

    Args:
        model: A Keras model or layer.
        paths: Path -> layer, for the whole model.
        adapters: Site -> the arguments of its adapter.
    """
    compiled.restore_jax_weights(model)
    processes.meet(model)
    layers = sites.with_model(model, paths)
    with distribution.own_strategy(model), contextlib.ExitStack() as undo:
        made = {site: new_adapter(site, options) for site, options in adapters.items()}
        undo.callback(refresh_torch_parameters, flatten_layers(model))
        undo.callback(
            record.restore_trainable_state, layers, record.trainable_state(layers)
        )
        for layer in layers.values():
            undo.callback(record.set_record, layer, record.record_of(layer))
            if adapters:
                record.remember_flags(layer)
        for layer in dict.fromkeys(map(kinds.layer_of, made)):
            undo.callback(make_plain_again, layer)
        for site, adapter in made.items():
            adapt(site, adapter)
        for layer in quantized.fix_quantized(layers.values()):
            undo.callback(make_plain, layer)
        refresh_torch_parameters(flatten_layers(model))
        yield Change(model, undo)


def make_plain_again(layer):
    if isinstance(layer, LoRALayer):
        make_plain(layer)


@dataclasses.dataclass(frozen=True)
class Change:
    """Changes that can be undone until `keep()` is called."""

    model: object
    undo: contextlib.ExitStack

    def keep(self) -> list:
        """Makes the changes permanent; returns notes about optimizers."""
        for layer in list(keras_files.carriers(self.model)):
            self.undo.callback(classes.change_class, layer, type(layer))
            cls = keras_files.adapted_class(type(layer))  # type: ignore[arg-type]
            classes.change_class(layer, cls)
        notes = compiled.compile_again(self.model)
        self.undo.pop_all()
        return notes
