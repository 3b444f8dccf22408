"""A loss and an optimizer for each adapter that trains."""

import contextlib
import threading
from collections.abc import Mapping

import keras
from keras import ops

from keras_lora.keras_internals import calls, distribution, optimizers

REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum")


class PerAdapterLoss(keras.losses.Loss):
    """Sum of one loss for each adapter, over its own rows of a batch.

        L = sum over the adapters k in the batch of loss(y[ids == k], f(x)[ids == k])

    An adapter's gradient is the one that it would have alone, with means over its own
    rows. Rows of the base model do not count.

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
        if ids is None:  # Keras infers shapes
            return self.loss(y_true, y_pred, sample_weight)
        mask = calls.mask_of(y_pred)
        y_true, y_pred = (
            keras.tree.map_structure(lambda x: ops.convert_to_tensor(x, self.dtype), y)
            for y in (y_true, y_pred)
        )
        values = self.loss.call(y_true, y_pred)
        if len(values.shape) == 0:
            raise ValueError(
                f"The loss {self.name!r} returns one number for the whole batch, which "
                "mixes the rows of the adapters. Write it so that it returns a value "
                "for each row."
            )
        if mask is None:
            mask = calls.mask_of(values)
        used = ops.ones_like(values)
        if mask is not None:
            used = used * expand_to(ops.cast(mask, values.dtype), values)
        weights = used
        if sample_weight is not None:
            weights = weights * expand_to(ops.cast(sample_weight, values.dtype), values)
        values = sum_by_row(values * weights)
        if self.reduction != "sum":
            weighted = self.reduction == "mean_with_sample_weight"
            all_ids = distribution.gather_over_replicas(ids)
            same = ops.cast(ids[:, None] == all_ids[None, :], values.dtype)
            used = sum_by_row(weights if weighted else used)
            total = ops.matmul(same, distribution.gather_over_replicas(used)[:, None])
            values = ops.divide_no_nan(values, total[:, 0])
        return ops.sum(ops.where(ids == 0, 0.0, values))


class FunctionLoss(keras.losses.Loss):
    """Loss that calls a function of targets and outputs, like Keras's own wrapper."""

    def __init__(self, function):
        super().__init__(name=getattr(function, "__name__", None))
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(*match_axes(y_true, y_pred))


def match_axes(*pair):
    """Gives two tensors the same number of axes, such as (rows,) and (rows, 1)."""
    low, high = sorted((0, 1), key=lambda index: len(pair[index].shape))
    matched, ranks = list(pair), [len(pair[index].shape) for index in (low, high)]
    if ranks[0] + 1 == ranks[1] and pair[high].shape[-1] == 1:
        if ranks[0] == 1:
            matched[low] = ops.expand_dims(pair[low], -1)
        else:
            matched[high] = ops.squeeze(pair[high], -1)
    return matched


def expand_to(weights, values):
    """Adds or removes axes of size 1, so that weights multiply values."""
    while len(weights.shape) > len(values.shape) and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, -1)
    while len(weights.shape) < len(values.shape):
        weights = ops.expand_dims(weights, -1)
    return weights


def sum_by_row(values):
    """Sums over all axes but the first."""
    axes = tuple(range(1, len(values.shape)))
    return ops.sum(values, axis=axes) if axes else values


class Batch(threading.local):
    """The batch whose gradients a thread applies."""

    ids = None


class PerAdapterOptimizer(keras.optimizers.Optimizer):
    """Trains each trainee with a copy of an optimizer.

    A trainee without rows in a batch takes no step: its variables, momenta and step
    count stay exactly as they are.

    Args:
        optimizer: A Keras optimizer or its name, or a dict {adapter's name: one}.
    """

    def __init__(self, optimizer):
        super().__init__(learning_rate=0.0, name="of_each")
        by_name = optimizer if isinstance(optimizer, Mapping) else {None: optimizer}
        vars(self).update(  # past TensorFlow's tracking
            sources={name: validate_optimizer(x) for name, x in by_name.items()},
            members=[],  # (trainee, its id in batches, its optimizer)
            batch=Batch(),
        )

    def train(self, trainees, id_of):
        """Sets the trainees; those that trained before keep their optimizer state.

        id_of: name -> id in a batch.
        """
        known = {id(trainee): optimizer for trainee, _, optimizer in self.members}
        members = []
        for trainee in trainees:
            optimizer = known.get(id(trainee)) or self.new(trainee)
            members.append((trainee, id_of[trainee.adapter_name], optimizer))
        vars(self)["members"] = members
        self.built = True

    def is_for(self, trainees, id_of):
        now = [(id(trainee), own_id) for trainee, own_id, _ in self.members]
        return now == [(id(x), id_of[x.adapter_name]) for x in trainees]

    def new(self, trainee):
        name = trainee.adapter_name
        optimizer = self.sources.get(name, self.sources.get(None))
        if optimizer is None:
            raise ValueError(
                f"The bank was compiled with optimizers for {sorted(self.sources)}, "
                f"but with none for {name!r}."
            )
        return optimizers.copy_for_variables(optimizer, trainee.trainable_variables)

    @contextlib.contextmanager
    def for_rows(self, ids):
        """Context in which `apply` gets the gradients of a batch with these ids."""
        self.batch.ids = ids
        try:
            yield
        finally:
            self.batch.ids = None

    def build(self, variables):
        self.built = True

    @property
    def variables(self):
        # Keras's constructor reads it before it is set.
        members = vars(self).get("members", [])
        return [*super().variables, *(v for *_, own in members for v in own.variables)]

    @property
    def learning_rate(self):
        """The first optimizer's rate; setting it sets all."""
        return self.members[0][2].learning_rate if self.members else 0.0

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        for *_, optimizer in self.members:
            optimizer.learning_rate = learning_rate

    def apply(self, grads, trainable_variables=None):
        grads, ids = list(grads), distribution.gather_over_replicas(self.batch.ids)
        for trainee, own_id, optimizer in self.members:
            count = len(trainee.trainable_variables)
            gradients, grads = grads[:count], grads[count:]
            present = ops.any(ops.equal(ids, own_id))
            kept = [*trainee.trainable_variables, *optimizer.variables]
            before = [ops.copy(ops.convert_to_tensor(variable)) for variable in kept]
            optimizer.apply(gradients)
            distribution.assign_unless(present, kept, before)
        self.iterations.assign_add(1)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        variables = self.variables
        trained = [
            v for trainee, *_ in self.members for v in trainee.trainable_variables
        ]
        values = [*zip(variables, optimizer_variables, strict=True)]
        values += zip(trained, trainable_variables, strict=True)
        with keras.StatelessScope(state_mapping=values) as scope:
            self.apply(grads)
        return tuple(
            [scope.get_current_value(v) for v in x] for x in (trained, variables)
        )

    def finalize_variable_values(self, var_list):
        for trainee, _, optimizer in self.members:
            optimizer.finalize_variable_values(trainee.trainable_variables)

    def get_config(self):
        raise ValueError("The optimizers of a bank's adapters are not saved.")


def validate_optimizer(optimizer):
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or getattr(
        optimizer, "loss_scale_factor", None
    ):
        raise ValueError(
            "A bank trains several adapters with one loss, which is not scaled. Give "
            "an optimizer without a loss scale, and train in float32 or mixed_bfloat16."
        )
    return optimizer
