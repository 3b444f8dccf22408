"""Files from strangers: ValueError or OSError, in bounded time and memory."""

import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from layer_cases import to_numpy

import keras_lora
from keras_lora.files import patterns
from keras_lora.files.config import CONFIG, values_by_module
from keras_lora.files.disk import TENSORS
from keras_lora.models.sites import adapted_sites

posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX")


@pytest.fixture(autouse=True)
def no_endless_test():
    """What hangs is stopped, so that the other tests still run."""
    if os.name == "posix":
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(240)
    yield
    if os.name == "posix":
        signal.alarm(0)


def model(dtype="float32", name="one"):
    return keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(24, name=name, dtype=dtype),
            keras.layers.Dense(3, name="head", dtype=dtype),
        ]
    )


A, B = np.ones((4, 12), "float32"), np.ones((24, 4), "float32")
FACTORS = {
    "base_model.model.one.lora_A.weight": A,
    "base_model.model.one.lora_B.weight": B,
}
HEAD = {
    "base_model.model.head.weight": np.ones((3, 24), "float32"),
    "base_model.model.head.bias": np.ones((3,), "float32"),
}


def write(folder, tensors=FACTORS, metadata=None, **settings):
    """As PEFT writes it, but for what is given."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["one"]}
    (folder / CONFIG).write_text(json.dumps(config | settings))
    metadata = {"format": "pt"} | (metadata or {})
    safetensors.numpy.save_file(tensors, folder / TENSORS, metadata)
    return folder


def refused(load, match=None, onto=None):
    """A ValueError or OSError, and the model is as before."""
    plain = onto or model()
    before = [to_numpy(weight) for weight in plain.weights]
    with pytest.raises((ValueError, OSError), match=match):
        load(plain)
    assert adapted_sites(plain) == []
    for old, new in zip(before, plain.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))


def some_expression(choose, depth):
    kind = choose.random()
    if depth == 0 or kind < 0.35:
        return choose.choice(
            [
                "a",
                "ab",
                ".",
                r"\.",
                r"\d",
                "[ab]",
                "[^a]",
                "^",
                "$",
                "0",
                r"\w",
                "-",
                "",
            ]
        )
    if kind < 0.6:
        return some_expression(choose, depth - 1) + some_expression(choose, depth - 1)
    inner = some_expression(choose, depth - 1)
    if kind < 0.75:
        return f"({inner}|{some_expression(choose, depth - 1)})"
    often = choose.choice(["*", "+", "?", "{2}", "{1,2}", "{0,3}", "{2,}", "*?", "{0}"])
    return f"(?:{inner}){often}"


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_expressions_mean_what_python_makes_of_them():
    choose, compared = random.Random(0), 0
    texts = ["", "a", "ab", "a.b", "b.a.b", "a-b", "0", "a0.ab", "ab.ab.a", "aaa"]
    while compared < 2_000:
        expression = some_expression(choose, 4)
        try:
            own = patterns.Pattern(expression, patterns.Budget())
        except ValueError:
            continue
        python = re.compile(rf"(.*\.)?({expression})$")
        for text in texts:
            compared += 1
            assert own.matches(text, part=True) == bool(python.match(text))
            whole = re.fullmatch(expression, text)
            assert own.matches(text) == bool(whole), (expression, text)


ENDLESS = [
    "([a-z_0-9]+)+!",
    "(a|a)*(a|a)*b",
    "(" * 15 + "[a-z]*" + ")*" * 15 + "!",
    ".*" * 500 + "!",
    "(|||)*" * 300 + "!",
    "(a{9999}){9999}",
]
WRONG = [
    "(",
    ")",
    "*",
    "a**",
    "[",
    r"\1",
    r"(?P<x>a)(?P=x)",
    "(?<=a)b",
    "(" * 1900,
    "a" * 2001,
    "\\",
]


@pytest.mark.parametrize("expression", ENDLESS)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_expressions_that_backtrack(key, expression, tmp_path):
    name = "transformer_layer_0_self_attention_query_" + "a" * 200
    tensors = {k.replace("one", name): value for k, value in FACTORS.items()}
    settings = {key: expression if key == "target_modules" else {expression: 2}}
    write(tmp_path, tensors, **{"target_modules": [name]} | settings)
    refused(
        lambda m: keras_lora.load_adapter(m, tmp_path),
        "not a regular expression|take too long",
        model(name=name),
    )


# Of published adapters, and of PEFT's documentation.
USUAL = [
    r"model\.layers\.(0|1|2|10|11|12)\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj)",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^(?!.*vision).*$",
    "a{4000000000}",
    r".*\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention).*?(?:q_proj|v_proj).*?)|(?:\bx)",
]


@pytest.mark.parametrize("expression", USUAL)
def test_expressions_that_people_write(expression):
    names = [
        f"model.layers.{n}.{x}"
        for n in range(80)
        for x in ("self_attn.q_proj", "mlp.up_proj")
    ]
    if "?!" in expression or r"\b" in expression:
        with pytest.raises(ValueError, match="is not supported"):
            patterns.Pattern(expression, patterns.Budget())
        return
    own = patterns.Pattern(expression, patterns.Budget())
    found = [name for name in names if own.matches(name)]
    assert found == [name for name in names if re.fullmatch(expression, name)]


@pytest.mark.parametrize("expression", WRONG)
@pytest.mark.parametrize("key", ["rank_pattern", "target_modules"])
def test_expressions_that_are_none(key, expression, tmp_path):
    settings = {key: expression if key == "target_modules" else {expression: 2}}
    write(tmp_path, **settings)
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), "not a regular expression")


def test_expressions_by_the_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT", 40_000)
    write(tmp_path, rank_pattern={f"{n}x.*{'[ab]*' * 3}.": 2 for n in range(1000)})
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), "take too long")


@pytest.mark.parametrize(
    "expression, repeats, choices",
    [
        ("abc", 0, 1),
        (r"a\.*[b*]+c{2,3}", 3, 1),
        ("(q|v|o)_proj", 0, 1),  # of these words only one begins at a place
        ("(1|10|101|2)", 0, 3),
        ("(|a)(|a)", 0, 4),
        ("a?b?", 0, 4),
        ("(?:x.*|y(a|a)?)z", 1, 2 * 2 * 2),
        ("one|.*", 1, 2),
    ],
)
def test_ways_to_match_are_counted(expression, repeats, choices):
    assert patterns.ways(expression) == (repeats, choices)


@pytest.mark.parametrize("expression", ["(a+)+", "(a|aa)*", "((?:a?)b){2,}"])
def test_repeats_inside_of_repeats_are_refused(expression):
    with pytest.raises(ValueError, match="a repeated group holds a repeat or a choice"):
        patterns.ways(expression)


def test_what_takes_time_is_spent():
    budget = patterns.Budget()
    pattern = patterns.Pattern("(a|a).*.*", budget)
    before = budget.ways
    assert not pattern.matches("b" * 10)
    assert before - budget.ways == 2 * 12 * 11 // 2
    budget.ways = 0
    with pytest.raises(ValueError, match="take too long"):
        pattern.matches("b" * 10)


def test_ends_of_names_cost_little(monkeypatch):
    """PEFT's keys are such: a file of hundreds has to be read."""
    ranks = {f"layers.dense_{n}": n + 1 for n in range(300)}
    keys = {module.removeprefix("layers."): rank for module, rank in ranks.items()}
    monkeypatch.setattr(patterns, "LIMIT", 10_000)
    config = {"rank_pattern": keys, "r": 1000}
    assert values_by_module(config, "rank_pattern", "r", ranks) == ranks


