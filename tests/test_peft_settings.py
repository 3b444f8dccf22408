"""Heads, tied embeddings and settings that PEFT writes, against PEFT itself."""

import itertools
import json

import keras
import keras_hub
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from layer_cases import fill, slow_but, to_numpy
from name_tables import NAME_TABLES
from their_models import BERT, GEMMA, GPT2, ids, loaded_by_peft, theirs

import keras_lora
from keras_lora.files.config import CONFIG
from keras_lora.files.disk import TENSORS

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT's own
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


def inputs():
    mask = np.ones_like(ids())
    return {"token_ids": ids(), "padding_mask": mask, "segment_ids": 0 * mask}


def saved_by_peft(module, folder, **settings):
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=2, **settings)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    adapted.save_pretrained(folder)
    return adapted


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def classifier(folder):
    torch.manual_seed(3)
    config = transformers.BertConfig(**BERT.to_diff_dict() | {"num_labels": 3})
    module = transformers.BertForSequenceClassification(config).eval()
    module.bert.save_pretrained(folder)
    backbone = keras_hub.models.BertBackbone.from_preset(str(folder))
    return module, keras_hub.models.BertTextClassifier(
        backbone, num_classes=3, preprocessor=None
    )


def test_sequence_classification(tmp_path):
    """PEFT names a head "score" too, which BERT has not; the type stays."""
    module, model = classifier(tmp_path / "base")
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    adapted = saved_by_peft(module, tmp_path / "theirs", **settings)
    written = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert written["modules_to_save"] == ["classifier", "score"]
    keras_lora.load_adapter(model, tmp_path / "theirs", names="bert")
    with torch.no_grad():
        expected = adapted(torch.tensor(ids()).long()).logits.numpy()
    close(to_numpy(model(inputs())), expected)
    keras_lora.save_adapter(model, tmp_path / "ours", names="bert")
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == written["base_model_name_or_path"]
    again = transformers.BertForSequenceClassification(module.config).eval()
    again.bert.load_state_dict(
        transformers.BertModel.from_pretrained(tmp_path / "base").state_dict()
    )
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    with torch.no_grad():
        close(loaded(torch.tensor(ids()).long()).logits.numpy(), expected)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.h, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.h(x))


def net_pair():
    torch.manual_seed(4)
    module, data = Net().eval(), keras.Input((6,))
    hidden = keras.layers.Dense(8, name="h")(data)
    model = keras.Model(data, keras.layers.Dense(3, name="head")(hidden))
    for layer in model.layers[1:]:
        linear = getattr(module, layer.name)
        layer.kernel.assign(linear.weight.detach().numpy().T)
        layer.bias.assign(linear.bias.detach().numpy())
    return module, model


def net_outputs(model):
    x = np.random.default_rng(1).standard_normal((5, 6), "float32")
    if isinstance(model, keras.Model):
        return to_numpy(model(x))
    return model(torch.tensor(x)).detach().numpy()


def test_all_biases_beside_a_head(tmp_path):
    """PEFT writes the head's bias three times."""
    module, model = net_pair()
    settings = {"target_modules": ["h"], "bias": "all", "modules_to_save": ["head"]}
    adapted = saved_by_peft(module, tmp_path / "theirs", **settings)
    keys = safetensors.numpy.load_file(tmp_path / "theirs" / TENSORS)
    assert len([key for key in keys if "head" in key and "bias" in key]) == 3
    keras_lora.load_adapter(model, tmp_path / "theirs")
    close(net_outputs(model), net_outputs(adapted))
    keras_lora.save_adapter(model, tmp_path / "ours")
    loaded = loaded_by_peft(net_pair()[0], tmp_path / "ours")
    close(net_outputs(loaded), net_outputs(adapted))


def test_two_tensors_for_one_bias_must_agree(tmp_path):
    module, model = net_pair()
    settings = {"target_modules": ["h"], "bias": "all", "modules_to_save": ["head"]}
    saved_by_peft(module, tmp_path, **settings)
    tensors = safetensors.numpy.load_file(tmp_path / TENSORS)
    tensors["base_model.model.head.modules_to_save.bias"] += 1
    safetensors.numpy.save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=r"two tensors for 'head\.bias'"):
        keras_lora.load_adapter(model, tmp_path)


