"""A callback that writes the adapter alone."""

import math

import keras

from keras_lora.files.save import save_adapter


class AdapterCheckpoint(keras.callbacks.Callback):
    """Writes the adapter at the end of epochs, as `save_adapter` does.

    Args:
        directory: Folder for the adapter; each write replaces the last.
        save_best_only: Boolean, write only when the monitored value is the best;
            one that is not a number never is.
        monitor: Name of the value in the logs.
        mode: "min", "max", or "auto": as the compiled metric of that name says; for
            a value that is none, max for accuracies and areas, else min.
        names: As in `save_adapter`.

    Raises:
        ValueError: If `mode` is another word, or, at the end of an epoch, if there
            is no value of that name.

    Example:

    >>> checkpoint = keras_lora.AdapterCheckpoint("adapter")
    >>> history = model.fit(x, y, callbacks=[checkpoint], verbose=0)
    """

    def __init__(
        self,
        directory,
        save_best_only=False,
        monitor="val_loss",
        mode="auto",
        names=None,
    ):
        super().__init__()
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
        self._watch = None

    def on_epoch_end(self, epoch, logs=None):
        if self.save_best_only:
            if self.monitor not in (logs or {}):
                raise ValueError(
                    f"`monitor` {self.monitor!r} is not in the logs, which have "
                    f"{sorted(logs or {})}."
                )
            if math.isnan(logs[self.monitor]) or not self._is_best(logs):
                return
        save_adapter(self.model, self.directory, names=self.names)

    def _is_best(self, logs):
        """Keras's own callbacks know from the compiled metrics which way is up."""
        if self._watch is None:
            self._watch = self._watcher(self.mode)
        try:
            self._watch.on_epoch_end(0, logs)
        except ValueError:  # no metric of the model: its name has to tell
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
