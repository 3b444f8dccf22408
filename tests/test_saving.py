"""Stop anywhere and go on: A, B, alpha, W and the optimizer come back."""

import keras
import numpy as np
import pytest
import shared
from layer_cases import CASES, DORA, KINDS, SUBSTITUTED, fill, over, to_numpy
from models import MODELS, sequential, trained, x, y
from seeds import set_seed

from keras_lora import LoRADense, merge_lora
from keras_lora.models.sites import adapted_sites

# A row for each way to compute, and those whose dropout goes on where it was.
ROWS = [case for case in CASES if case in KINDS or case.lora.get("dropout")]
ROWS += SUBSTITUTED
ROWS += DORA[::3]


def compiled(model, traced=True):
    # Tracing takes seconds on TensorFlow.
    eagerly = not traced and keras.backend.backend() == "tensorflow"
    how = {"run_eagerly": True} if eagerly else {"jit_compile": False}
    model.compile(keras.optimizers.Adam(0.05), "mse", **how)
    model.optimizer.build(model.trainable_variables)
    return model


def losses(model, data, epochs, **kwargs):
    return shared.losses(model, *data, epochs, batch_size=32, **kwargs)


@pytest.mark.parametrize(
    ("case", "form"),
    [(case, "model.keras") for case in ROWS]
    + [(case, "model.weights.h5") for case in ROWS[::6]],
    ids=lambda value: getattr(value, "name", value),
)
def test_losses_go_on_as_if_never_stopped(case, form, tmp_path):
    data, traced = (case.inputs(8), case.targets(8)), case in ROWS[::12]
    model = compiled(case.model(), traced)
    losses(model, data, 2)
    if form.endswith(".keras"):
        model.save(tmp_path / form)
        resumed = keras.models.load_model(tmp_path / form)
    else:
        model.save_weights(tmp_path / form)
        set_seed(99)
        resumed = compiled(case.model(), traced)
        resumed.load_weights(tmp_path / form)
    np.testing.assert_array_equal(
        resumed.predict_on_batch(data[0]), model.predict_on_batch(data[0])
    )
    adapters = [list(x.layers[0].loras.values()) for x in (resumed, model)]
    assert [*map(type, adapters[0])] == [*map(type, adapters[1])] != []
    for old, new in zip(model.weights, resumed.weights, strict=True):
        assert (old.name, old.trainable) == (new.name, new.trainable)
        np.testing.assert_array_equal(to_numpy(old), to_numpy(new))
    for old, new in zip(
        model.optimizer.variables, resumed.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(to_numpy(old), to_numpy(new))
    assert losses(resumed, data, 2) == losses(model, data, 2)


@over([CASES[0], *DORA[:1]])
def test_weights_file_brings_its_own_alpha(case, tmp_path):
    model = case.model()
    lora = model.layers[0].lora
    lora.set_alpha(3.5, use_rslora=True)
    model.save_weights(tmp_path / "model.weights.h5")
    other = case.model()
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.layers[0].lora.scaling == lora.scaling
    inputs = case.inputs()
    np.testing.assert_array_equal(to_numpy(other(inputs)), to_numpy(model(inputs)))


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_every_construction_reloads(build, tmp_path):
    model = trained(build)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        resumed.predict_on_batch(x()), model.predict_on_batch(x())
    )
    assert len(adapted_sites(resumed)) == len(adapted_sites(model))
    if build is not sequential and keras.backend.backend() == "tensorflow":
        model.run_eagerly = resumed.run_eagerly = True
    data = x(), y()
    assert losses(resumed, data, 2) == losses(model, data, 2)


def test_model_checkpoint(tmp_path):
    case = CASES[0]
    data = case.inputs(8), case.targets(8)
    set_seed(1)
    whole = losses(compiled(case.model()), data, 4)
    set_seed(1)
    save = keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")
    losses(compiled(case.model()), data, 2, callbacks=[save])
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert losses(resumed, data, 2) == whole[2:]


def test_backup_and_restore(tmp_path):
    case = CASES[0]
    data = case.inputs(8), case.targets(8)
    set_seed(1)
    whole = losses(compiled(case.model()), data, 4)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    set_seed(1)
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        losses(compiled(case.model()), data, 4, callbacks=[backup, Stop()])
    set_seed(99)
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


@pytest.mark.parametrize("name", ["plain.weights.h5", "plain.keras"])
def test_the_file_of_a_plain_model_says_where_to_load_it(name, tmp_path):
    def network(dense):
        return keras.Sequential([keras.Input((3,)), dense(4), dense(2)])

    plain, lora = network(keras.layers.Dense), network(LoRADense)
    save = plain.save if name.endswith(".keras") else plain.save_weights
    save(tmp_path / name)
    with pytest.raises(ValueError, match="into the plain model and call"):
        lora.load_weights(tmp_path / name)
