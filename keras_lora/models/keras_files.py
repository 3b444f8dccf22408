"""Models that carry their adapters through `.keras` files.

The configuration of a layer such as MultiHeadAttention, or of a subclassed model,
cannot name the adapters of its sublayers. So the model gets a subclass of its own
class, whose configuration is the plain model's beside the adapters' settings.
"""

import contextlib
import functools
import types

import keras

from keras_lora.keras_internals import change_class
from keras_lora.keras_internals import flatten_layers
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.adapter import make_adapter
from keras_lora.models.adapt import adopted
from keras_lora.models.paths import layer_paths
from keras_lora.models.trainable_flags import restore_trainable_state
from keras_lora.models.trainable_flags import trainable_state

# All adapted classes under one name, as `from_config` is the same for each of them.
register = keras.saving.register_keras_serializable("keras_lora", "AdaptedModel")


@register
class AdaptedModel:
    """Mixin before the class of a model that went through `apply_lora`."""

    def get_config(self):
        layers = layer_paths(self)
        state = self._adapted
        adapters = {path: layers[path].lora.options() for path in state.paths}
        plain = [p for p, x in layers.items() if not isinstance(x, LowRankAdapter)]
        places = {path: place for place, path in enumerate(plain)}
        with plain_classes(self):
            model = keras.saving.serialize_keras_object(self)
        model.pop("compile_config", None)
        return {
            "model": model,
            "adapters": adapters,
            "places": {path: places[path] for path in state.paths},
            "merge_weights": {p: layers[p].merge_weights for p in state.paths},
            "trainable": trainable_state(self),
            "trainable_before": state.trainable_before,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        model = keras.saving.deserialize_keras_object(
            config["model"], custom_objects=custom_objects
        )
        layers = layer_paths(model)
        paths, adapters = list(layers), {}
        for path, options in config["adapters"].items():
            # A model that has got a name may give its layers others than before.
            own = path if path in layers else paths[config["places"][path]]
            layer = layers[own]
            adapters[own] = layer, make_adapter(options, layer.variable_dtype)
        with adopted(model, adapters) as undo:
            undo.pop_all()
        merge_weights = config["merge_weights"].values()
        for (layer, _), merge in zip(adapters.values(), merge_weights, strict=True):
            layer.merge_weights = merge
        mark_adapted(model, list(adapters), config["trainable_before"])
        restore_trainable_state(model, config["trainable"])
        return model

    def build_from_config(self, config):
        """Built in `from_config`, before the adapters could be attached."""


def mark_adapted(model, paths, trainable_before):
    """Remembers what `apply_lora` did, for saving and for undoing it."""
    # In a namespace, which Keras does not track.
    model._adapted = types.SimpleNamespace(
        paths=paths, trainable_before=trainable_before, plain_class=type(model)
    )
    if isinstance(model, keras.Model):
        change_class(model, adapted_class(type(model)))


def restore_models(model):
    """The classes and trainable flags that models had before `apply_lora`."""
    for layer in flatten_layers(model):
        state = getattr(layer, "_adapted", None)
        if state is not None:
            change_class(layer, state.plain_class)
            del layer._adapted
            restore_trainable_state(layer, state.trainable_before)


@functools.cache
def adapted_class(cls):
    adapted = type(cls.__name__, (AdaptedModel, cls), {"__module__": cls.__module__})
    register(adapted)
    # Behind the name stands the mixin: a class that is listed there is taken for one
    # of KerasHub's own when it looks for the task of a preset.
    register(AdaptedModel)
    return adapted


@contextlib.contextmanager
def plain_classes(model):
    """The model and its adapted layers under the classes they had before."""
    layers = layer_paths(model)
    adapted = [layers[path] for path in model._adapted.paths]
    with contextlib.ExitStack() as undo:
        undo.callback(change_class, model, type(model))
        change_class(model, model._adapted.plain_class)
        for layer in adapted:
            undo.callback(change_class, layer, type(layer))
            change_class(layer, layer.plain_class)
        yield
