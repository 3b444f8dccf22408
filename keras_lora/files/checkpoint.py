"""A callback that writes the adapter alone."""

import keras

from keras_lora.files.save import save_adapter


class AdapterCheckpoint(keras.callbacks.Callback):
    """Writes the adapter at the end of epochs, as `save_adapter` does.

    Args:
        directory: Folder for the adapter; each write replaces the last.
        save_best_only: Boolean, write only when the monitored value is the best.
        monitor: Name of the value in the logs.
        mode: "min", "max", or "auto": max for accuracies and areas, else min.
        names: As in `save_adapter`.

    Raises:
        ValueError: If `mode` is another word, or, at the end of an epoch, if there
            is no value of that name.

    Example:

    >>> model.fit(x, y, callbacks=[keras_lora.AdapterCheckpoint("adapter")])
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
        if mode == "auto":
            rising = any(word in monitor for word in ("acc", "auc", "precision"))
            mode = "max" if rising or "recall" in monitor else "min"
        self.directory = directory
        self.save_best_only = save_best_only
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.best = None
        self.names = names

    def on_epoch_end(self, epoch, logs=None):
        if self.save_best_only:
            if self.monitor not in (logs or {}):
                raise ValueError(
                    f"`monitor` {self.monitor!r} is not in the logs, which have "
                    f"{sorted(logs or {})}."
                )
            value = self.sign * logs[self.monitor]
            if self.best is not None and not value > self.best:
                return
            self.best = value
        save_adapter(self.model, self.directory, names=self.names)
