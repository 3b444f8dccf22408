"""python -m keras_lora, by what it prints and by the files it leaves."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from pretrained import sequential
from seeds import set_seed
from shared import adapted, predict, same_base

import keras_lora
from keras_lora.files.command import main


def write(folder, seed, rank=2, alpha=3.0, shapes=None, **config):
    """An adapter in a folder; its updates, formed in float64."""
    random = np.random.default_rng(seed)
    tensors, updates = {}, {}
    for module, (out, inputs) in (shapes or {"h.0": (5, 6), "h.1": (4, 5)}).items():
        a = random.standard_normal((rank, inputs)).astype("float32")
        b = random.standard_normal((out, rank)).astype("float32")
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        updates[module] = alpha / rank * (b.astype("float64") @ a)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha} | config
    config["target_modules"] = sorted(updates)
    keras_lora.Adapter(tensors, config).save(folder)
    return updates


def updates_of(folder):
    adapter = keras_lora.Adapter.read(folder)
    scaling = adapter.config["lora_alpha"] / adapter.config["r"]
    a, b = (
        {
            key.removesuffix(f".lora_{x}.weight"): value.astype("float64")
            for key, value in adapter.tensors.items()
            if f".lora_{x}." in key
        }
        for x in "AB"
    )
    return {module: scaling * b[module] @ a[module] for module in a}


def rows_of(output):
    """First cell -> the others, of all tables in what was printed."""
    lines = [line for line in output.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    rows = {}
    for first, *others in cells:
        rows.setdefault(first, []).append(others)
    return rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    """Status, standard output and standard error."""
    try:
        status = main(list(map(str, arguments)))
    except SystemExit as end:
        status = end.code
    return (status, *capsys.readouterr())


def test_show(here, capsys):
    updates = write("one", 1, lora_dropout=0.1)
    status, output, errors = run(capsys, "show", "one")
    assert (status, errors) == (0, "")
    rows = rows_of(output)
    assert rows["lora_dropout"] == [["0.1"]] and rows["r"] == [["2"]]
    of_factors, spectrum = rows["h.0"]
    assert of_factors == ["(2, 6) (5, 2)", "2", "3", "22", "88 bytes"]
    values = np.linalg.svd(updates["h.0"])[1]
    shares = np.cumsum(values**2) / np.sum(values**2)
    assert spectrum == [
        "2",
        f"{np.linalg.norm(updates['h.0']):.4g}",
        "",
        f"{values[0]:.4g}",
        *(str(1 + int(np.argmax(shares >= energy))) for energy in (0.9, 0.99)),
    ]
    assert "2 modules, rank 2, alpha 3, 40 parameters, 160 bytes" in output


def test_show_says_why_there_is_no_spectrum(here, capsys):
    model = keras.Sequential(
        [
            keras.Input((3, 6)),
            keras_lora.LoRAEinsumDense("abc,bcd->abd", (3, 5), rank=2, name="stack"),
        ]
    )
    keras_lora.save_adapter(model, "one")
    status, output, _ = run(capsys, "show", "one")
    assert status == 0
    assert "No spectrum: The factors of 'stack'" in output


def test_diff(here, capsys):
    one = write("one", 1)
    two = write("two", 2, rank=3, alpha=5.0, task_type="CAUSAL_LM")
    status, output, _ = run(capsys, "diff", "one", "two")
    assert status == 1
    rows = rows_of(output)
    assert rows["r"] == [["2", "3"]] and rows["task_type"] == [["", "CAUSAL_LM"]]
    assert "peft_type" not in rows
    for module in one:
        norms = [np.linalg.norm(x[module]) for x in (one, two)]
        apart = np.linalg.norm(one[module] - two[module]) / max(norms)
        assert rows[module] == [["2 and 3", f"{apart:.3g}"]]


def test_diff_names_what_is_in_one_and_what_is_equal(here, capsys):
    write("one", 1)
    write("two", 1, shapes={"h.0": (5, 6), "other": (4, 5)})
    status, output, _ = run(capsys, "diff", "one", "two")
    rows = rows_of(output)
    assert status == 1 and "h.0" not in rows
    assert rows["h.1"] == [["2 and -", "only in the first"]]
    assert rows["other"] == [["- and 2", "only in the second"]]
    write("three", 1, shapes={"h.0": (5, 7), "h.1": (4, 5)})
    assert "different shapes" in run(capsys, "diff", "one", "three")[1]
    assert run(capsys, "diff", "one", "one")[:2] == (0, "The two adapters are equal.\n")


def test_diff_of_heads_and_of_doras_lengths(here, capsys):
    for name, shift in (("one", 0), ("two", 1)):
        set_seed(3)
        model = sequential()
        keras_lora.apply_lora(model, rank=2, use_dora=True, also_train=["head"])
        model.get_layer("head").bias.assign([1, 2, 2 + shift])
        magnitude = model.get_layer("first").lora.magnitude
        magnitude.assign(magnitude * (1 + shift))
        keras_lora.save_adapter(model, name)
    status, output, _ = run(capsys, "diff", "one", "two")
    rows = rows_of(output)
    assert status == 1 and rows.keys() == {
        "head.bias",
        "first.lora_magnitude_vector",
    }
    assert rows["head.bias"] == [["", f"{1 / np.linalg.norm([1, 2, 3]):.3g}"]]
    assert rows["first.lora_magnitude_vector"] == [["", "0.5"]]


def test_combine(here, capsys):
    one, two = write("one", 1), write("two", 2, rank=3)
    command = ["combine", "one", "two", "--weights", "0.5", "-2", "-o", "sum"]
    status, output, errors = run(capsys, *command)
    assert (status, errors) == (0, "")
    assert rows_of(output)["h.0"][0][1] == "5"
    for module, update in updates_of("sum").items():
        expected = 0.5 * one[module] - 2 * two[module]
        np.testing.assert_allclose(update, expected, rtol=0, atol=1e-5)
    for cut, rank in ((["--rank", "1"], 1), (["--energy", "1"], None)):
        status, output, _ = run(capsys, "combine", "one", "two", "-o", "cut", *cut)
        assert status == 0
        for module in one:
            total = one[module] + two[module]
            values = np.linalg.svd(total)[1]
            kept = rank or len(values)
            error = np.linalg.norm(values[kept:]) / np.linalg.norm(values)
            (row,) = rows_of(output)[module]
            assert row[1] == str(kept)
            if rank:
                assert row[5] == f"{error:.2g}"


def test_combine_does_not_write_over_what_it_reads(here, capsys):
    write("one", 1), write("two", 2)
    before = Path("one/adapter_model.safetensors").read_bytes()
    os.symlink("one", "link")
    for output in ("one", "./two/../one", "link"):
        status, _, errors = run(capsys, "combine", "one", "two", "-o", output)
        assert status == 1 and "OUT is one, one of the adapters" in errors
    assert Path("one/adapter_model.safetensors").read_bytes() == before


def test_combine_takes_one_of_the_heads(here, capsys):
    values = {}
    for seed, folder in enumerate(("one", "two")):
        write(folder, seed)
        adapter = keras_lora.Adapter.read(folder)
        values[folder] = np.full(3, seed, "float32")
        adapter.tensors["head.bias"] = values[folder]
        adapter.save(folder)
    command = ["combine", "one", "two", "-o", "sum"]
    status, _, errors = run(capsys, *command)
    assert status == 1 and "'head.bias' in full" in errors
    for heads, value in (("two", 1), ("average", 0.5)):
        assert run(capsys, *command, "--heads", heads)[0] == 0
        found = keras_lora.Adapter.read("sum").tensors["head.bias"]
        np.testing.assert_array_equal(found, [value] * 3)


@pytest.mark.parametrize("output", ["merged.keras", "base.keras"])
def test_merge(output, here, capsys):
    model = adapted(sequential, also_train=["head"])
    expected = predict(model)
    keras_lora.save_adapter(model, "one")
    same_base(model, sequential).save("base.keras")
    command = ["merge", "one", "base.keras", "-o", output]
    status, printed, errors = run(capsys, *command)
    assert (status, errors) == (0, "")
    assert printed == f"Merged 2 layers into {output}.\n"
    merged = keras.saving.load_model(output)
    assert "LoRA" not in str([type(layer).__name__ for layer in merged.layers])
    np.testing.assert_allclose(predict(merged), expected, rtol=0, atol=1e-6)
    assert {path.name for path in here.iterdir()} == {"one", "base.keras", output}


def test_merge_takes_names_and_imports(here, capsys, monkeypatch):
    (here / "my_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable(package='own')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, inputs):\n"
        "        return 2 * inputs\n"
    )
    monkeypatch.syspath_prepend(here)
    import my_layers

    layers = [keras.layers.Dense(8, name="first"), my_layers.Twice()]
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3)])
    model.save("base.keras")
    write("one", 1, shapes={"first": (8, 6)})
    command = ["merge", "one", "base.keras", "-o", "merged.keras"]
    for name in [n for n in keras.saving.get_custom_objects() if "Twice" in n]:
        monkeypatch.delitem(keras.saving.get_custom_objects(), name)
    monkeypatch.delitem(sys.modules, "my_layers")
    status, _, errors = run(capsys, *command)
    assert status == 1 and errors.startswith("error: base.keras cannot be loaded: ")
    assert errors.count("\n") == 1 and not (here / "merged.keras").exists()
    assert run(capsys, *command, "--import", "my_layers")[0] == 0
    status, _, errors = run(capsys, *command, "--names", "bertt")
    assert status == 1 and "`names` 'bertt' does not fit" in errors


def test_check(here, capsys):
    write("good", 1)
    write("odd", 1, another_setting=3)
    write("damaged", 1)
    tensors = here / "damaged" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    write("torn", 1)
    config = here / "torn" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 3}))
    status, output, errors = run(capsys, "check", "good", "odd")
    assert (status, errors) == (0, "")
    good, odd, note = output.splitlines()
    assert good == "good: good: 2 modules, rank 2, alpha 3, 40 parameters, 160 bytes"
    assert odd.startswith("odd: good: ")
    assert note == "odd: note: adapter_config.json: ignored another_setting."
    folders = ["damaged", "good", "torn", "nowhere"]
    status, output, errors = run(capsys, "check", *folders)
    assert (status, errors) == (1, "")
    lines = output.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["damaged", "wrong"],
        ["good", "good"],
        ["torn", "wrong"],
        ["nowhere", "wrong"],
    ]
    assert "its checksum does not match" in lines[0]
    write("large", 1, rank=32)
    status, output, _ = run(capsys, "check", "large", "good", "--engine", "vllm")
    assert status == 1
    assert [line.split(": ")[:2] for line in output.splitlines()] == [
        ["large", "good"],
        ["large", "vllm"],
        ["good", "good"],
    ]
    assert "max_lora_rank" in output
    limit = ["--engine", "vllm", "--max-lora-rank", "32"]
    assert run(capsys, "check", "large", *limit)[0] == 0
    assert "do not belong together: r is 3 and 2" in lines[2]


@pytest.mark.parametrize(
    "command, message",
    [
        ("show nowhere", "The folder nowhere does not exist"),
        ("diff one nowhere", "nowhere does not exist"),
        ("combine one -o out --rank 0", "whole number >= 1"),
        ("combine one -o out --energy 2", "`energy` must be a number in"),
        ("combine one -o out --energy 0.5 --rank 2", "not allowed with argument"),
        ("combine one -o out --weights 1 2", "`weights` must be one finite number"),
        ("combine one", "required: -o/--output"),
        ("merge one nowhere.keras -o out.keras", "nowhere.keras cannot be loaded: "),
        ("merge one base.keras -o out", "must end with .keras. Received: 'out'"),
        ("merge one base.keras -o out.keras --import no_such", "No module named"),
        ("show", "required: FOLDER"),
        ("shwo one", "invalid choice: 'shwo'"),
        ("", "required: COMMAND"),
    ],
)
def test_an_error_is_one_sentence_and_status_1(command, message, here, capsys):
    write("one", 1)
    status, output, errors = run(capsys, *command.split())
    assert (status, output) == (1, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors
    assert [path.name for path in here.iterdir()] == ["one"]


def test_a_warning_is_one_line(here, capsys):
    write("one", 1, another_setting=3)
    _, _, errors = run(capsys, "show", "one")
    assert errors == "warning: adapter_config.json: ignored another_setting.\n"


def test_what_a_file_says_does_nothing_to_the_terminal(here, capsys):
    write("one", 1, task_type="\x1b[2J[bold]", shapes={"a\x1b[31m[red]": (5, 6)})
    _, output, _ = run(capsys, "show", "one")
    assert "\x1b" not in output
    assert r"\x1b[2J[bold]" in output and r"a\x1b[31m[red]" in output


@pytest.mark.parametrize(
    "command, words",
    [
        ([], ["show", "diff", "combine", "merge", "check", "Exit status"]),
        (["show"], ["FOLDER", "singular values"]),
        (["diff"], ["FOLDER FOLDER", "Frobenius"]),
        (["combine"], ["--weights", "--rank", "--energy", "--output"]),
        (["merge"], ["MODEL.keras", "--names", "--quantized", "--import", "--output"]),
        (["check"], ["FOLDER", "reports errors"]),
    ],
)
def test_help_says_all(command, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, output, errors = run(capsys, *command, "--help")
    assert (status, errors) == (0, "")
    assert all(word in output for word in words)


def test_as_a_module(here, capsys, monkeypatch):
    write("one", 1)
    monkeypatch.delitem(sys.modules, "keras_lora.__main__", raising=False)
    for folder, status in (("one", 0), ("nowhere", 1)):
        monkeypatch.setattr(sys, "argv", ["keras_lora", "check", folder])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("keras_lora", run_name="__main__")
        assert end.value.code == status
        assert capsys.readouterr().out.startswith(f"{folder}: ")


@pytest.mark.parametrize("command", ["--help", "show", "diff", "check", "combine"])
def test_files_are_read_without_keras(tmp_path, command):
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        write(folder, seed)
    arguments = [command] if command == "--help" else [command, *folders]
    arguments += ["-o", str(tmp_path / "sum")] if command == "combine" else []
    names = "sorted({name.partition('.')[0] for name in sys.modules})"
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(*{names}, file=sys.stderr))\n"
    )
    (tmp_path / "sitecustomize.py").write_text(code)
    paths = [str(tmp_path), str(Path(keras_lora.__file__).parents[1])]
    process = subprocess.run(
        [sys.executable, "-m", "keras_lora", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert process.stdout
    [loaded] = process.stderr.splitlines()  # and no line of a log
    assert "keras_lora" in loaded.split()
    assert not {"keras", "tensorflow", "jax", "torch"} & set(loaded.split())


@pytest.mark.slow
def test_a_module_of_the_user_finds_the_layers(tmp_path):
    """`--import` names modules that make their classes from the public ones."""
    code = "import keras_lora\n\nclass Own(keras_lora.LoRADense):\n    pass\n"
    (tmp_path / "own_classes.py").write_text(code)
    inputs = keras.Input((6,))
    outputs = keras_lora.LoRADense(4, rank=0, name="h.0")(inputs)
    model = keras.Model(inputs, outputs)
    model.save(tmp_path / "base.keras")
    write(tmp_path / "one", 0, shapes={"h.0": (4, 6)})
    paths = [str(tmp_path), str(Path(keras_lora.__file__).parents[1])]
    process = subprocess.run(
        [
            *(sys.executable, "-m", "keras_lora", "merge", tmp_path / "one"),
            *(tmp_path / "base.keras", "-o", tmp_path / "merged.keras"),
            *("--import", "own_classes"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "merged.keras").exists()
