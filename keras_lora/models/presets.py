"""What KerasHub writes of a task whose backbone has adapters."""

from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import seen_as
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.lora_layer import is_adapted
from keras_lora.models.paths import layer_paths


def plain_class_of(cls):
    """The class under which the configuration is asked for."""
    return cls.plain_class if issubclass(cls, LoRALayer) else cls.plain_owner


def save_to_preset(self, *args, **kwargs):
    """KerasHub finds a task by the class in its file, which must be the plain one."""
    view = self
    if hasattr(self, "backbone"):
        carried = set(map(id, flatten_layers(self.backbone)))
        for path, layer in layer_paths(self).items():
            if is_adapted(layer) and id(layer) not in carried:
                raise ValueError(
                    f"A preset cannot hold the adapter of {path!r}, which lies outside "
                    "the backbone. Save the model as .keras, or its adapters with "
                    "`save_adapter`."
                )
        view = seen_as(self, plain_class_of(type(self)))
    plain_class_of(type(self)).save_to_preset(view, *args, **kwargs)
