"""The loss of a batch of several adapters."""

import keras
from keras import ops

from keras_lora.keras_internals.calls import mask_of

REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum")


class LossOfEach(keras.losses.Loss):
    """The sum of what the loss is for each adapter's rows alone.

        L = sum over the adapters k in the batch of loss(y[ids == k], f(x)[ids == k])

    so that the gradient for an adapter is that of training it alone, with means over
    its own rows. Rows of the base model do not count.

    Args:
        loss: A Keras loss, its name, or a function of targets and outputs that gives a
            value for each row or each of its parts.
        ids: A function that gives the ids of the batch, a vector.
    """

    def __init__(self, loss, ids):
        loss = keras.losses.get(loss)
        if not isinstance(loss, keras.losses.Loss):
            loss = FunctionLoss(loss)
        if loss.reduction not in REDUCTIONS:
            raise ValueError(
                "A bank trains with losses that are means or sums over rows. Received: "
                f"{type(loss).__name__} with reduction={loss.reduction!r}."
            )
        super().__init__(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss, self.ids = loss, ids

    def __call__(self, y_true, y_pred, sample_weight=None):
        ids = self.ids()
        if ids is None:  # Keras asks for shapes alone
            return self.loss(y_true, y_pred, sample_weight)
        mask = mask_of(y_pred)
        y_true, y_pred = (
            keras.tree.map_structure(lambda x: ops.convert_to_tensor(x, self.dtype), y)
            for y in (y_true, y_pred)
        )
        values = self.loss.call(y_true, y_pred)
        if len(values.shape) == 0:
            raise ValueError(
                f"The loss {self.name!r} gives one number for the whole batch, in "
                "which the adapters' rows are mixed. Write it so that it gives a value "
                "for each row."
            )
        if mask is None:
            mask = mask_of(values)
        counted = ops.ones_like(values)
        if mask is not None:
            counted = counted * over(ops.cast(mask, values.dtype), values)
        weights = counted
        if sample_weight is not None:
            weights = weights * over(ops.cast(sample_weight, values.dtype), values)
        values = by_row(values * weights)
        if self.reduction != "sum":
            weighted = self.reduction == "mean_with_sample_weight"
            same = ops.cast(ids[:, None] == ids[None, :], values.dtype)
            total = ops.matmul(same, by_row(weights if weighted else counted)[:, None])
            values = ops.divide_no_nan(values, total[:, 0])
        return ops.sum(ops.where(ids == 0, 0.0, values))


class FunctionLoss(keras.losses.Loss):
    """A function of targets and outputs, as Keras makes a loss of one."""

    def __init__(self, function):
        super().__init__(name=getattr(function, "__name__", None))
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(*in_one_rank(y_true, y_pred))


def in_one_rank(*pair):
    """Targets of shape (rows,) stand beside outputs of shape (rows, 1), for example."""
    low, high = sorted((0, 1), key=lambda place: len(pair[place].shape))
    found, ranks = list(pair), [len(pair[place].shape) for place in (low, high)]
    if ranks[0] + 1 == ranks[1] and pair[high].shape[-1] == 1:
        if ranks[0] == 1:
            found[low] = ops.expand_dims(pair[low], -1)
        else:
            found[high] = ops.squeeze(pair[high], -1)
    return found


def over(weights, values):
    """Weights of rows, or of their parts, with the axes of values."""
    while len(weights.shape) > len(values.shape) and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, -1)
    while len(weights.shape) < len(values.shape):
        weights = ops.expand_dims(weights, -1)
    return weights


def by_row(values):
    """Sums over all axes but that of the rows."""
    axes = tuple(range(1, len(values.shape)))
    return ops.sum(values, axis=axes) if axes else values
