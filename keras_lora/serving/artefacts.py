"""What a bank writes, and what it does not."""

import os
from collections.abc import Callable

from keras import ops

from keras_lora.files.folder import Adapter
from keras_lora.serving.arguments import checked_adapters
from keras_lora.serving.export import export_by_id
from keras_lora.serving.export import export_by_name
from keras_lora.serving.export import swap_arrays
from keras_lora.serving.hosts import Hosts


class Artefacts:
    """Mixin of the bank before keras.Model."""

    _read: Callable
    hosts: Hosts

    def export(self, path: str | os.PathLike, format: str = "tf_saved_model", **kwargs):
        """Writes one artefact that serves all adapters and needs no keras_lora.

        A SavedModel's `serve(inputs, adapter)` takes names as strings, one for each
        row: b"" is the base model, an unknown name an InvalidArgumentError. The
        signature "serving_default" takes the same by name: "adapter" beside the
        model's inputs, which are called by their keys, or "inputs". The signature
        "swap" replaces one adapter in the loaded artefact; `swap_inputs` says what to
        feed it. Other formats take ids, those of `bank.ids` now, as "adapter".

        Args:
            path: Where to write, as in `keras_lora.export`.
            format: "tf_saved_model", or another format of `keras.Model.export`.
            kwargs: Of `keras.Model.export`, for other formats.

        Raises:
            ValueError: If a SavedModel is asked for on another backend than
                TensorFlow, or a subclassed model's inputs are not known.
            OSError: If the artefact cannot be written.
        """
        if self.hosts.input_specs is None:
            raise ValueError(
                "The model does not say what its inputs are. Call the bank once: "
                'bank({"inputs": ..., "adapter": ...}).'
            )
        if format == "tf_saved_model":
            export_by_name(self, path)
        else:
            write = super().export  # type: ignore[misc]
            export_by_id(self, write, path, format=format, **kwargs)

    def swap_inputs(self, name: str, adapter: Adapter | str | os.PathLike) -> dict:
        """Returns the inputs of the artefact's signature "swap" for a new adapter.

        >>> swap = tf.saved_model.load(path).signatures["swap"]  # doctest: +SKIP
        >>> swap(**bank.swap_inputs("french", "adapters/fr-2"))  # doctest: +SKIP
        """
        checked_adapters({name: adapter}, None)
        parts, _ = self._read(name, adapter)
        arrays = swap_arrays(self, self.hosts.prepared(parts))
        return {name: ops.convert_to_tensor(x) for name, x in arrays.items()} | {
            "adapter": ops.convert_to_tensor(name)
        }

    def get_config(self):
        raise ValueError(
            "A bank is not saved as a Keras model: its adapters have their folders. "
            "`bank.export(path)` writes an artefact; `bank.model.save(path)` writes "
            "the model without adapters."
        )
