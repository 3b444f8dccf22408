"""The merged artifact: its predictions, its contents, and what a failure leaves."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from layer_cases import to_numpy
from models import MODELS, sequential, trained, x
from shared import assert_same_state, optimizer_state, predict, state

import keras_lora
from keras_lora.models.atomic import replacing
from keras_lora.models.sites import adapted_sites

tensorflow_format = pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="Keras writes no SavedModel from the torch backend without torch_xla",
)
# jax2tf's own parameter, which Keras passes.
pytestmark = pytest.mark.filterwarnings("ignore:The `native_serialization`")
over_models = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


def serve(path):
    import tensorflow as tf

    artifact = tf.saved_model.load(path)
    return artifact.serve(x()).numpy()


def stored_variables(path):
    import tensorflow as tf

    variables = tf.train.list_variables(str(path / "variables/variables"))
    return [pair for pair in variables if pair[0].startswith("variables/")]


@tensorflow_format
@over_models
def test_saved_model_predicts_the_same_and_holds_no_factors(build, tmp_path):
    model = trained(build)
    before, outputs, optimizer = state(model), predict(model), optimizer_state(model)
    keras_lora.export(model, tmp_path / "artifact")
    served = serve(tmp_path / "artifact")
    if keras.backend.backend() == "tensorflow":
        np.testing.assert_array_equal(served, outputs)
    else:  # another compiler
        np.testing.assert_allclose(served, outputs, rtol=0, atol=1e-6)
    shapes = [shape for _, shape in stored_variables(tmp_path / "artifact")]
    adapters = {id(w) for layer in adapted_sites(model) for w in layer.lora.weights}
    plain = [list(w.shape) for w in model.weights if id(w) not in adapters]
    assert sorted(shapes) == sorted(plain)
    assert_same_state(before, state(model))
    np.testing.assert_array_equal(predict(model), outputs)
    for old, new in zip(optimizer, optimizer_state(model), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
@tensorflow_format
def test_saved_model_needs_no_keras_lora(tmp_path):
    model = trained(sequential)
    keras_lora.export(model, tmp_path / "artifact")
    np.savez(tmp_path / "data.npz", x=x(), outputs=predict(model))
    program = (
        "import sys; sys.modules['keras_lora'] = None; sys.modules['keras'] = None\n"
        "import numpy as np, tensorflow as tf\n"
        "data = np.load('data.npz')\n"
        "artifact = tf.saved_model.load('artifact')\n"
        "served = artifact.serve(data['x']).numpy()\n"
        "np.testing.assert_allclose(served, data['outputs'], rtol=0, atol=1e-6)\n"
        "print('same')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout.strip() == "same", run.stderr


@tensorflow_format
def test_second_export_replaces_the_first(tmp_path):
    model = trained(sequential)
    keras_lora.export(model, tmp_path / "artifact")
    adapted_sites(model)[0].lora.set_alpha(60)
    keras_lora.export(model, tmp_path / "artifact")
    served = serve(tmp_path / "artifact")
    np.testing.assert_allclose(served, predict(model), rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_failed_export_changes_nothing(moment, tmp_path, monkeypatch):
    model = trained(sequential)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "saved_model.pb").write_text("old")
    before, outputs, optimizer = state(model), predict(model), optimizer_state(model)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    # The artifact is text.
    for check in ("refuse_broken_artifact", "refuse_format_of_other_backends"):
        monkeypatch.setattr(f"keras_lora.models.export.{check}", lambda *given: None)
    if moment == "writing":
        monkeypatch.setattr(keras.Model, "export", fail)
    else:

        def write(self, path, **kwargs):
            os.mkdir(path)

        monkeypatch.setattr(keras.Model, "export", write)
        monkeypatch.setattr("keras_lora.models.atomic.exchange", fail)
    with pytest.raises(OSError, match="no space"):
        keras_lora.export(model, tmp_path / "artifact")
    monkeypatch.undo()
    assert (tmp_path / "artifact" / "saved_model.pb").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert_same_state(before, state(model))
    np.testing.assert_array_equal(predict(model), outputs)
    for old, new in zip(optimizer, optimizer_state(model), strict=True):
        np.testing.assert_array_equal(old, new)
    assert all(isinstance(x, keras_lora.LoRADense) for x in adapted_sites(model))


class Refusing:
    """A library on a file system that cannot swap."""

    def renameat2(self, *names):
        return -1


@pytest.mark.parametrize("library", [None, Refusing()])
def test_two_renames_where_folders_cannot_be_swapped(library, tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    for text in ("first", "second"):
        with replacing(tmp_path / "folder") as new:
            new.mkdir()
            (new / "file").write_text(text)
        assert (tmp_path / "folder" / "file").read_text() == text

    rename = os.rename

    def fail_at_second(source, target):
        if source == new:
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr("os.rename", fail_at_second)
    with (
        pytest.raises(OSError, match="no space"),
        replacing(tmp_path / "folder") as new,
    ):
        new.mkdir()
    assert (tmp_path / "folder" / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_an_os_error(tmp_path):
    resource = pytest.importorskip("resource")  # POSIX
    model = trained(sequential)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large.*served"):
            keras_lora.export(model, tmp_path / "served")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_unbuilt_model_is_refused(tmp_path):
    model = keras.Sequential([keras_lora.LoRADense(3)])
    with pytest.raises(ValueError, match="not built"):
        keras_lora.export(model, tmp_path / "artifact")


@pytest.mark.parametrize("path", ["artifact", "folder"])
def test_a_format_that_is_none_is_named(path, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"'litert'.*'tflite'.*mean 'litert'"):
        keras_lora.export(trained(sequential), tmp_path / path, format="tflite")
    assert (tmp_path / "folder" / "mine").read_text() == "kept"


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="others have a default")
def test_the_default_format_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r'torch_xla.*format="torch".*\.pt2'):
        keras_lora.export(trained(sequential), tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


@tensorflow_format
def test_merge_weights_false_exports_merged_too(tmp_path):
    model = trained(sequential)
    for layer in adapted_sites(model):
        layer.merge_weights = False
    keras_lora.export(model, tmp_path / "artifact")
    served = serve(tmp_path / "artifact")
    np.testing.assert_allclose(served, predict(model), rtol=0, atol=1e-5)
    names = [name for name, _ in stored_variables(tmp_path / "artifact")]
    assert len(names) == len(model.weights) - 4


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's own format")
def test_torch_format(tmp_path):
    import torch

    model = trained(sequential)
    signature = [keras.InputSpec(shape=(16, 6), dtype="float32")]
    path = tmp_path / "artifact.pt2"
    keras_lora.export(model, path, format="torch", input_signature=signature)
    served = torch.export.load(path).module()(torch.tensor(x()))
    np.testing.assert_allclose(to_numpy(served), predict(model), rtol=0, atol=1e-6)
