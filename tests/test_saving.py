"""Stop anywhere and go on: A, B, alpha, W and the optimizer come back."""

import keras
import numpy as np
import pytest
from layer_cases import CASES
from layer_cases import fill
from layer_cases import to_numpy
from models import MODELS
from models import trained
from models import x
from models import y

from keras_lora import LoRADense
from keras_lora import merge_lora
from keras_lora.models.adapt import lora_layers

over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def compiled(model, traced=True):
    # Tracing takes seconds on TensorFlow.
    eagerly = not traced and keras.backend.backend() == "tensorflow"
    how = {"run_eagerly": True} if eagerly else {"jit_compile": False}
    model.compile(keras.optimizers.Adam(0.05), "mse", **how)
    model.optimizer.build(model.trainable_variables)
    return model


def losses(model, data, epochs, **kwargs):
    history = model.fit(*data, epochs=epochs, verbose=0, shuffle=False, **kwargs)
    return history.history["loss"]


@over_cases
@pytest.mark.parametrize("form", ["model.keras", "model.weights.h5"])
def test_losses_go_on_as_if_never_stopped(case, form, tmp_path):
    data, traced = (case.inputs(8), case.targets(8)), case in CASES[::5]
    model = compiled(case.model(), traced)
    losses(model, data, 2)
    if form.endswith(".keras"):
        model.save(tmp_path / form)
        resumed = keras.models.load_model(tmp_path / form)
    else:
        model.save_weights(tmp_path / form)
        keras.utils.set_random_seed(99)
        resumed = compiled(case.model(), traced)
        resumed.load_weights(tmp_path / form)
    np.testing.assert_array_equal(
        resumed.predict(data[0], verbose=0), model.predict(data[0], verbose=0)
    )
    for old, new in zip(model.weights, resumed.weights, strict=True):
        assert (old.name, old.trainable) == (new.name, new.trainable)
        np.testing.assert_array_equal(to_numpy(old), to_numpy(new))
    for old, new in zip(
        model.optimizer.variables, resumed.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(to_numpy(old), to_numpy(new))
    assert losses(resumed, data, 2) == losses(model, data, 2)


@over_cases
def test_weights_file_brings_its_own_alpha(case, tmp_path):
    model = case.model()
    lora = model.layers[0].lora
    lora.set_alpha(3.5, use_rslora=True)
    model.save_weights(tmp_path / "model.weights.h5")
    other = case.model()
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.layers[0].lora.scaling == lora.scaling
    np.testing.assert_array_equal(
        other.predict(case.inputs(), verbose=0), model.predict(case.inputs(), verbose=0)
    )


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_every_construction_reloads(build, tmp_path):
    model = trained(build)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        resumed.predict(x(), verbose=0), model.predict(x(), verbose=0)
    )
    assert len(lora_layers(resumed)) == len(lora_layers(model))
    data = x(), y()
    assert losses(resumed, data, 2) == losses(model, data, 2)


def test_model_checkpoint(tmp_path):
    case = CASES[0]
    data = case.inputs(8), case.targets(8)
    keras.utils.set_random_seed(1)
    whole = losses(compiled(case.model()), data, 4)
    keras.utils.set_random_seed(1)
    save = keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")
    losses(compiled(case.model()), data, 2, callbacks=[save])
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert losses(resumed, data, 2) == whole[2:]


def test_backup_and_restore(tmp_path):
    case = CASES[0]
    data = case.inputs(8), case.targets(8)
    keras.utils.set_random_seed(1)
    whole = losses(compiled(case.model()), data, 4)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    keras.utils.set_random_seed(1)
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        losses(compiled(case.model()), data, 4, callbacks=[backup, Stop()])
    keras.utils.set_random_seed(99)
    resumed = compiled(case.model())
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    assert losses(resumed, data, 4, callbacks=[backup]) == whole[2:]


@keras.saving.register_keras_serializable("tests")
class MakesLoRA(keras.layers.Layer):
    """Its configuration alone makes a LoRA layer, whatever became of that one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.part = LoRADense(3, rank=2)

    def build(self, input_shape):
        self.part.build(input_shape)

    def call(self, inputs):
        return self.part(inputs)


def test_a_file_without_a_and_b_says_how_to_read_it(tmp_path):
    def build():
        return keras.Sequential([keras.Input((6,)), MakesLoRA()])

    model = build()
    fill(model.layers[0].part.lora.b, seed=1)
    expected = to_numpy(model(x()))
    merge_lora(model)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"call merge_lora on it too"):
        keras.models.load_model(tmp_path / "model.keras")
    other = build()
    merge_lora(other)
    other.load_weights(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(other(x())), expected, rtol=1e-5, atol=1e-6)
