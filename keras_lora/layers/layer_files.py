"""What a LoRA layer writes into configurations and Keras's weight files."""

from keras_lora.keras_internals.layers import own_variables
from keras_lora.layers.trained_values import TrainedValues


class LayerFiles:
    """Mixin before the Keras class: the adapter's settings, and what is frozen."""

    def get_config(self):
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
                "call keras_lora.apply_lora on that."
            )
        super().load_own_variables({name: store[name] for name in names})
