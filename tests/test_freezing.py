"""mark_only_lora_as_trainable: who trains, and that nobody else moves."""

import keras
import numpy as np
import pytest
from layer_cases import to_numpy
from models import MODELS, functional, sequential, trained, x, y

import keras_lora
from keras_lora.models.sites import adapted_sites

over_models = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


def names(model):
    return sorted(v.path.split("/", 1)[1] for v in model.trainable_weights)


@over_models
def test_only_the_factors_train(build):
    model = build()
    keras_lora.mark_only_lora_as_trainable(model)
    factors = [w for layer in adapted_sites(model) for w in layer.lora.weights]
    assert {id(w) for w in model.trainable_weights} == {id(w) for w in factors}


@over_models
def test_nothing_else_moves(build):
    model = trained(build)
    keras_lora.mark_only_lora_as_trainable(model)
    factors = {id(w) for layer in adapted_sites(model) for w in layer.lora.weights}
    before = [(w, to_numpy(w)) for w in model.weights]
    model.fit(x(), y(), epochs=2, verbose=0)  # compiled anew, not by the user
    for weight, value in before:
        moved = np.abs(to_numpy(weight) - value).max() > 0
        assert moved == (id(weight) in factors), weight.path


def test_biases():
    model = sequential()
    keras_lora.mark_only_lora_as_trainable(model, bias="lora_only")
    factors = ["last/lora/a", "last/lora/b", "lora_dense/lora/a", "lora_dense/lora/b"]
    assert names(model) == sorted([*factors, "lora_dense/bias"])
    keras_lora.mark_only_lora_as_trainable(model, bias="all")
    assert names(model) == sorted([*factors, "lora_dense/bias", "lora_dense_1/bias"])
    keras_lora.mark_only_lora_as_trainable(model, bias="none")
    assert names(model) == sorted(factors)


def test_batch_normalization_is_frozen_as_a_layer():
    model = trained(sequential)
    keras_lora.mark_only_lora_as_trainable(model, bias="all")
    normalization = model.layers[1]
    assert not normalization.trainable
    mean = to_numpy(normalization.moving_mean)
    model(x(), training=True)
    np.testing.assert_array_equal(to_numpy(normalization.moving_mean), mean)


def test_a_frozen_model_is_freed_where_it_must_be():
    model = functional()
    model.trainable = False
    keras_lora.mark_only_lora_as_trainable(model)
    assert len(model.trainable_weights) == 4


def test_a_head_can_be_freed_afterwards():
    model = keras.Sequential(
        [keras.Input((6,)), keras_lora.LoRADense(4), keras.layers.Dense(2)]
    )
    keras_lora.mark_only_lora_as_trainable(model)
    model.layers[-1].trainable = True
    assert len(model.trainable_weights) == 4


def test_bad_input():
    with pytest.raises(ValueError, match=r"'none', 'all', 'lora_only'.*bias='some'"):
        keras_lora.mark_only_lora_as_trainable(sequential(), bias="some")
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        keras_lora.mark_only_lora_as_trainable(plain)
    assert len(plain.trainable_weights) == 2
