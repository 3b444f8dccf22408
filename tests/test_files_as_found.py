"""Adapter files as people have them: all of one PEFT adapter, in many forms."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from layer_cases import to_numpy
from test_peft_exchange import NAMES, assert_same, ids, pair

import keras_lora
from keras_lora.files.config import CONFIG
from keras_lora.files.disk import TENSORS
from keras_lora.models.sites import adapted_sites


def random_values(adapted):
    """That bfloat16 and float16 hold."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape) * 0.3
                parameter.copy_(values.bfloat16().half())


@pytest.fixture
def found(tmp_path):
    """A folder of PEFT, its torch model, and the Keras model with the same weights."""
    model, module = pair()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["tokens", "q", "o", "conv"],
        modules_to_save=["head"],
        alpha_pattern={"q": 2},
    )
    adapted = peft.get_peft_model(module, config).eval()
    random_values(adapted)
    adapted.save_pretrained(tmp_path / "found")
    return tmp_path / "found", model, adapted


def tensors_of(folder):
    return safetensors.torch.load_file(folder / TENSORS)


def write(folder, tensors):
    safetensors.torch.save_file(tensors, folder / TENSORS, {"format": "pt"})


def halves(folder, adapted):
    write(folder, {key: value.half() for key, value in tensors_of(folder).items()})


def bfloat16s(folder, adapted):
    write(folder, {key: x.bfloat16() for key, x in tensors_of(folder).items()})


def split(folder, adapted):
    tensors = tensors_of(folder)
    (folder / TENSORS).unlink()
    parts = {key: f"part-{index % 3}.safetensors" for index, key in enumerate(tensors)}
    for part in set(parts.values()):
        some = {key: x for key, x in tensors.items() if parts[key] == part}
        safetensors.torch.save_file(some, folder / part)
    index = {"metadata": {}, "weight_map": parts}
    (folder / f"{TENSORS}.index.json").write_text(json.dumps(index))


def without_prefix(folder, adapted):
    tensors = tensors_of(folder)
    write(folder, {k.removeprefix("base_model.model."): x for k, x in tensors.items()})


def with_name(folder, adapted):
    """As torch's state dict has them, heads and what they replace too."""
    state = adapted.state_dict()
    known = ("lora_", "modules_to_save", "original_module")
    write(folder, {k: x for k, x in state.items() if any(word in k for word in known)})
    assert any(".lora_A.default.weight" in key for key in state)
    assert any(".modules_to_save.default." in key for key in state)


FORMS = [halves, bfloat16s, split, without_prefix, with_name]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_in_another_form(form, found):
    folder, model, adapted = found
    form(folder, adapted)
    before = to_numpy(model(ids()))
    keras_lora.load_adapter(model, folder, names=NAMES)
    assert_same(model, adapted)
    assert np.abs(to_numpy(model(ids())) - before).max() > 0.1


def test_a_folder_in_the_folder(found):
    """As PEFT saves a second adapter; alone there, it is meant by both."""
    folder, model, adapted = found
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q"]))
    adapted.set_adapter("second")
    random_values(adapted)
    adapted.save_pretrained(folder)
    keras_lora.load_adapter(model, folder / "second", names=NAMES)
    assert_same(model, adapted)
    keras_lora.remove_lora(model)
    for name in (CONFIG, TENSORS):
        (folder / name).unlink()
    keras_lora.load_adapter(model, folder, names=NAMES)
    assert_same(model, adapted)
    keras_lora.remove_lora(model)
    (folder / "second").rename(folder / "third")
    adapted.save_pretrained(folder)
    for name in (CONFIG, TENSORS):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"several adapters: \['second', 'third'\]"):
        keras_lora.load_adapter(model, folder, names=NAMES)


def refused(model, folder, match):
    with pytest.raises(ValueError, match=match) as error:
        keras_lora.load_adapter(model, folder, names=NAMES)
    assert adapted_sites(model) == []
    return str(error.value)


def test_several_names_in_the_keys_are_refused(found):
    folder, model, adapted = found
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q"]))
    state = {k: x for k, x in adapted.state_dict().items() if "lora_" in k}
    write(folder, state)
    refused(model, folder, r"several adapters, \['default', 'second'\]")


def no_map(index):
    return {"metadata": {}}


def outside(index):
    return {"weight_map": dict.fromkeys(index["weight_map"], "../found/part-0")}


def one_more(index):
    return {"weight_map": index["weight_map"] | {"more": "part-0.safetensors"}}


@pytest.mark.parametrize("change", [no_map, outside, one_more])
def test_a_bad_index_is_refused(change, found):
    folder, model, adapted = found
    split(folder, adapted)
    path = folder / f"{TENSORS}.index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refused(model, folder, "index.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("layer_replication", [[0, 1]]),
        ("lora_bias", True),
        ("monteclora_config", {"num_samples": 2}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
    ],
)
def test_settings_that_change_the_mathematics_are_refused(key, value, found):
    folder, model, _ = found
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {key: value}))
    refused(model, folder, f"{key}=.*changes the meaning of the factors")


def test_other_settings_are_named_in_one_warning(found):
    folder, model, adapted = found
    config = json.loads((folder / CONFIG).read_text())
    config |= {"velora_config": {"num_groups": 2}, "of_the_future": 1, "nothing": None}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.warns(
        UserWarning, match="ignored of_the_future, velora_config"
    ) as all_:
        keras_lora.load_adapter(model, folder, names=NAMES)
    assert [w.category for w in all_].count(UserWarning) == 1
    assert_same(model, adapted)


def test_a_pickle_comes_with_the_line_that_converts_it(found):
    folder, model, adapted = found
    torch.save(tensors_of(folder), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    message = refused(model, folder, "a pickle: loading one can run any program")
    line = shlex.split(re.search("python -c .*", message)[0])
    subprocess.run([sys.executable, *line[1:]], cwd=folder, check=True)
    keras_lora.load_adapter(model, folder, names=NAMES)
    assert_same(model, adapted)


def test_experts_are_refused_where_the_model_has_none(found):
    folder, model, adapted = found
    config = json.loads((folder / CONFIG).read_text())
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = tensors_of(folder)
    with pytest.warns(UserWarning, match="target_parameters has 'mlp.experts.gate_up"):
        keras_lora.load_adapter(model, folder, names=NAMES)
    assert_same(model, adapted)
    keras_lora.remove_lora(model)
    key = "base_model.model.mlp.experts.lora_{}.weight"
    more = {key.format("A"): torch.ones(12, 4), key.format("B"): torch.ones(6, 12)}
    write(folder, tensors | more)
    refused(
        model, folder, r"'mlp\.experts\.gate_up_proj', which the model does not have"
    )