def test_a_name_without_a_tensor_is_passed_over(tmp_path):
    """PEFT writes names of other models' heads too; here a layer is called so."""
    module, model = net_pair()
    settings = {"target_modules": ["h"], "modules_to_save": ["head", "score"]}
    adapted = saved_by_peft(module, tmp_path, **settings)
    score = keras.layers.Dense(2, name="score")
    both = keras.Model(model.inputs, [model.output, score(model.layers[1].output)])
    before = to_numpy(score.kernel)
    report = keras_lora.load_adapter(both, tmp_path)
    close(net_outputs(model), net_outputs(adapted))
    np.testing.assert_array_equal(to_numpy(score.kernel), before)
    assert report.also_trained == ["head"]


class Tokens(torch.nn.Module):
    """With the names by which PEFT knows an embedding that it writes down again."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(9, 6)
        self.lm_head = torch.nn.Linear(6, 3)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.embed_tokens(ids))


def test_weights_that_peft_repeats_are_passed_over(tmp_path):
    module = Tokens().eval()
    data = keras.Input((4,), dtype="int32")
    table = keras.layers.Embedding(9, 6, name="embed_tokens")
    head = keras.layers.Dense(3, name="lm_head")
    model = keras.Model(data, head(table(data)))
    table.embeddings.assign(module.embed_tokens.weight.detach().numpy())
    head.kernel.assign(module.lm_head.weight.detach().numpy().T)
    head.bias.assign(module.lm_head.bias.detach().numpy())
    targets = ["embed_tokens", "lm_head"]
    adapted = saved_by_peft(module, tmp_path, target_modules=targets)
    keys = safetensors.numpy.load_file(tmp_path / TENSORS)
    assert len([key for key in keys if key.endswith(".base_layer.weight")]) == 2
    keras_lora.load_adapter(model, tmp_path)
    ids = np.array([[1, 5, 8, 0]])
    expected = adapted(torch.tensor(ids)).detach().numpy()
    close(to_numpy(model(ids)), expected)


def test_the_file_says_itself_what_it_is_of(tmp_path):
    _, model = net_pair()
    keras_lora.apply_lora(model, rank=2, target=["h"])
    said = {"task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": "some/base"}
    keras_lora.save_adapter(model, tmp_path / "first", **said)
    config = peft.PeftConfig.from_pretrained(tmp_path / "first")
    assert {key: getattr(config, key) for key in said} == said
    other = net_pair()[1]
    keras_lora.load_adapter(other, tmp_path / "first")
    keras_lora.save_adapter(other, tmp_path / "second", task_type="SEQ_CLS")
    both = keras_lora.combine_adapters([tmp_path / "first", tmp_path / "second"])
    assert both.config["task_type"] is None
    assert both.config["base_model_name_or_path"] == "some/base"
    config = peft.PeftConfig.from_pretrained(tmp_path / "second")
    assert config.task_type == "SEQ_CLS"
    assert config.base_model_name_or_path == "some/base"
    with pytest.raises(ValueError, match="`task_type` must be a name"):
        keras_lora.save_adapter(other, tmp_path / "third", task_type=3)
    assert not (tmp_path / "third").exists()


class Labels(torch.nn.Module):
    """GPT-2 with a head: one is of Conv1D, (in, out), the other is a Linear."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer, self.score = transformer, torch.nn.Linear(16, 3)

    def forward(self, ids):
        return (self.score(self.transformer(ids)[0]),)


def labels_pair(folder):
    torch.manual_seed(3)
    module = Labels(transformers.GPT2Model(GPT2).eval()).eval()
    module.transformer.save_pretrained(folder)
    backbone = keras_hub.models.GPT2Backbone.from_preset(str(folder))
    head = keras.layers.Dense(3, name="score")
    names = ("token_ids", "padding_mask")
    data = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
    model = keras.Model(data, head(backbone(data)))
    head.kernel.assign(module.score.weight.detach().numpy().T)
    head.bias.assign(module.score.bias.detach().numpy())
    return module, model


