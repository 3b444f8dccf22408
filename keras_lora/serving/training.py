"""Training several adapters of a bank at once, each with its own rows."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping

import keras
import numpy as np

from keras_lora.files import config, load, save
from keras_lora.files.folder import Adapter
from keras_lora.keras_internals import (
    calls,
    distribution,
    private_names,
    probes,
    processes,
)
from keras_lora.keras_internals.layer_state import attach, detach
from keras_lora.models import training_state
from keras_lora.serving import id_table
from keras_lora.serving.calls import Calls, emptied_by
from keras_lora.serving.per_adapter import PerAdapterLoss, PerAdapterOptimizer


class Trainee(keras.layers.Layer):
    """An adapter of a bank as trainable variables, with exactly the source's values.

    Attributes:
        adapter_name: Its name in the bank.
        parts: Path -> Part, which hold the variables.
    """

    def __init__(self, adapter_name, adapter, reading):
        super().__init__(dtype="float32")
        self.adapter_name = adapter_name
        # Past Keras's tracking, because views of the model's layers are not its own.
        vars(self).update(parts=reading.parts, reading=reading)
        vars(self)["facts"] = {key: adapter.config.get(key) for key in config.FACTS}
        self.loras = [p.lora for p in reading.parts.values() if p.lora is not None]
        for module, layer, variable, own in reading.trained:
            if own is None:
                raise ValueError(
                    f"The adapter {adapter_name!r} trains {variable.name!r} of "
                    f"{module!r}, a {type(layer).__name__}, which all rows of a batch "
                    "share. Train it in a model of its own."
                )
        self.trained_weights = [own for *_, own in reading.trained]
        if any(part.has_gain and part.dropout for part in reading.parts.values()):
            raise ValueError(
                f"The adapter {adapter_name!r} has DoRA with dropout, which a bank "
                "cannot train, because it drops inputs of the frozen kernel too. Set "
                "lora_dropout to 0 in its config."
            )
        self.built = True

    def read(self) -> Adapter:
        """Returns the adapter with its present values."""
        reading = self.reading
        trained = [(module, own) for module, *_, own in reading.trained]
        adapter = save.adapter_from(reading.modules, reading.adapted, trained)
        adapter.config.update(self.facts)
        return adapter


@dataclasses.dataclass
class Folder:
    """Source of an adapter that is read from its folder again.

    Attributes:
        path: The folder's path.
        fingerprint: That of the adapter when it was read.
    """

    path: str
    fingerprint: str

    def read(self) -> Adapter:
        adapter = Adapter.read(self.path)
        if load.fingerprint(adapter) != self.fingerprint:
            raise ValueError(
                f"The folder {self.path!r} holds a different adapter than when the "
                "bank read it. Add it again: bank.add(name, folder)."
            )
        return adapter


def read_with_source(model, adapter):
    """Returns an adapter, and the source from which it can be read again."""
    contents = load.read_for(model, adapter)
    if isinstance(adapter, Adapter):
        return contents, InMemory(contents)
    return contents, Folder(os.path.abspath(adapter), load.fingerprint(contents))


@dataclasses.dataclass
class InMemory:
    """Source of an adapter that is kept in memory."""

    adapter: Adapter

    def read(self) -> Adapter:
        return self.adapter


class Trainees(keras.layers.Layer):
    """The adapters that one `fit` trains."""

    def __init__(self, members):
        super().__init__(dtype="float32")
        self.members = members
        self.built = True


class Training(Calls):
    """Mixin of the bank: several adapters train at once, each with its own rows."""

    trainees = None
    in_training = False  # inside fit or train_on_batch
    sources: dict

    def compile(self, optimizer="rmsprop", loss=None, **kwargs):
        """Compiles as `keras.Model.compile`, with an optimizer for each adapter.

        Args:
            optimizer: A Keras optimizer or its name; every adapter gets a copy.
                Or a dict from the adapters' names to optimizers.
            loss: Losses that are means or sums over rows.
            kwargs: As in `keras.Model.compile`.

        Raises:
            ValueError: For a loss scale, another kind of loss, or "mixed_float16".
        """
        if self.dtype_policy.name == "mixed_float16":
            raise ValueError(
                "A bank does not train under mixed_float16, whose one loss scale would "
                "tie the adapters to each other. Use mixed_bfloat16 or float32."
            )
        with distribution.strategy_scope(self.model):
            optimizer = PerAdapterOptimizer(optimizer)
        if loss is not None:
            loss = keras.tree.map_structure(
                lambda x: PerAdapterLoss(x, lambda: optimizer.batch.ids), loss
            )
        super().compile(optimizer, loss, auto_scale_loss=False, **kwargs)

    def fit(self, x=None, *args, **kwargs):
        """Trains the adapters that `x` names, each with its own rows.

            L = sum over the adapters k of loss(y[ids == k], f(x)[ids == k])

        Nothing else changes, not even the model's own weights.
        Each adapter trains as it would alone on its own rows of each batch. An adapter
        without rows in a batch takes no step, and its optimizer state does not change.
        The loss in the logs is L. The model's kernels are frozen during training, as
        after `apply_lora`.

        The bank's calls use the trained values from the end of each epoch, and from
        the start of each validation. Another `fit` continues where this one stopped.

        Args:
            x: {"inputs": ..., "adapter": ids}, or what gives batches of it together
                with targets, a dataset for example; then all adapters of the bank
                train.
            *args: Of `keras.Model.fit`.
            **kwargs: Likewise.

        Raises:
            ValueError: If the bank is not compiled, `x` names no adapter, an adapter
                trains what rows of a batch share, or the model adds losses for its
                activations.
        """
        probes.require(private_names.MASKS)
        self._train(self._names_in(x))
        if isinstance(x, Mapping):
            self._find_leading_axes(x["inputs"])
        writer = WriteBack(self)
        callbacks = kwargs.pop("callbacks", None) or []
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(writer)
        else:
            callbacks = [writer, *keras.tree.flatten(callbacks)]
        try:
            with self._training("fit"):
                return super().fit(x, *args, callbacks=callbacks, **kwargs)
        finally:
            self.write_back()

    def train_on_batch(self, x, *args, **kwargs):
        """Trains as `keras.Model.train_on_batch`; x as in `fit`."""
        self._train(self._names_in(x), keep=True)
        with self._training("train_on_batch"):
            logs = super().train_on_batch(x, *args, **kwargs)
        self.write_back()
        return logs

    def adapter(self, name: str):
        """Returns one of the bank's adapters as an `Adapter`, which can be saved.

        Raises:
            ValueError: If the name is not known, or the adapter's folder holds
                another adapter by now.
        """
        if self.id_table.validate_name(name) is None:
            raise ValueError("None is the base model, which has no adapter.")
        return self.sources[name].read()

    def _names_in(self, x):
        if not isinstance(x, Mapping) or "adapter" not in x:
            return self.names
        id_table.refuse_names(x)
        ids = set(np.unique(keras.ops.convert_to_numpy(x["adapter"])).tolist())
        names = [name for name in self.names if self.id_table.id_of[name] in ids]
        unknown = ids - {self.id_table.id_of[name] for name in [None, *names]}
        if unknown:
            raise ValueError(
                f'"adapter" has ids of no adapter: {sorted(unknown)[:9]}. '
                "`bank.ids(names)` gives them."
            )
        return names

    def _train(self, names, keep=False):
        """Makes trainees of adapters.

        keep: Whether the present trainees stay.
        """
        if not self.compiled:
            raise ValueError("Call `bank.compile(optimizer, loss)` before it trains.")
        if not names:
            raise ValueError("No row names an adapter: there is nothing to train.")
        for path, layer in self.hosts.paths.layers.items():
            if getattr(layer, "activity_regularizer", None) is not None:
                raise ValueError(
                    f"{path!r} has an activity regularizer, which is a loss over all "
                    "rows together, so the adapters cannot be trained separately."
                )
        present = [] if self.trainees is None else self.trainees.members
        if keep:
            names = dict.fromkeys([*(x.adapter_name for x in present), *names])
        id_of = self.id_table.id_of
        with distribution.strategy_scope(self.model):
            members = [self._trainee(name) for name in names]
            if members == present and self.optimizer.is_for(members, id_of):
                return
            self.optimizer.train(members, id_of)
        self.sources.update((trainee.adapter_name, trainee) for trainee in members)
        if self.trainees is not None:
            detach(self, "trainees")
        attach(self, "trainees", Trainees(members))
        self.train_function = None
        self._point_to_trainees()

    def _trainee(self, name):
        source = self.sources[name]
        if isinstance(source, Trainee):
            return source
        adapter = processes.run_on_all(self.model, source.read)
        return Trainee(name, adapter, self._read(adapter))

    def _point_to_trainees(self):
        """Makes rows in training use the trainees instead of their slots."""
        slots_in_training = np.arange(self.id_table.slot_count)
        for index, trainee in enumerate(self.trainees.members):
            if self.sources.get(trainee.adapter_name) is trainee:
                slot = self.id_table.slot_of[trainee.adapter_name]
                slots_in_training[slot] = self.id_table.slot_count + index
        self.choice.slots_in_training.assign(slots_in_training)

    def write_back(self):
        """Writes the values trained so far into the bank's slots."""
        calls.synchronize(self)
        for trainee in self.trainees.members:
            name = trainee.adapter_name
            if self.sources.get(name) is trainee:  # and no other was added
                self._put(name, trainee.parts, trainee)
        with self.running.lock:
            self._point_to_trainees()

    @contextlib.contextmanager
    def _training(self, method):
        """Context of training, a call that reads no slot but the base model's.

        The model is frozen inside, also its normalization.
        """
        layers = self.hosts.paths.with_model
        with self.running.call(lambda: (None, ()), emptied=emptied_by(method, self)):
            flags = training_state.trainable_flags(layers)
            self.in_training, self.model.trainable = True, False
            try:
                yield
            finally:
                self.in_training = False
                training_state.restore_flags(layers, flags)

    def train_step(self, *args):
        if not self.in_training:
            raise ValueError(
                "A bank trains in `fit` and `train_on_batch`, which choose what is "
                "trained, and write it back. A loop of your own trains one adapter "
                "after apply_lora(model), which the bank can then add."
            )
        if keras.backend.backend() == "torch":
            # The trainees came after the bank told torch what its parameters are.
            for variable in self.trainable_variables:
                variable.value.grad = None
        with self._ids_of(args[-1]):
            return super().train_step(*args)

    def test_step(self, *args):
        with self._ids_of(args[-1]):
            return super().test_step(*args)

    def _ids_of(self, data):
        x, *_ = keras.utils.unpack_x_y_sample_weight(data)
        ids = x[id_table.SLOTS] if id_table.SLOTS in x else x["adapter"]
        return self.optimizer.for_rows(keras.ops.convert_to_tensor(ids))


class WriteBack(keras.callbacks.Callback):
    """Callback that writes trained values back before other callbacks run."""

    def __init__(self, bank):
        super().__init__()
        self.bank = bank

    def on_test_begin(self, logs=None):
        self.bank.write_back()

    def on_epoch_end(self, epoch, logs=None):
        self.bank.write_back()
