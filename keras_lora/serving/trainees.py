"""The adapters of a bank that train: variables of their own, one set for each."""

import dataclasses
import hashlib
import json
import os

import keras
import numpy as np

from keras_lora.files.config import KEPT
from keras_lora.files.folder import Adapter
from keras_lora.files.save import adapter_from
from keras_lora.serving.reading import read


class Trainee(keras.layers.Layer):
    """One adapter as variables, read from its source to the bit.

    Attributes:
        adapter_name: What the bank calls it.
        parts: Path -> Part, whose variables these are.
    """

    def __init__(self, bank, adapter_name, adapter):
        super().__init__(dtype="float32")
        arguments = bank.model, bank.hosts.paths, adapter, bank.names_given
        reading = read(*arguments, bank.max_rank)
        self.adapter_name = adapter_name
        # Past Keras's tracking: views of the model's layers are none of it.
        vars(self).update(parts=reading.parts, reading=reading)
        vars(self)["said"] = {key: adapter.config.get(key) for key in KEPT}
        self.loras = [p.lora for p in reading.parts.values() if p.lora is not None]
        self.others = [
            variable
            for part in reading.parts.values()
            for variable in (part.bias, part.kernel)
            if variable is not None
        ]
        self.refuse_shared(reading)
        if any(part.has_gain and part.dropout for part in reading.parts.values()):
            raise ValueError(
                f"The adapter {adapter_name!r} has DoRA with dropout, which a bank "
                "does not train: its dropout reaches the base model's product as well. "
                "Set lora_dropout to 0 in its config."
            )
        self.built = True

    def refuse_shared(self, reading):
        """Raises ValueError for what the adapter trains and rows of one batch share."""
        for module, layer, variable, own in reading.beside:
            if own is None:
                raise ValueError(
                    f"The adapter {self.adapter_name!r} trains {variable.name!r} of "
                    f"{module!r}, a {type(layer).__name__}, which rows of one batch "
                    "share. Train it on a model of its own."
                )

    def read(self) -> Adapter:
        """The adapter as it is now."""
        reading = self.reading
        trained = [(module, own) for module, *_, own in reading.beside]
        adapter = adapter_from(reading.modules, reading.adapted, trained)
        adapter.config.update(self.said)
        return adapter


@dataclasses.dataclass
class Folder:
    """An adapter that is not kept in memory beside its slot.

    Attributes:
        path: Of the folder.
        digest: Of what stood in it.
    """

    path: str
    digest: str

    def read(self) -> Adapter:
        adapter = Adapter.read(self.path)
        if digest(adapter) != self.digest:
            raise ValueError(
                f"The folder {self.path!r} holds another adapter than when the bank "
                "read it. Add it again: bank.add(name, folder)."
            )
        return adapter


def source_of(adapter):
    """What a bank keeps of an adapter to read it again: (adapter, its source)."""
    if isinstance(adapter, Adapter):
        return adapter, Kept(adapter)
    found = Adapter.read(adapter)
    return found, Folder(os.path.abspath(adapter), digest(found))


@dataclasses.dataclass
class Kept:
    """An adapter that was given as one."""

    adapter: Adapter

    def read(self) -> Adapter:
        return self.adapter


def digest(adapter) -> str:
    """SHA-256 of all that tells two adapters apart."""
    said = [adapter.config, adapter.slices, sorted(adapter.starts)]
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, value in sorted(adapter.tensors.items()):
        found.update(f"{name} {value.dtype} {value.shape}".encode())
        found.update(np.ascontiguousarray(value).view("uint8").data)
    return found.hexdigest()