def test_the_first_key_that_fits_decides():
    """A whole name too, which is looked up and not matched."""
    config = {"rank_pattern": {"^one": 3, "o.*": 5, "^other": 7}, "r": 8}
    with pytest.warns(UserWarning, match="'\\^other'"):
        found = values_by_module(config, "rank_pattern", "r", ["one", "other"])
    assert found == {"one": 3, "other": 5}


def test_thousands_of_names_are_no_such_thing(tmp_path):
    """What is written here for every module costs nothing."""
    names = [f"layers.{n}.conv[{n}]" for n in range(3000)]
    tensors = {
        f"base_model.model.{name}.lora_{x}.weight": np.zeros((1, 1), "float32")
        for name in names
        for x in "AB"
    }
    ranks = {f"^{re.escape(name)}": 1 for name in names[:-1]}
    write(tmp_path, tensors, target_modules=names, rank_pattern=ranks)
    with pytest.raises(ValueError, match=r"'layers\.2999.* has rank 4"):
        keras_lora.combine_adapters([tmp_path])


SIGNS = ["up+down", "conv[0]", "is_it?", "conv(1)", "a|b", "cost$", "a(b", "^c", "a{2}"]


@pytest.mark.parametrize("sign", SIGNS)
def test_names_with_signs_of_expressions(sign, tmp_path):
    """Alpha and rank come back, here and in PEFT."""
    import peft

    names = [sign, "two", "three"]

    def build():
        dense = [keras.layers.Dense(6, use_bias=False, name=name) for name in names]
        return keras.Sequential([keras.Input((6,)), *dense])

    first, other = build(), build()
    keras_lora.apply_lora(
        first, rank=2, target=keras.layers.Dense, rank_pattern={re.escape(sign): 3}
    )
    first.layers[0].lora.set_alpha(64)
    other.set_weights([to_numpy(layer.frozen_kernel) for layer in first.layers])
    for layer in first.layers:
        layer.lora.b.assign(np.full(layer.lora.b.shape, 0.1))
    keras_lora.save_adapter(first, tmp_path)
    report = keras_lora.load_adapter(other, tmp_path)
    assert [(row.rank, row.alpha) for row in report] == [(3, 64), (2, 2), (2, 2)]
    x = np.random.default_rng(0).standard_normal((4, 6), "float32")
    expected = to_numpy(first(x))
    np.testing.assert_allclose(to_numpy(other(x)), expected, rtol=0, atol=1e-5)
    net = torch.nn.Sequential()
    for layer in first.layers:
        linear = torch.nn.Linear(6, 6, bias=False)
        linear.weight.data = torch.tensor(to_numpy(layer.frozen_kernel).T.copy())
        net.add_module(layer.name, linear)
    net = peft.PeftModel.from_pretrained(net, tmp_path).eval()
    outputs = net(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)


