"""Layers of a model become LoRA layers all together, or none of them.

Of apply_lora, load_adapter, extract_adapter and mark_only_lora_as_trainable.
"""

import contextlib
import dataclasses

from keras_lora.keras_internals import processes
from keras_lora.keras_internals.classes import change_class
from keras_lora.keras_internals.compiled import bring_weights_back
from keras_lora.keras_internals.compiled import compile_again
from keras_lora.keras_internals.distribution import own_strategy
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import refresh_torch_parameters
from keras_lora.layers.kinds import layer_of
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.models.adapt import adapt
from keras_lora.models.adapt import make_plain
from keras_lora.models.adapt import new_adapter
from keras_lora.models.keras_files import adapted_class
from keras_lora.models.keras_files import carriers
from keras_lora.models.paths import with_model
from keras_lora.models.quantized import mend_plain
from keras_lora.models.record import record_of
from keras_lora.models.record import remember_flags
from keras_lora.models.record import set_record
from keras_lora.models.trainable_flags import restore_trainable_state
from keras_lora.models.trainable_flags import trainable_state


@contextlib.contextmanager
def adapted(model, paths, adapters):
    """The layers of a model are LoRA layers inside, and stay so after `keep()`.

    Without it, or if anything fails, all is as it was: classes, order of weights,
    flags, records, the optimizer and what is compiled.

    Args:
        model: A Keras model or layer.
        paths: Path -> layer, all that the model holds; nothing is walked again.
        adapters: Site -> the arguments of its adapter.
    """
    bring_weights_back(model)
    processes.meet(model)
    layers = with_model(model, paths)
    with own_strategy(model):
        yield from all_or_none(model, layers, adapters)


def all_or_none(model, layers, adapters):
    made = {site: new_adapter(site, options) for site, options in adapters.items()}
    with contextlib.ExitStack() as undo:
        undo.callback(refresh_torch_parameters, flatten_layers(model))
        undo.callback(restore_trainable_state, layers, trainable_state(layers))
        for layer in layers.values():
            undo.callback(set_record, layer, record_of(layer))
            if adapters:
                remember_flags(layer)
        for layer in dict.fromkeys(map(layer_of, made)):
            undo.callback(make_plain_again, layer)
        for site, adapter in made.items():
            adapt(site, adapter)
        for layer in mend_plain(layers.values()):
            undo.callback(make_plain, layer)
        refresh_torch_parameters(flatten_layers(model))
        yield Change(model, undo)


def make_plain_again(layer):
    if isinstance(layer, LoRALayer):
        make_plain(layer)


@dataclasses.dataclass(frozen=True)
class Change:
    """What `adapted` has changed so far."""

    model: object
    undo: contextlib.ExitStack

    def keep(self) -> list:
        """Makes it last; returns what has to be said about optimizers."""
        for layer in list(carriers(self.model)):
            self.undo.callback(change_class, layer, type(layer))
            cls = adapted_class(type(layer))  # type: ignore[arg-type]
            change_class(layer, cls)
        notes = compile_again(self.model)
        self.undo.pop_all()
        return notes
