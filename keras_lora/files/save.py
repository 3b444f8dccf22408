"""Writes a model's adapter as PEFT's files, once or after each epoch."""

import collections
import math
import os
import string
from collections.abc import Callable, Mapping

import keras

from keras_lora.files import config, slices, tensors, validation
from keras_lora.files.folder import Adapter
from keras_lora.files.names import (
    modules_of,
    refuse_ambiguous_names,
    refuse_tied_head,
    refuse_unnamed,
)
from keras_lora.keras_internals import layer_state, processes, warn_caller
from keras_lora.layers import lora_layer, token_rows
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import sites, training_state


def save_adapter(
    model: keras.layers.Layer,
    directory: str | os.PathLike,
    names: str | Mapping | Callable | None = None,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
):
    """Saves what training changed: A, B, trained biases and heads, and settings.

    Writes two files, adapter_config.json and adapter_model.safetensors, in PEFT's
    format. PEFT loads them into every model that it can adapt. An interrupted save
    leaves the old adapter or the new one.

    If the model is distributed over several processes, all of them must make
    this call: the first one writes, and the others return once it has.

    Args:
        model: A Keras model that holds LoRA layers.
        directory: Folder for the two files; other files in it are kept.
        names: Module names in another framework for the paths of this model
            (`keras_lora.summary` shows them): a dict, or a function of the path. For
            a KerasHub model, "transformers" takes the names from KerasHub's
            converters, "transformers4" those from before transformers 5, and the
            name of a family, such as "bert", refuses models of other families. Layers
            that are one module there share its name: "qkv[0/3]" is the first third of
            its outputs. By default, slashes become dots.
        task_type: How PEFT should treat the model, such as "SEQ_CLS" or
            "CAUSAL_LM". The default is that of the adapter that was loaded, if any.
        base_model_name_or_path: Where PEFT finds the base model. The same default.

    Raises:
        ValueError: If the model holds no LoRA layer, a factor is not finite, two
            layers get the same name, or KerasHub has no converter for the model.
        OSError: If a file cannot be written; raised on every process.
        RuntimeError: If another process does not call within half a minute.

    Examples:
        >>> keras_lora.save_adapter(model, "adapter")
        >>> sorted(os.listdir("adapter"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    adapter = adapter_of(model, names)
    facts = {
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
    }
    adapter.config.update(config.model_facts(model, facts))
    writes = processes.is_writer(model)
    processes.run_on_all(model, lambda: writes and adapter.save(directory))


class AdapterCheckpoint(keras.callbacks.Callback):
    """Saves the adapter at the end of each epoch, as `save_adapter` does.

    Args:
        directory: Folder for the adapter; each save replaces the last one. As in
            Keras's ModelCheckpoint, it may contain "{epoch}", counted from 1, and
            names from the logs: "adapters/{epoch:02d}-{val_loss:.2f}".
        save_best_only: Boolean, save only when the monitored value is the best so
            far. NaN is never the best.
        monitor: Name of the value in the logs.
        mode: "min", "max" or "auto". "auto" asks the compiled metric of that name;
            for other values it means "max" for accuracies and areas, else "min".
        names: As in `save_adapter`.
        verbose: 0, or 1 to print each save and its folder.

    Raises:
        ValueError: If `mode` is another word or `directory` is not a valid format
            string; at the end of an epoch, if a value is missing from the logs.

    Examples:
        >>> checkpoint = keras_lora.AdapterCheckpoint("adapter")
        >>> history = model.fit(x, y, callbacks=[checkpoint], verbose=0)
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        save_best_only: bool = False,
        monitor: str = "val_loss",
        mode: str = "auto",
        names: str | Mapping | Callable | None = None,
        verbose: int = 0,
    ):
        super().__init__()
        try:
            list(string.Formatter().parse(os.fspath(directory)))
        except ValueError as error:
            raise ValueError(
                f"`directory` is not a valid format string: {error}. Received: "
                f"{str(directory)!r}. Double the braces that are part of the name: "
                '"{{".'
            ) from error
        if mode not in ("auto", "min", "max"):
            raise ValueError(
                f"`mode` must be 'auto', 'min' or 'max'. Received: mode={mode!r}."
            )
        self.directory = directory
        self.save_best_only = save_best_only
        self.monitor = monitor
        self.mode = mode
        self.best = None
        self.names = names
        self.verbose = verbose
        self._watch = None

    def on_epoch_end(self, epoch, logs=None):
        logs, before = logs or {}, self.best
        if self.save_best_only:
            if self.monitor not in logs:
                raise ValueError(
                    f"`monitor` {self.monitor!r} is not in the logs, which have "
                    f"{sorted(logs)}."
                )
            if math.isnan(logs[self.monitor]) or not self._is_best(logs):
                self._say(epoch, f"{self.monitor} did not improve from {self.best}")
                return
        directory = self._directory(epoch, logs)
        save_adapter(self.model, directory, names=self.names)
        why = f"{self.monitor} improved from {before} to {self.best}, "
        why = why if self.save_best_only else ""
        self._say(epoch, f"{why}adapter saved to {directory}")

    def _directory(self, epoch, logs):
        """The folder of an epoch."""
        try:
            return os.fspath(self.directory).format(epoch=epoch + 1, **logs)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"`directory` {str(self.directory)!r} uses a value that is not in the "
                f"logs: {error}. Possible are {['epoch', *sorted(logs)]}."
            ) from error

    def _say(self, epoch, what):
        if self.verbose:
            print(f"\nEpoch {epoch + 1}: {what}")

    def _is_best(self, logs):
        """Whether the value is the best so far; Keras knows the metrics' direction."""
        if self._watch is None:
            self._watch = self._watcher(self.mode)
        try:
            self._watch.on_epoch_end(0, logs)
        except ValueError:  # not a metric of the model: decide by its name
            self._watch = self._watcher("max" if is_rising(self.monitor) else "min")
            self._watch.on_epoch_end(0, logs)
        before, self.best = self.best, self._watch.best
        return self.best != before

    def _watcher(self, mode):
        watcher = keras.callbacks.EarlyStopping(self.monitor, 0, math.inf, mode=mode)
        watcher.set_model(self.model)
        watcher.on_train_begin()
        return watcher