def test_a_name_that_another_ends_with(tmp_path):
    """A key of PEFT means every module that ends with it, unless it is anchored."""
    layers = [keras.layers.Dense(6, name=name) for name in ("up", "up", "down")]
    inner = keras.Sequential([keras.Input((6,)), *layers[1:]], name="inner")

    def build():
        return keras.models.clone_model(keras.Sequential([layers[0], inner]))

    first, other = build(), build()
    for each in (first, other):
        each.build((None, 6))
    keras_lora.apply_lora(first, 2, target=["up", "down"], rank_pattern={"^up": 3})
    keras_lora.save_adapter(first, tmp_path)
    report = keras_lora.load_adapter(other, tmp_path)
    ranks = {row.path: row.rank for row in report}
    assert ranks == {row.path: row.rank for row in keras_lora.summary(first)}
    assert ranks == {"up": 3, "inner/up": 2, "inner/down": 2}


@pytest.mark.parametrize("targets", [["two"], ["on"], "on", "two|three"])
def test_targets_that_mean_nothing(targets, tmp_path):
    write(tmp_path, target_modules=targets)
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), "target_modules has")


def test_a_target_among_others_that_means_nothing_is_named(tmp_path):
    write(tmp_path, target_modules=["one", "tow"])
    with pytest.warns(UserWarning, match="target_modules has 'tow'"):
        keras_lora.load_adapter(model(), tmp_path)


def test_heads_that_the_file_does_not_have(tmp_path):
    write(tmp_path, modules_to_save=["head", "score"])
    match = "modules_to_save in the file has 'head', 'score', but no layer"
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), match)


@pytest.mark.parametrize(
    "metadata",
    [
        {"settings": "[]"},
        {"settings": "7"},
        {"settings": "{"},
        {"settings": "[" * 99999},
        {"slices": "[]"},
        {"slices": "[" * 99999},
        {"slices": '{"one": 3}'},
        {"slices": '{"one": ["4"]}'},
        {"slices": '{"one": [-4, 8]}'},
        {"slices": '{"one": [1e400]}'},
        {"starts": "{}"},
        {"starts": "[[1]]"},
        {"starts": '["elsewhere"]'},
    ],
)
def test_metadata_of_a_wrong_shape(metadata, tmp_path):
    settings = {"r": 4, "lora_alpha": 8}
    metadata = {"settings": json.dumps(settings)} | metadata
    write(tmp_path, metadata=metadata)
    match = "settings|slices|starts? |initial values"
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), match)


