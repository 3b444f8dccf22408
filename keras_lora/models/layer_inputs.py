"""Records the inputs of LoRA layers: their moments and principal directions."""

import collections
import hashlib

import keras
import numpy as np

from keras_lora.keras_internals import distribution
from keras_lora.keras_internals import processes
from keras_lora.layers.torch_layout import to_numpy

OTHER_ROWS = (
    "The processes have given different numbers of batches or rows, or different rows "
    "where their devices hold the same part of a batch. Give each process what it "
    "gives to `fit`."
)


class Moments:
    """Number, sum and products of rows that are seen one batch after the other."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0
        self.digests = []

    def add(self, rows, digest, time):
        """Adds rows; returns whether they equal those recorded for this batch."""
        if time < len(self.digests):
            return digest == self.digests[time]
        rows = rows.astype("float64")
        self.digests.append(digest)
        self.count += len(rows)
        self.sum = self.sum + rows.sum(axis=0)
        self.products = self.products + rows.T @ rows
        return True

    def principal(self, most):
        """Directions (inputs, most) of largest variance, and their shares of it all."""
        mean = self.sum / self.count
        covariance = self.products / self.count - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        return vectors[:, :most], values[:most] / (values.sum() or 1.0)


class Recorder:
    """Stands in for an adapter while a model is called.

    groups: digest of a layer's first rows -> Moments. Layers with equal inputs, as
    query, key and value have, share one.
    """

    def __init__(self, groups):
        self.groups, self.moments, self.times = groups, None, 0

    def outputs(self, host, inputs, training):
        rows = to_numpy(host.input_rows(inputs))
        digest = hashlib.sha256(rows.tobytes()).digest()
        if self.moments is None:
            self.moments = self.groups[digest]
        if not self.moments.add(rows, digest, self.times):
            raise ValueError(
                f"The inputs of {host.name!r} were those of another layer in the first "
                "batch of `data`, but not in a later one. Start with a larger batch."
            )
        self.times += 1
        return host.frozen_linear(inputs)


def layer_moments(model, layers, data) -> dict:
    """Layer -> Moments of its inputs, for batches of the model's inputs."""
    groups = collections.defaultdict(Moments)
    recorders = {layer: Recorder(groups) for layer in layers}
    try:
        for layer, recorder in recorders.items():
            layer.lora.stand_in = recorder
        for batch in batches_for(model, data):
            model(batch, training=False)
    finally:
        for layer in layers:
            layer.lora.stand_in = None
    for layer, recorder in recorders.items():
        if recorder.moments is None:
            raise ValueError(f"{layer.name!r} was not called for any batch of `data`.")
    return {layer: recorder.moments for layer, recorder in recorders.items()}


def batches_for(model, data):
    """Batches of the model's inputs; over several processes those of all together."""
    batches = batches_of(data)
    if not processes.is_shared(model):
        return batches
    batches = map(distribution.as_input, batches)
    return processes.in_step(model, batches, distribution.rows_given, OTHER_ROWS)


def batches_of(data):
    """Inputs from an array, a dict of arrays, or anything that gives batches.

    Batches of (inputs, targets), as `fit` takes them, give their inputs.
    """
    if hasattr(data, "shape") or isinstance(data, dict):
        data = [data]
    for batch in data:
        if isinstance(batch, tuple):
            batch, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        yield batch
