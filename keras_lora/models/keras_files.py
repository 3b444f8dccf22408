"""Layers and models that carry their adapters through `.keras` files and copies.

The configuration of a layer such as MultiHeadAttention, of a block or of a subclassed
model cannot name the adapters of its sublayers. So every owner of adapted layers gets a
subclass of its class, whose configuration has the plain class's and the settings of the
adapters. Inner owners get one too, because a new model may take only a part.
"""

import functools

import keras

from keras_lora.keras_internals import calls, classes, compiled, layer_state
from keras_lora.layers import kinds, lora_layer, quantized_host
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.rematerialized import Rematerialized
from keras_lora.layers.saved_values import TrainedValues
from keras_lora.models import presets, quantized, sites, training_state

# All these classes have one name, because they share `from_config`.
register = keras.saving.register_keras_serializable("keras_lora", "Adapted")


@keras.saving.register_keras_serializable("keras_lora", "AdaptedModel")  # old files
@register
class Carrier(Rematerialized):
    """Mixin for the class of a model or layer that holds adapted layers."""

    carried_class = None  # the user's or Keras's class

    def get_config(self):
        if calls.legacy_format():
            refuse_legacy_format(self)
        layers_by_path = sites.Paths(self, alone=False).with_model
        carried = {
            p: x for p, x in layers_by_path.items() if not isinstance(x, LowRankAdapter)
        }
        with_adapter = {
            path: x for path, x in carried.items() if lora_layer.has_adapters(x)
        }
        records = {
            path: training_state.record_of(layer) for path, layer in carried.items()
        }
        view = classes.view_as(self, presets.plain_class_of(type(self)))
        plain = keras.saving.serialize_keras_object(view)
        for key in ("compile_config", "shared_object_id"):  # those of the view
            plain.pop(key, None)
        return {
            "requires": "import keras_lora",
            "layer": plain,
            "adapters": {
                p: x.lora.options()
                for p, x in with_adapter.items()
                if lora_layer.is_adapted(x)
            },
            "weight_adapters": {
                p: {w: s.lora.options() for w, s in x.sites().items() if s is not x}
                for p, x in with_adapter.items()
            },
            # Path -> index among the layers; -1 is the model itself.
            "places": {path: index - 1 for index, path in enumerate(carried)},
            "quantized": quantized.quantizations(carried),
            "merge_weights": {p: x.merge_weights for p, x in with_adapter.items()},
            "trainable": training_state.trainable_flags(layers_by_path),
            "trainable_before": {
                p: list(r.flags) for p, r in records.items() if r.flags is not None
            },
            "trained_beside": {
                p: list(r.base_values) for p, r in records.items() if r.base_values
            },
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        if "adapters" not in config:  # of the plain class
            return cls.carried_class.from_config(config)
        model = keras.saving.deserialize_keras_object(
            presets.plain_part(config), custom_objects=custom_objects
        )
        paths = sites.Paths(model, alone=False)
        inside, layers_by_path = paths.layers, paths.with_model
        carried = [p for p, x in inside.items() if not isinstance(x, LowRankAdapter)]
        # A model may give its layers other names once it has a name itself.
        indices = config["places"].items()
        present_paths = {p: carried[n] for p, n in indices if 0 <= n < len(carried)}
        present_paths |= {path: path for path in layers_by_path}
        for path, how in config.get("quantized", {}).items():
            quantized.quantize_again(layers_by_path.get(present_paths.get(path)), *how)
        adapters = []
        one = {path: {None: options} for path, options in config["adapters"].items()}
        several = config.get("weight_adapters", {})
        for path, options_by_weight in [*one.items(), *several.items()]:
            layer = layers_by_path.get(present_paths.get(path))
            if layer is None or not layer.built:
                raise ValueError(
                    f"The configuration of {model.name!r} does not build the layer "
                    f"{path!r}, so its adapter cannot be restored. Build the model as "
                    "you did originally, then `apply_lora` and `load_weights`."
                )
            by_weight = kinds.sites_of(layer)
            for weight, options in options_by_weight.items():
                site = by_weight.get(weight, layer)
                if not lora_layer.is_adapted(site):  # a LoRA layer restores its own
                    adapters.append((site, options))
        for site, options in adapters:
            sites.add_adapter(site, sites.new_adapter(site, options))
        quantized.fix_quantized(layers_by_path.values())
        for path, merge_weights in config["merge_weights"].items():
            layers_by_path[present_paths[path]].merge_weights = merge_weights
        layers_now = sites.Paths(model, alone=False).with_model
        training_state.restore_flags(layers_now, config["trainable"])
        trained_beside = config.get("trained_beside", {})
        for path, present_path in present_paths.items():
            record = training_state.Record(
                config["trainable_before"].get(path),
                dict.fromkeys(trained_beside.get(path, ())),
            )
            training_state.set_record(layers_by_path[present_path], record)
        use_carrier_classes(model)
        return model

    def save_own_variables(self, store):
        super().save_own_variables(TrainedValues(store))
        if presets.is_saved_as_plain(self):
            return
        names = training_state.base_value_names(self, Carrier)
        for name, (layer, index) in names.items():
            value = training_state.record_of(layer).base_values[index]
            if value is not None:
                store[name] = value

    def load_own_variables(self, store):
        values = {name: store[name] for name in store.keys()}  # noqa: SIM118
        names = training_state.base_value_names(self, Carrier)
        for name, (layer, index) in names.items():
            training_state.set_base_value(layer, index, values.get(name))
        prefix = training_state.BASE_PREFIX
        super().load_own_variables(
            {name: x for name, x in values.items() if not name.startswith(prefix)}
        )

    def quantize(self, mode=None, config=None, **kwargs):
        for site in sites.adapted_sites(self):
            quantized_host.refuse_quantizing(site, mode)  # before any change
        super().quantize(mode, config=config, **kwargs)
        quantized.fix_quantized(layer_state.flatten_layers(self))

    def build_from_config(self, config):
        """Does nothing: `from_config` has built the layers, to attach the adapters."""

    def __reduce__(self):
        # The inherited result names a method of this class, which cannot be imported.
        load, arguments = super().__reduce__()
        return getattr(keras.layers.Layer, load.__name__), arguments


@functools.cache
def carrier_class(cls):
    """The subclass of a layer's class that carries adapters.

    It has the plain class's name, which decides where weights lie in files, and a
    module of this package: if that is not imported, Keras says so instead of using the
    plain class.
    """
    members = {"__module__": __name__, "carried_class": cls}
    for method in (save, presets.save_to_preset, make_train_function):
        if hasattr(cls, method.__name__):
            members[method.__name__] = method
    members |= {
        name: protect(getattr(cls, name))
        for name in compiled.LOOPS
        if hasattr(cls, name)
    }
    carrier = type(cls.__name__, (Carrier, cls), members)
    register(carrier)
    # The mixin keeps the name: KerasHub would find a registered subclass when it looks
    # for the task of a preset.
    register(Carrier)
    return carrier


def protect(loop):
    """Wraps a method that runs a model, so that an error cannot lose its weights.

    On JAX, Keras takes the weights out of the model before a call can raise.
    """

    @functools.wraps(loop)
    def run(self, *args, **kwargs):
        with calls.keeping_weights(self):
            return loop(self, *args, **kwargs)

    return run


def save(self, filepath, *args, **kwargs):
    """Refuses what cannot be saved before Keras opens the file, which empties it."""
    layer_state.flatten_layers(
        self
    )  # refuses layers that another copy of this package adapted
    if str(filepath).endswith((".h5", ".hdf5")):
        refuse_legacy_format(self)
    self.carried_class.save(self, filepath, *args, **kwargs)


def make_train_function(self, force=False):
    """Remembers what trains: Keras calls this method when training begins."""
    begins = force or self.train_function is None
    self.carried_class.make_train_function(self, force)
    if begins:
        training_state.remember_what_trains(layer_state.flatten_layers(self))
        use_carrier_classes(self)


def refuse_legacy_format(model):
    raise ValueError(
        f"{model.name!r} has adapters, which the .h5 format cannot store. Save it as "
        ".keras, or write the adapters alone with `save_adapter`."
    )


def layers_to_carry(model):
    """The layers whose own configuration cannot restore them.

    They hold adapted layers, have a class that was made at run time, or train together
    with A and B.
    """
    for layer in layer_state.flatten_layers(model):
        if isinstance(layer, Carrier):
            continue
        if isinstance(layer, LoRALayer):
            inside = parts(layer)
            flags = any(x.trainable != layer.trainable for x in inside)
            if flags or not presets.is_registered(type(layer)):
                yield layer
        elif (
            training_state.record_of(layer).base_values
            or any(map(lora_layer.has_adapters, layer_state.flatten_layers(layer)))
            or any(
                v.trainable != layer.trainable for v in layer_state.own_variables(layer)
            )
        ):
            yield layer


def parts(layer):
    """The layers inside a LoRA layer, such as a cell, but not its adapters."""
    inside = [x for x in layer_state.flatten_layers(layer) if x is not layer]
    return [x for x in inside if not isinstance(x, LowRankAdapter)]


def use_carrier_classes(model):
    """Gives layers the class that carries adapters where they need it."""
    for layer in list(layers_to_carry(model)):
        classes.change_class(layer, carrier_class(type(layer)))
    layer_state.refresh_torch_parameters(layer_state.flatten_layers(model))