@pytest.mark.parametrize(
    "both", [{}, {"old": 3, "new": []}, {"old": None, "new": None, "sha256": {}}]
)
def test_an_interrupted_save_that_was_none(both, tmp_path):
    write(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(both | {"peft_type": "SAVE_INTERRUPTED"}))
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), "must hold a JSON object")


def test_settings_of_any_size(tmp_path):
    write(tmp_path, revision="x" * 2**25)
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), "bytes")


@pytest.mark.parametrize(
    "settings, dtype, values",
    [
        ({"lora_alpha": 1e300}, "float32", FACTORS),
        ({"lora_alpha": 10**400}, "float32", FACTORS),
        ({"lora_alpha": 1e-300}, "float32", FACTORS),
        ({"alpha_pattern": {"one": 1e39}}, "float32", FACTORS),
        ({}, "float32", {k: v.astype("float64") * 1e200 for k, v in FACTORS.items()}),
        (
            {"modules_to_save": ["head"]},
            "float16",
            FACTORS | {k: v * np.float32(1e5) for k, v in HEAD.items()},
        ),
    ],
)
def test_numbers_that_are_infinite_here(settings, dtype, values, tmp_path):
    write(tmp_path, values, **settings)
    load = lambda m: keras_lora.load_adapter(m, tmp_path)  # noqa: E731
    refused(load, "finite", model(dtype))


@pytest.mark.parametrize("rank", [5, 48, 10**9, 10**400])
def test_no_rank_without_its_values(rank, tmp_path):
    """The first of these would be made before its shape is compared."""
    write(tmp_path, r=rank)
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), "rank")
    if rank > 48:
        with pytest.raises(ValueError, match="rank"):
            keras_lora.combine_adapters([tmp_path, tmp_path])


def test_names_of_any_length(tmp_path):
    name = "a" * 2001
    tensors = {key.replace("one", name): value for key, value in FACTORS.items()}
    write(tmp_path, tensors, target_modules=[name])
    match = "has more than 2000 characters"
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), match, model(name=name))


def test_a_tensor_without_axes(tmp_path):
    write(tmp_path, dict.fromkeys(FACTORS, np.ones((), "float32")))
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), "shapes")
    with pytest.raises(ValueError, match="shapes"):
        keras_lora.combine_adapters([tmp_path, tmp_path])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_named(dtype, tmp_path):
    write(tmp_path)
    tensors = {key: torch.tensor(value).to(dtype) for key, value in FACTORS.items()}
    safetensors.torch.save_file(tensors, tmp_path / TENSORS)
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), r"F8_.*tensor\.float\(\)")


def test_bfloat16_and_float16_are_read(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        write(tmp_path)
        tensors = {key: torch.tensor(value).to(dtype) for key, value in FACTORS.items()}
        safetensors.torch.save_file(tensors, tmp_path / TENSORS)
        plain = model()
        keras_lora.load_adapter(plain, tmp_path)
        np.testing.assert_array_equal(to_numpy(adapted_sites(plain)[0].lora.a), A.T)


def test_keys_with_an_adapters_name_are_read(tmp_path):
    import peft

    net = torch.nn.Sequential()
    net.add_module("one", torch.nn.Linear(12, 24))
    net = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["one"]))
    tensors = {k: v for k, v in net.state_dict().items() if "lora_" in k}
    write(tmp_path)
    safetensors.torch.save_file(tensors, tmp_path / TENSORS)
    plain = model()
    keras_lora.load_adapter(plain, tmp_path)
    a = tensors["base_model.model.one.lora_A.default.weight"].numpy()
    np.testing.assert_array_equal(to_numpy(adapted_sites(plain)[0].lora.a), a.T)
    more = {key.replace("default", "second"): x + 0 for key, x in tensors.items()}
    safetensors.torch.save_file(tensors | more, tmp_path / TENSORS)
    refused(lambda m: keras_lora.load_adapter(m, tmp_path), "'second'.*save_pretrained")


LOADERS = {
    TENSORS: lambda m, path: keras_lora.load_adapter(m, path.parent),
    CONFIG: lambda m, path: keras_lora.load_adapter(m, path.parent),
    "x.pt": lambda m, path: keras_lora.load_loralib(m, path, rank=4),
    "x.safetensors": lambda m, path: keras_lora.load_loralib(m, path, rank=4),
    "x.lora.h5": lambda m, path: keras_lora.load_keras_lora(m, path),
}