def labels(model):
    fed = {key: inputs()[key] for key in ("token_ids", "padding_mask")}
    return to_numpy(model(fed))


# c_fc is a Conv1D that is no square.
@pytest.mark.parametrize("names", ["gpt2", "function"])
def test_the_files_own_fan_in_fan_out_decides(names, tmp_path):
    module, model = labels_pair(tmp_path / "base")
    settings = {"target_modules": ["c_attn"], "modules_to_save": ["c_fc", "score"]}
    settings["fan_in_fan_out"] = True
    adapted = saved_by_peft(module, tmp_path / "theirs", **settings)
    if names == "function":
        table = NAME_TABLES["gpt2"]
        names = lambda path: table(path)  # noqa: E731
    keras_lora.load_adapter(model, tmp_path / "theirs", names=names)
    close(labels(model), theirs(adapted))


def test_peft_loads_a_head_beside_conv1d(tmp_path):
    module, model = labels_pair(tmp_path / "base")
    also_train = ["score", "feedforward_intermediate_dense"]
    keras_lora.apply_lora(model, rank=2, target=["query"], also_train=also_train)
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.2)
    keras_lora.save_adapter(model, tmp_path / "ours", names="gpt2")
    close(theirs(loaded_by_peft(module, tmp_path / "ours")), labels(model))


TIED = {
    "gpt2": (transformers.GPT2LMHeadModel, GPT2, keras_hub.models.GPT2CausalLM, "wte"),
    "gemma": (
        transformers.GemmaForCausalLM,
        GEMMA,
        keras_hub.models.GemmaCausalLM,
        "embed_tokens",
    ),
}


QUICK = ("gpt2-False-True", "gpt2-True-False", "gemma-False-False", "gemma-True-True")


@pytest.mark.parametrize(
    ("table", "full", "tying"),
    slow_but(QUICK, itertools.product(TIED, [False, True], [False, True])),
)
def test_a_tied_embedding_is_refused_in_both_directions(table, full, tying, tmp_path):
    """In PEFT the head stays the base's: the same factors mean other outputs."""
    torch_class, config, task, name = TIED[table]
    torch.manual_seed(3)
    module = torch_class(config).eval()
    module.save_pretrained(tmp_path / "base")
    model = task.from_preset(str(tmp_path / "base"), preprocessor=None)
    fed = {key: inputs()[key] for key in ("token_ids", "padding_mask")}
    before = to_numpy(model(fed))
    close(before, theirs(module))
    settings = {"target_modules": [name]}
    if full:
        other = {"gpt2": "c_attn", "gemma": "q_proj"}[table]
        settings = {"target_modules": [other], "modules_to_save": [name]}
    if tying:
        settings["ensure_weight_tying"] = True
    saved_by_peft(
        module, tmp_path / "theirs", fan_in_fan_out=table == "gpt2", **settings
    )
    # Gemma's head gets factors of its own if they are to be tied.
    reason = "makes the model's outputs too|'lm_head', which the model does not have"
    with pytest.raises(ValueError, match=reason):
        keras_lora.load_adapter(model, tmp_path / "theirs", names=table)
    np.testing.assert_array_equal(to_numpy(model(fed)), before)
    also_train = ["token_embedding"] if full else None
    target = ["attention_output" if full else "token_embedding"]
    keras_lora.apply_lora(model, rank=2, target=target, also_train=also_train)
    with pytest.raises(ValueError, match="makes the model's outputs too"):
        keras_lora.save_adapter(model, tmp_path / "ours", names=table)
    assert not (tmp_path / "ours").exists()
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.2)
    keras_lora.save_adapter(model, tmp_path / "own")
    again = task.from_preset(str(tmp_path / "base"), preprocessor=None)
    keras_lora.load_adapter(again, tmp_path / "own")
    close(to_numpy(again(fed)), to_numpy(model(fed)))
    keras_lora.save_adapter(model.backbone, tmp_path / "backbone", names=table)