def is_rising(monitor):
    words = ("acc", "auc", "precision", "recall")
    return any(word in monitor for word in words)


def adapter_of(model, names=None, trained=None) -> Adapter:
    """Returns the adapter of a model, as it would be saved.

    trained: (module, variable) to save with the factors; by default those that train
    or trained together with them.
    """
    modules = modules_of(sites.Paths(model), names)
    sites.built_sites(model)
    adapters = {
        m: site for m, site in modules.sites.items() if lora_layer.is_adapted(site)
    }
    if trained is None:
        trained = variables_to_save(modules, adapters)
    changed = {
        **{module: modules[module] for module, _ in trained},
        # A tied head uses the trained rows, in PEFT too.
        **{m: s for m, s in adapters.items() if not s.lora.trains_rows},
    }
    refuse_tied_head(model, names, changed)
    return adapter_from(modules, adapters, trained)


def adapter_from(modules, adapters, trained) -> Adapter:
    """Returns an `Adapter` with the values that layers have trained.

    Args:
        modules: Module -> layer, of a whole model.
        adapters: The modules that have an adapter.
        trained: (module, variable) to save with the factors.
    """
    refuse_unnamed(modules, adapters)
    tables = {m: s for m, s in adapters.items() if s.lora.trains_rows}
    adapters = {m: s for m, s in adapters.items() if m not in tables}
    stacks = modules.parameters.keys() & {slices.without_slice(m) for m in adapters}
    parameters = {module: modules.parameters[module] for module in sorted(stacks)}
    refuse_parameters(adapters, parameters)
    arrays = validation.row_tensors(tables)
    for module, site in adapters.items():
        factors = tensors.to_tensors(site)
        arrays |= {module + suffix: value for suffix, value in factors.items()}
    arrays |= tensors_of_unadapted_slices(modules, adapters)
    use_rslora = all(site.lora.use_rslora for site in adapters.values())
    settings = {
        module: site.lora.settings.with_rank(site.lora.file_rank, use_rslora)
        for module, site in adapters.items()
    }
    slice_ranks = slices.fuse(arrays, settings, modules.regions)
    weights, names = {}, collections.defaultdict(set)
    for module, variable in trained:
        name = tensors.torch_name(modules[module], variable)
        inputs_first = module in modules.inputs_first
        weights[module, name] = tensors.weight_to_tensor(
            modules[module], variable, inputs_first
        )
        names[module].add(name)
    refuse_ambiguous_names(settings, weights)
    tensors.fuse_weights(weights, modules)
    for (module, name), value in weights.items():
        arrays[tensors.weight_key(module, name, settings)] = value
    biases = {slices.without_slice(m) for m, own in names.items() if own == {"bias"}}
    bias = "all" if biases - settings.keys() else "lora_only"
    heads = {module for module, _ in weights} - settings.keys() - biases
    file_config = config.make_config(
        settings,
        lora_dropout=file_dropout(adapters, parameters),
        bias=bias if biases else None,
        modules_to_save=sorted(heads),
        fan_in_fan_out=bool(modules.inputs_first),
        parameters=parameters,
        **method_of(adapters),
        **{token_rows.KEYWORD: {m: list(s.lora.indices) for m, s in tables.items()}},
    )
    starts = sorted(m for m, site in adapters.items() if site.lora.has_start)
    return Adapter(arrays, file_config, slice_ranks, starts=starts)