@posix
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("what", ["pipe", "device", "link to a device", "folder"])
def test_what_is_no_file(what, name, tmp_path):
    path = write(tmp_path) / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    refused(lambda m: LOADERS[name](m, path), "is not a file but")


T = {"one.lora_A": torch.tensor(A), "one.lora_B": torch.tensor(B)}
BAD_DICTS = {
    "number as key": T | {1: T["one.lora_A"]},
    "no axes": T | {"one.lora_A": torch.tensor(1.0)},
    "sparse": T | {"one.lora_A": T["one.lora_A"].to_sparse()},
    "no values": T | {"one.lora_A": torch.zeros(4, 12, device="meta")},
    "whole numbers": T | {"one.lora_A": T["one.lora_A"].int()},
    "complex": T | {"one.lora_A": T["one.lora_A"] * 1j},
    "text": T | {"one.lora_A": "abc"},
    "a list": T | {"one.lora_A": [[1.0], [2.0, 3.0]]},
    "expanded": T | {"one.lora_A": torch.zeros(1).expand(2**40)},
    "shared": T | {f"x{n}": torch.zeros(9, 9).expand(99, 9, 9) for n in range(99)},
    "no dict": list(T.values()),
    "another layer": {k.replace("one", "elsewhere"): v for k, v in T.items()},
}


@pytest.mark.parametrize("name", BAD_DICTS)
def test_bad_state_dicts(name, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(BAD_DICTS[name], path)
    refused(lambda m: keras_lora.load_loralib(m, path, rank=4))
    if name not in ("expanded", "shared"):
        refused(lambda m: keras_lora.load_loralib(m, BAD_DICTS[name], rank=4))


class Command:
    def __reduce__(self):
        return os.system, ("true",)


class Zeros:
    def __reduce__(self):
        return bytearray, (2**45,)


@pytest.mark.parametrize("thing", [Command(), Zeros(), {"one.lora_A": Command()}])
def test_pickles_that_do_things(thing, tmp_path):
    torch.save(thing, tmp_path / "x.pt")
    refused(lambda m: keras_lora.load_loralib(m, tmp_path / "x.pt", rank=4))


def test_a_packed_state_dict(tmp_path):
    """Zeros pack a thousand to one."""
    torch.save({k: torch.zeros(v.shape) for k, v in T.items()}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as plain,
        zipfile.ZipFile(
            tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED, True, 9
        ) as packed,
    ):
        for part in plain.namelist():
            packed.writestr(part, plain.read(part))
        packed.writestr("archive/data/9", bytes(10**6))
    refused(
        lambda m: keras_lora.load_loralib(m, tmp_path / "y.pt", rank=4), "compressed"
    )


def put(file, a, b=B.T):
    group = file.create_group("lora/0/vars")
    if a is not None:
        group["lora_kernel_a"] = a
    group["lora_kernel_b"] = b
    return group


def external_storage(file, secret):
    put(file, None).create_dataset(
        "lora_kernel_a", (12, 4), "float32", external=[(f"{secret}.bin", 0, 192)]
    )


def external_link(file, secret):
    put(file, h5py.ExternalLink(f"{secret}.h5", "/a"))


def external_group(file, secret):
    file["lora"] = h5py.ExternalLink(f"{secret}.h5", "/lora")


def link_through_a_link(file, secret):
    file["out"] = h5py.ExternalLink(f"{secret}.h5", "/")
    put(file, h5py.SoftLink("/out/a"))


def virtual(file, secret):
    layout = h5py.VirtualLayout((12, 4), "float32")
    layout[...] = h5py.VirtualSource(f"{secret}.h5", "a", (12, 4))
    put(file, None).create_virtual_dataset("lora_kernel_a", layout)


def enormous(file, secret):
    put(file, None).create_dataset("lora_kernel_a", (2**20, 2**20), "float32")


def packed(file, secret):
    put(file, None).create_dataset(
        "lora_kernel_a", data=np.zeros((12, 4), "float32"), compression="gzip"
    )


HDF5 = [
    external_storage,
    external_link,
    external_group,
    link_through_a_link,
    virtual,
    enormous,
    packed,
    lambda file, secret: file.create_dataset("lora", data=A),
    lambda file, secret: file.create_dataset("lora/0", data=A),
    lambda file, secret: file.create_dataset("lora/0/vars", data=A),
    lambda file, secret: put(file, "abc"),
    lambda file, secret: put(file, 1.0),
    lambda file, secret: put(file, h5py.Empty("float32")),
    lambda file, secret: put(file, h5py.SoftLink("/nowhere")),
    lambda file, secret: put(file, np.zeros((12, 4), [("x", "float32")])),
    lambda file, secret: put(file, np.zeros((12, 4), "int32")),
    lambda file, secret: put(file, A.T * np.nan),
    lambda file, secret: put(file, A.T, B),
    lambda file, secret: file.create_group("lora/²/vars"),
]


@pytest.mark.parametrize("fill", HDF5)
def test_hdf5_that_points_elsewhere_or_holds_other_things(fill, tmp_path):
    secret = tmp_path / "secret"
    (tmp_path / "secret.bin").write_bytes(A.tobytes())
    with h5py.File(f"{secret}.h5", "w") as file:
        put(file, A.T)
        file["a"] = A.T
    with h5py.File(tmp_path / "x.lora.h5", "w") as file:
        fill(file, secret)
    keras_lora.load_keras_lora(model(), f"{secret}.h5")  # the same, plainly
    refused(lambda m: keras_lora.load_keras_lora(m, tmp_path / "x.lora.h5"))


WORDS = [
    (enormous, "are outside the file"),
    (
        lambda file, secret: file.create_dataset("lora", data=A),
        "must be a Group in the file itself",
    ),
    (lambda file, secret: file.create_group("lora/²/vars"), "has a layer '²'"),
    (lambda file, secret: put(file, A.T, B), "do not fit its kernel"),
]


@pytest.mark.parametrize("fill, words", WORDS)
def test_hdf5_is_refused_with_the_reason(fill, words, tmp_path):
    with h5py.File(tmp_path / "x.lora.h5", "w") as file:
        fill(file, None)
    refused(lambda m: keras_lora.load_keras_lora(m, tmp_path / "x.lora.h5"), words)


def test_hdf5_with_other_bytes(tmp_path):
    """Of a damaged file h5py has errors of many kinds."""
    path, plain = tmp_path / "x.lora.h5", model()
    with h5py.File(path, "w") as file:
        put(file, A.T)
    whole, before = path.read_bytes(), [to_numpy(weight) for weight in plain.weights]
    for place in range(0, len(whole) - len(A.tobytes()) - len(B.tobytes()), 61):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError, OSError):
            keras_lora.load_keras_lora(plain, path)
            keras_lora.remove_lora(plain)
    for old, new in zip(before, plain.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))


