"""Two of the models of docs/compatibility.md, in the suite; the table has all."""

import keras
import pytest
from compatibility import application
from compatibility import check


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MobileNetV2"])
def test_application(name):
    adapted, parameters, trained, difference, reload, reason = check(application(name))
    assert int(adapted) > 30
    assert trained == f"{adapted} of {adapted}"
    assert float(difference) < 1e-5
    assert (reload, reason) == ("exact", "")
    assert int(parameters.replace(",", "")) > 0


@pytest.mark.filterwarnings("ignore")
def test_keras_hub_task_keeps_its_methods(tmp_path):
    """README's code path for a preset, on a small random backbone."""
    keras_hub = pytest.importorskip("keras_hub")
    import keras_lora

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=50,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
    )
    classifier = keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=2, preprocessor=None
    )
    report = keras_lora.apply_lora(
        classifier, rank=4, target=["query", "value"], also_train=["logits"]
    )
    assert len(report) == 4
    assert isinstance(classifier, keras_hub.models.TextClassifier)
    ids = keras.ops.ones((4, 12), "int32")
    inputs = {"token_ids": ids, "segment_ids": ids * 0, "padding_mask": ids}
    labels = keras.ops.convert_to_tensor([0, 1, 0, 1])
    classifier.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    classifier.fit(inputs, labels, epochs=2, verbose=0)
    expected = classifier.predict(inputs, verbose=0)
    classifier.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras")
    assert isinstance(loaded, keras_hub.models.TextClassifier)
    assert (loaded.predict(inputs, verbose=0) == expected).all()
    keras_lora.merge_lora(classifier)
    assert type(classifier) is keras_hub.models.BertTextClassifier
