"""AdapterBank: many adapters in one model, one for each row of a batch."""

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_lora.files.folder import Adapter
from keras_lora.keras_internals import (
    compiled,
    distribution,
    layer_state,
    processes,
    variable_state,
)
from keras_lora.layers import settings
from keras_lora.models import sites
from keras_lora.serving import export, id_table, reading, rows, training
from keras_lora.serving.banked import Hosts
from keras_lora.serving.calls import RunningCalls
from keras_lora.serving.id_table import IdTable
from keras_lora.serving.outside import CompiledFunctions, OutsideCalls
from keras_lora.serving.rows import SlotChoice
from keras_lora.serving.training import Training


class AdapterBank(OutsideCalls, Training, keras.Model):
    """Holds many adapters over one model; each row of a batch uses one of them.

        y[i] = what the model gives for x[i] with the adapter that ids[i] means

    The layers change their class in place, as in `apply_lora`. All adapters share the
    kernels, and each layer has a stack with the factors of all adapters. Adapters may
    have different ranks, alphas and layers; in layers that an adapter leaves out, its
    rows use the base model. Biases, Dense layers that trained in full and DoRA's
    magnitudes are kept for each adapter. `fit` trains several adapters at once.

    Args:
        model: A Keras model that is built and holds no adapter.
        adapters: Dict from a name to a folder that `save_adapter` or PEFT has
            written, or to an `Adapter`.
        capacity: The number of adapters that the bank can hold at once. The default
            is the number of `adapters`.
        max_rank: The highest rank that an adapter can have. The default is the
            highest rank among `adapters`, or 8 if there are none.
        target: A rule as in `apply_lora`, for layers that later adapters may use. The
            layers of `adapters` are always included.
        names: As in `load_adapter`, for `adapters` and for `add`.

    Raises:
        ValueError: If the model has adapters or a bank, an adapter does not fit, or
            the rows cannot be told apart at a layer. The model is left unchanged.
        OSError: If a file cannot be read.

    Examples:
        >>> keras_lora.save_adapter(model, "french")
        >>> keras_lora.remove_lora(model)
        >>> bank = AdapterBank(model, {"french": "french"}, capacity=8)
        >>> ids = bank.ids(["french", None, "french", None])
        >>> bank.predict({"inputs": x, "adapter": ids}, verbose=0).shape
        (4, 2)
    """

    def __init__(
        self,
        model: keras.Model,
        adapters: Mapping | tuple = (),
        capacity: int | None = None,
        max_rank: int | None = None,
        target: str | Sequence | type | Callable | None = None,
        names: str | Mapping | Callable | None = None,
    ):
        paths = sites.Paths(model)
        sites.refuse_adapters(paths)
        compiled.restore_jax_weights(model)
        barrier = functools.partial(processes.barrier, model)
        barrier()
        adapters = validate_adapters(adapters, target)
        capacity = validate_capacity(capacity, adapters)
        highest_rank = np.inf if max_rank is None else settings.validate_rank(max_rank)
        readings, sources = {}, {}
        for name, adapter in adapters.items():
            with naming(name):
                adapter, sources[name] = training.read_with_source(model, adapter)
                readings[name] = reading.read(paths, adapter, names, highest_rank)
        all_parts = [item for x in readings.values() for item in x.parts.items()]
        lora_ranks = [part.rank for _, part in all_parts if not part.in_full]
        with distribution.strategy_scope(model):
            super().__init__(name=f"{model.name}_bank", dtype=model.dtype_policy)
        self.autocast = False
        self.model, self.capacity, self.names_given = model, capacity, names
        self.max_rank = max_rank or max(lora_ranks, default=8) or 8
        self.id_table = IdTable(capacity)
        self.choice = SlotChoice(self.id_table.slot_count)
        self.hosts = Hosts(paths, self.choice, self.id_table.slot_count)
        # Past Keras's tracking, because some are trainees.
        self.__dict__["sources"] = {}
        self.stacks = []
        self._write_lock = threading.RLock()
        self._active = None
        self._row_names = None
        self._compiled = CompiledFunctions(model)
        self.running = RunningCalls(self._write_active, barrier)
        self._slots_outside = [id_table.BASE]
        self.__dict__["depends_on_base"] = {}  # name -> whether the adapter does
        self.__dict__["counted_layers"] = weakref.WeakSet()
        with_gain = any(part.has_gain for _, part in all_parts)
        chosen = [] if target is None else reading.bankable_sites(paths, target)
        with distribution.strategy_scope(model), contextlib.ExitStack() as undo:
            undo.callback(self.hosts.release)
            for path, layer in paths.layers.items():
                ranks = [part.rank for other, part in all_parts if other == path]
                if ranks or path in chosen:
                    rank = max([self.max_rank, *ranks])
                    self.stacks.append(self.hosts.add(path, layer, rank, with_gain))
            rows.find_leading_axes(self, rows.sample_inputs(model))
            self.hosts.input_specs = export.specs_of(rows.specs_in(model))
            for name, own in readings.items():
                with naming(name):
                    self._put(name, own.parts, sources[name])
            self._count_outside_calls()
            self._guard_weights()
            undo.pop_all()
        compiled.renew_compiled_functions(compiled.models_sharing_layers(model))
        self.built = True

    @property
    def names(self) -> list:
        """The names of the adapters in the bank."""
        return self.id_table.names

    # Adapters.

    def add(self, name: str, adapter: Adapter | str | os.PathLike):
        """Adds an adapter under a name, or replaces the adapter of that name.

        No function is traced again, and everything is checked before anything is
        assigned. Running calls keep the adapters that they began with; calls of the
        bank that begin later use the new one. So do calls of the model itself, which
        wait for running calls that use this name.

        Args:
            name: A string.
            adapter: A folder or an `Adapter`.

        Raises:
            ValueError: If the bank is full, the adapter is damaged or does not fit,
                a layer has no room for it, or running calls use all slots and do not
                end within a minute. The bank is left unchanged.
            OSError: If a file cannot be read.
        """
        validate_adapters({name: adapter}, None)
        self._refuse_released()
        self.running.begin_change("bank.add", lambda call: call.exclusive)
        self.id_table.refuse_if_full(name)
        parts, source = self._read_with_source(name, adapter)
        with self.running.writing("bank.add"):
            self._put(name, parts, source)

    def _read_with_source(self, name, adapter):
        """Returns the parts of an adapter, for which there is room, and its source."""
        with self.running.call(lambda: (None, ())), self._write_lock:
            with naming(name):
                adapter, source = training.read_with_source(self.model, adapter)
                parts = self._read(adapter).parts
                self.hosts.prepare(parts)
            return parts, source

    def _read(self, adapter) -> reading.Reading:
        return reading.read(self.hosts.paths, adapter, self.names_given, self.max_rank)

    def _put(self, name, parts, source):
        """Writes an adapter into a free slot, and makes its name mean that slot."""
        free = self.id_table.free_slots
        with self.running.lock:
            self.running.wait("bank.add", lambda: self._next_slot() is not None)
            slot = self._next_slot()
            free.remove(slot)
        try:
            with self._write_lock:
                self.hosts.write(slot, self.hosts.prepare(parts))
                with self.running.lock:
                    self.id_table.refuse_if_full(name)
                    self.id_table.publish(name, slot)
                    self.sources[name] = source
                    needed = any(x.depends_on_base for x in parts.values())
                    self.depends_on_base[name] = needed
                    self.running.write_active_soon()
        except BaseException:
            with self.running.lock:
                if slot not in self.id_table.slot_of.values():
                    free.append(slot)
            raise

    def _next_slot(self):
        """Returns the slot that has been free longest and that no call reads."""
        free, reads = self.id_table.free_slots, self.running.reads
        return next((slot for slot in free if not reads[slot]), None)

    def remove(self, name: str):
        """Removes an adapter. From then on, rows with its id are NaN."""
        with self.running.writing("bank.remove"), self.running.lock:
            if self.id_table.validate_name(name) is None:
                raise ValueError("None is the base model, which cannot be removed.")
            if name == self._active:
                raise ValueError(
                    f"{name!r} is active: bank.activate(None) first, or another name."
                )
            self.id_table.withdraw(name)
            del self.sources[name], self.depends_on_base[name]
            self.running.write_active_soon()

    # Weights of the model.

    def _guard_weights(self):
        """Refuses assignments to the model while an adapter depends on its values."""
        for layer in self.hosts.paths.layers.values():
            for variable in layer_state.layer_variables(layer):
                variable_state.guard_assign(variable, self._refuse_other_weights)

    def _release_weights(self):
        for layer in self.hosts.paths.layers.values():
            for variable in layer_state.layer_variables(layer):
                variable_state.release_assign(variable)

    def _refuse_other_weights(self, what):
        names = [name for name, needed in self.depends_on_base.items() if needed]
        if names:
            raise ValueError(
                f"{what} is part of a model in an AdapterBank. The adapters "
                f"{names[:9]} have DoRA's magnitudes, or trained biases and layers, "
                "which fit only the present weights. Nothing was changed. Call "
                "bank.release(), load the weights, and create the bank again."
            )

    def release(self):
        """Turns the model's layers into plain Keras layers again; empties the bank.

        Raises:
            ValueError: If it is called inside a call of the model, or if calls in
                other threads do not end within a minute.
        """
        self.running.begin_change("bank.release", lambda call: True)
        with self.running.lock:
            self.running.wait("bank.release", lambda: not self.running.other_calls())
            self._stop_counting()
            self._release_weights()
            compiled.restore_jax_weights(self.model)
            self.hosts.release()
            compiled.renew_compiled_functions(
                compiled.models_sharing_layers(self.model)
            )

    def export(self, path: str | os.PathLike, format: str = "tf_saved_model", **kwargs):
        """Writes one artifact that serves all adapters and needs no keras_lora.

        A SavedModel's `serve(inputs, adapter)` takes names as strings, one for each
        row. b"" is the base model, and an unknown name raises an InvalidArgumentError.
        The signature "serving_default" takes the same by keyword: "adapter", and the
        model's inputs under their keys, or as "inputs". The signature "swap" replaces
        one adapter in the loaded artifact, with the inputs from `swap_inputs`. Other
        formats take as "adapter" the ids that `bank.ids` gives at the time of export.

        Args:
            path: Where to write, as in `keras_lora.export`.
            format: "tf_saved_model", or another format of `keras.Model.export`.
            kwargs: As in `keras.Model.export`, for other formats.

        Raises:
            ValueError: If the format is "tf_saved_model" on a backend other than
                TensorFlow, or a subclassed model's inputs are not known.
            OSError: If the artifact cannot be written.
        """
        if self.hosts.input_specs is None:
            raise ValueError(
                "The model does not say what its inputs are. Call the bank once: "
                'bank({"inputs": ..., "adapter": ...}).'
            )
        if format == "tf_saved_model":
            export.export_by_name(self, path)
        else:
            write = super().export
            export.export_by_id(self, write, path, format=format, **kwargs)

    def swap_inputs(self, name: str, adapter: Adapter | str | os.PathLike) -> dict:
        """Returns the inputs of the artifact's signature "swap" for a new adapter.

        >>> swap = tf.saved_model.load(path).signatures["swap"]  # doctest: +SKIP
        >>> swap(**bank.swap_inputs("french", "adapters/fr-2"))  # doctest: +SKIP
        """
        validate_adapters({name: adapter}, None)
        parts, _ = self._read_with_source(name, adapter)
        arrays = export.swap_arrays(self, self.hosts.prepare(parts))
        return {name: ops.convert_to_tensor(x) for name, x in arrays.items()} | {
            "adapter": ops.convert_to_tensor(name)
        }

    def get_config(self):
        raise ValueError(
            "A bank cannot be saved as a Keras model. Save an adapter with "
            "`bank.adapter(name).save(folder)`, the model without adapters with "
            "`bank.model.save(path)`, and all in one artifact with `bank.export(path)`."
        )


@contextlib.contextmanager
def naming(adapter_name):
    """Context that names an adapter in every ValueError raised inside it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The adapter {adapter_name!r}: {error}") from error


def validate_adapters(adapters, target) -> dict:
    adapters = {} if adapters is None or adapters == () else adapters
    if not isinstance(adapters, Mapping):
        raise ValueError(
            "`adapters` must be a dict from names to folders or `Adapter`s. Received: "
            f"{adapters!r}."
        )
    for name in adapters:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"The name of an adapter must be a non-empty string. Received: {name!r}"
            )
    if not adapters and target is None:
        raise ValueError(
            "A bank needs `adapters`, or a `target` that says which layers get room "
            'for adapters, such as "all-linear".'
        )
    return dict(adapters)


def validate_capacity(capacity, adapters):
    lowest = max(len(adapters), 1)
    capacity = lowest if capacity is None else capacity
    if not settings.is_whole(capacity, lowest):
        raise ValueError(
            f"`capacity` must be a whole number >= {lowest}, as many as "
            f"there are adapters. Received: capacity={capacity!r}."
        )
    return int(capacity)
