"""What a LoRA layer writes into configurations and Keras's weight files."""

from keras_lora.keras_internals.layers import own_variables
from keras_lora.keras_internals.layers import refuse_other_copy
from keras_lora.layers.torch_layout import to_numpy
from keras_lora.layers.trained_values import TrainedValues


class LayerFiles:
    """Mixin before the Keras class: the adapter's settings, and what is frozen."""

    def get_config(self):
        refuse_other_copy(self)
        options = self.adapter_config()
        options["merge_weights"] = self.merge_weights
        if self.trainable and self.loras:
            frozen = [v.name for v in own_variables(self) if not v.trainable]
            options |= {"frozen": frozen} if frozen else {}
        return {**super().get_config(), **options}

    def adapter_config(self):
        """The constructor's arguments that make these adapters."""
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
            # A plain layer refuses a file with one entry more than it has variables;
            # without it some read what they know and leave A and B out, silently.
            store["adapter"] = max(x.settings.rank for x in self.loras.values())

    def load_own_variables(self, store):
        names = [name for name in store.keys() if name != "adapter"]  # noqa: SIM118
        if self.loras and own_variables(self) and not list(store.keys()):
            raise ValueError(
                f"The file has no weights for {self.name!r}, a {type(self).__name__}. "
                "If it is the file of a plain model, load it into the plain model and "
                "call keras_lora.apply_lora on that, or copy its weights: "
                "`lora_layer.set_weights(plain_layer.get_weights())`."
            )
        super().load_own_variables({name: store[name] for name in names})

    def set_weights(self, weights):
        """Also takes the weights of the plain layer, which leave A and B alone."""
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
            if lora.has_gain and not to_numpy(lora.delta()).any():
                lora.start_from_kernel()  # m of a fresh DoRA adapter is W's
        return None

    def plain_weights(self):
        """The variables of the plain layer, in the order of its `weights`."""
        sites = [site for site in self.sites().values() if site.lora.kernel_place]
        moved = {id(site.frozen_kernel) for site in sites}
        moved |= {id(v) for lora in self.loras.values() for v in lora.weights}
        found = [v for v in self.weights if id(v) not in moved]
        for site in reversed(sites):  # as they were moved when they were frozen
            found.insert(site.lora.kernel_place.position, site.frozen_kernel)
        return found
