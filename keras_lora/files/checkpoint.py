"""A callback that saves only the adapter."""

import math
import os
import string
from collections.abc import Callable, Mapping

import keras

from keras_lora.files import save


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
        save.save_adapter(self.model, directory, names=self.names)
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