def refuse_parameters(adapters, parameters):
    """Raises for DoRA of parameters, which PEFT does not support."""
    for module, site in adapters.items():
        if slices.without_slice(module) in parameters and site.lora.keyword:
            raise ValueError(
                f"The adapter of {module!r} has {site.lora.keyword}, which PEFT does "
                "not support for a parameter. Leave out `names` for a file that only "
                "keras_lora reads, or merge the adapter."
            )


def file_dropout(adapters, parameters):
    """The dropout for the file: 0 if it adapts a parameter, as PEFT requires."""
    dropout = max([0.0, *(site.lora.dropout for site in adapters.values())])
    if dropout and parameters:
        warn_caller(
            f"The file has lora_dropout=0.0 instead of {dropout}: PEFT supports no "
            "dropout where it adapts a parameter, here "
            f"{sorted(parameters.values())[0]!r}."
        )
        return 0.0
    return dropout


def method_of(adapters) -> dict:
    """The keyword of a method other than LoRA, the same for all adapters."""
    adapters = [site.lora for site in adapters.values()]
    words = {lora.keyword for lora in adapters}
    if len(words) > 1:
        raise ValueError(
            f"The model has adapters of several methods, {sorted(map(str, words))}; a "
            "file can have only one. Merge or remove those of one method."
        )
    return {word: True for word in words if word}


def tensors_of_unadapted_slices(modules, adapters) -> dict:
    """Returns the tensors of slices without adapters, for methods that need them."""
    arrays = {}
    for module, (names, _) in slices.layouts(adapters).items():
        method = next(type(adapters[name].lora) for name in names if name in adapters)
        if not method.more_suffixes:
            continue
        for name in [name for name in names if name not in adapters]:
            if name not in modules:
                raise ValueError(
                    f"{module!r} is written as one module: `names` has no layer for "
                    f"{name!r}."
                )
            values = method.of_plain_layer(tensors.kernel_to_tensor(modules[name]))
            arrays |= {name + suffix: value for suffix, value in values.items()}
    return arrays


def variables_to_save(modules, adapters):
    """(module, variable) that train with the factors; for heads, all variables."""
    trained = []
    for module, layer in modules.items():
        if isinstance(layer, LowRankAdapter):
            continue
        variables = training_state.trained_variables(layer)
        names = {tensors.torch_name(layer, variable) for variable in variables}
        if module not in adapters and names - {"bias"}:
            known = set(map(id, variables))
            statistics = layer_state.non_trainable_variables(layer)
            variables += [v for v in statistics if id(v) not in known]
        trained += [(module, variable) for variable in variables]
    return trained