def test_a_state_dict_that_is_none_is_said(tmp_path):
    torch.save(list(T.values()), tmp_path / "x.pt")
    load = LOADERS["x.pt"]
    refused(
        lambda m: load(m, tmp_path / "x.pt"), "holds no usable state dict: it is a list"
    )
    with pytest.raises(ValueError, match=r"`source` must be a \.lora\.h5 file"):
        keras_lora.load_keras_lora(model(), math)


@pytest.mark.parametrize(
    "name, module, words",
    [
        ("x.pt", "torch", "written by torch, which is not installed"),
        ("x.lora.h5", "h5py", "install h5py to read it"),
    ],
)
def test_a_package_that_is_missing_is_named(name, module, words, tmp_path, monkeypatch):
    if module == keras.backend.backend():
        pytest.skip("this backend is that package")
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    refused(lambda m: LOADERS[name](m, tmp_path / name), words)


@pytest.mark.parametrize("thing", [None, "model.keras", [1], torch.nn.Linear(2, 2), {}])
def test_what_is_no_model_is_said(thing, tmp_path):
    write(tmp_path)
    calls = [
        lambda: keras_lora.save_adapter(thing, tmp_path / "new"),
        lambda: keras_lora.load_adapter(thing, tmp_path),
        lambda: keras_lora.load_loralib(thing, T, rank=4),
        lambda: keras_lora.load_keras_lora(thing, tmp_path / "x.lora.h5"),
        lambda: keras_lora.load_keras_lora(model(), math),
        lambda: keras_lora.load_loralib(model(), math, rank=4),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"`(model|source|state_dict)` must be"):
            call()
    assert not (tmp_path / "new").exists()
