"""Where files go: folders as people have them, and writers that were stopped."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys

import keras
import numpy as np
import pytest
import safetensors.numpy
import torch

import keras_lora
from keras_lora.files.config import CONFIG
from keras_lora.files.disk import TENSORS
from keras_lora.models import atomic
from keras_lora.models.atomic import replacing

posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX")


def adapter(alpha=2.0, rank=2, **settings):
    value = np.full((rank, 6), alpha, "float32")
    tensors = {"h.lora_A.weight": value, "h.lora_B.weight": value.T.copy()}
    config = {"peft_type": "LORA", "target_modules": ["h"]} | settings
    return keras_lora.Adapter(tensors, config | {"r": rank, "lora_alpha": alpha})


def is_whole(found, *candidates):
    return any(
        found.config == candidate.config
        and found.tensors.keys() == candidate.tensors.keys()
        and all(
            np.array_equal(v, found.tensors[k]) for k, v in candidate.tensors.items()
        )
        for candidate in candidates
    )


def plain_mode(folder):
    (folder / "plain").write_text("")
    return stat.S_IMODE((folder / "plain").stat().st_mode)


def test_the_folder_itself_stays(tmp_path, monkeypatch):
    """So it may be a mount point, or what a process stands in."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "latest").symlink_to(folder)
    identity = folder.stat().st_ino
    monkeypatch.chdir(folder)
    for place in (".", folder, tmp_path / "latest", "../run"):
        for alpha in (2, 3):
            adapter(alpha).save(place)
            assert keras_lora.Adapter.read(place).config["lora_alpha"] == alpha
    assert folder.stat().st_ino == identity
    assert os.path.samefile(".", folder)
    assert (tmp_path / "latest").is_symlink()
    assert set(os.listdir(tmp_path)) == {"run", "latest"}
    assert set(os.listdir()) == {CONFIG, TENSORS}


@posix
def test_only_the_folder_need_be_writable(tmp_path, monkeypatch):
    """Its parent may be read-only: nothing is made there."""
    (tmp_path / "run").mkdir()
    made, mkdir = [], os.mkdir
    monkeypatch.setattr("os.mkdir", lambda p, *a: (mkdir(p, *a), made.append(str(p))))
    adapter().save(tmp_path / "run")
    assert made
    assert all(path.startswith(str(tmp_path / "run") + "/") for path in made)


def test_a_link_to_nowhere_gets_its_folder(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    adapter().save(tmp_path / "latest")
    assert set(os.listdir(tmp_path / "run")) == {CONFIG, TENSORS}


def test_what_others_write_meanwhile_stays(tmp_path, monkeypatch):
    folder, save, replace = tmp_path / "run", safetensors.numpy.save, os.replace
    adapter(2).save(folder)

    def note(text):
        with open(folder / f"events.{len(os.listdir(folder))}", "w") as file:
            file.write(text)

    monkeypatch.setattr(safetensors.numpy, "save", lambda *x: (note("a"), save(*x))[1])
    monkeypatch.setattr("os.replace", lambda *x: (note("b"), replace(*x)))
    adapter(3).save(folder)
    events = [path for path in folder.iterdir() if path.name.startswith("events")]
    assert sorted(path.read_text() for path in events) == ["a", "b", "b", "b"]
    assert set(os.listdir(folder)) == {CONFIG, TENSORS, *(p.name for p in events)}


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_plain_writing(umask, tmp_path):
    before = os.umask(umask)
    try:
        adapter().save(tmp_path)
        expected = plain_mode(tmp_path)
    finally:
        os.umask(before)
    for name in (CONFIG, TENSORS):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected


@posix
@pytest.mark.parametrize("room", [0, 100, 300])
def test_a_full_disk_is_an_os_error(room, tmp_path):
    adapter(2).save(tmp_path / "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        for name in ("old", "new"):
            with pytest.raises(OSError):
                adapter(3).save(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_whole(keras_lora.Adapter.read(tmp_path / "old"), adapter(2))
    assert set(os.listdir(tmp_path)) == {"old"}
    assert set(os.listdir(tmp_path / "old")) == {CONFIG, TENSORS}


def test_failure_at_the_last_moment_gives_the_old_files_back(tmp_path, monkeypatch):
    adapter(2).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = os.replace

    def fail(source, target):
        if os.path.basename(target) == TENSORS:
            raise OSError("the file is in use")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="in use"):
        adapter(3).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_name_means_bytes_that_are_not_on_the_disk(tmp_path, monkeypatch):
    """Where the machine stops, not the process alone."""
    fsync, replace, on_disk, renamed = os.fsync, os.replace, set(), []

    def note(descriptor):
        fsync(descriptor)
        on_disk.add(os.fstat(descriptor).st_ino)

    def rename(source, target):
        renamed.append(os.stat(source).st_ino)
        replace(source, target)

    monkeypatch.setattr("os.fsync", note)
    monkeypatch.setattr("os.replace", rename)
    adapter(2).save(tmp_path)
    adapter(3).save(tmp_path)
    assert len(renamed) == 5
    assert on_disk.issuperset(renamed)


def test_failure_in_a_new_folder_leaves_what_others_wrote_there(tmp_path, monkeypatch):
    def fail(source, target):
        (tmp_path / "run/events").write_text("a")
        raise OSError("the file is in use")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="in use"):
        adapter().save(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["events"]


def peft_reads(folder):
    """What PEFT itself makes of a folder: the update, or an error."""
    import peft

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.h = torch.nn.Linear(6, 6)

        def forward(self, x):
            return self.h(x)

    try:
        return peft.PeftModel.from_pretrained(Net(), folder).base_model.model.h
    except Exception:
        return None


def interrupted(new, folder, at, monkeypatch):
    """Saves until a rename, where all ends; what was temporary stays."""
    replace, count = os.replace, iter(range(10))

    def stop(source, target):
        if next(count) == at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            new.save(folder)


@pytest.mark.parametrize("writer", ["keras_lora", "peft"])
def test_stopped_between_the_files(writer, tmp_path, monkeypatch):
    """Whatever the moment, the old or the new adapter is read, by PEFT too."""
    first = tmp_path / "first"
    adapter(2).save(first)
    if writer == "peft":  # its tensors say nothing of the settings
        values = safetensors.numpy.load_file(first / TENSORS)
        safetensors.numpy.save_file(values, first / TENSORS, {"format": "pt"})
    for stops in [(0,), (1,), (2,), (1, 1), (2, 1), (1, 2), (2, 2), (2, 2, 0)]:
        folder = shutil.copytree(first, tmp_path / "-".join(map(str, stops)))
        for turn, stop in enumerate(stops):
            new = adapter(3 + turn, lora_dropout=0.5)
            earlier = [
                adapter(2),
                *(adapter(3 + n, lora_dropout=0.5) for n in range(turn)),
            ]
            interrupted(new, folder, stop, monkeypatch)
            found = keras_lora.Adapter.read(folder)
            assert is_whole(found, *earlier, new)
            layer = peft_reads(folder)
            if layer is not None:
                alpha = layer.scaling["default"] * 2
                assert (layer.lora_A["default"].weight == alpha).all()
        last = adapter(9, lora_dropout=0.25)
        last.save(folder)
        assert is_whole(keras_lora.Adapter.read(folder), last)
        assert json.loads((folder / CONFIG).read_text()) == last.config
        assert peft_reads(folder) is not None


def test_same_settings_need_one_rename(tmp_path, monkeypatch):
    """A checkpoint in every epoch: PEFT can read at any moment."""
    adapter(2).save(tmp_path)
    new = adapter(2)
    new.tensors["h.lora_A.weight"] += 1
    interrupted(new, tmp_path, 1, monkeypatch)
    assert is_whole(keras_lora.Adapter.read(tmp_path), new)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LORA"


def test_read_while_another_process_writes(tmp_path, monkeypatch):
    """The settings are read, then both files change, then the tensors are read."""
    adapter(2).save(tmp_path)
    open_, changes = safetensors.safe_open, iter([3, 4])

    def late(*args, **kwargs):
        for alpha in changes:
            adapter(alpha).save(tmp_path)
        return open_(*args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", late)
    assert is_whole(keras_lora.Adapter.read(tmp_path), adapter(4))


KILLED = """
import os, runpy, sys
atomic = runpy.run_path(sys.argv[1])
with atomic["temporary_folder"](sys.argv[2]) as folder:
    (folder / "tensors").write_text("x" * 1000)
    {then}
    os.kill(os.getpid(), 9)
"""


def kill_a_writer(folder, then="pass"):
    program = KILLED.format(then=then)
    command = [sys.executable, "-c", program, atomic.__file__, str(folder)]
    assert subprocess.run(command).returncode == -9


@posix
def test_what_a_killed_writer_leaves_is_cleared(tmp_path):
    adapter(2).save(tmp_path)
    kill_a_writer(tmp_path)
    (tmp_path / ".keras_lora-notes").mkdir()  # not one of these
    assert len(os.listdir(tmp_path)) == 4
    with atomic.temporary_folder(tmp_path) as alive:
        adapter(3).save(tmp_path)
        assert alive.exists()  # this process runs
    assert set(os.listdir(tmp_path)) == {CONFIG, TENSORS, ".keras_lora-notes"}


@posix
def test_a_process_with_the_number_of_a_killed_one(tmp_path):
    """In a container every run of a program may have the number 1."""
    kill_a_writer(tmp_path)
    (name,) = os.listdir(tmp_path)
    number, rest = name.removeprefix(".keras_lora-").split("-", 1)
    os.rename(tmp_path / name, tmp_path / f".keras_lora-{os.getpid()}-{rest}")
    assert os.getpid() != int(number)
    atomic.clear_left_over(tmp_path)
    assert os.listdir(tmp_path) == []


@posix
@pytest.mark.parametrize("whose", ["another machine", "another user"])
def test_writers_that_may_be_alive_keep_what_is_theirs(whose, tmp_path, monkeypatch):
    kill_a_writer(tmp_path)
    (name,) = os.listdir(tmp_path)
    if whose == "another machine":  # on a disk that both have
        os.rename(tmp_path / name, tmp_path / f"{name}_2")
    else:

        def refuse(process, signal):
            raise PermissionError

        monkeypatch.setattr("os.kill", refuse)
    before = os.listdir(tmp_path)
    adapter().save(tmp_path)
    assert set(os.listdir(tmp_path)) == {CONFIG, TENSORS, *before}


def test_on_windows_nothing_is_asked_that_ends_a_process(monkeypatch):
    """`os.kill` does, whatever the signal, and `ctypes.CDLL` takes no None there."""
    with monkeypatch.context() as patch:
        patch.setattr("os.kill", None)
        patch.setattr("os.name", "nt")
        assert atomic.is_running(os.getpid() + 1, "token")
        assert atomic.is_running(os.getpid(), atomic.TOKEN)
        assert not atomic.is_running(os.getpid(), "token")


def test_on_windows_folders_are_exchanged_by_renames(tmp_path, monkeypatch):
    def load(name):
        raise TypeError("argument of type 'NoneType' is not iterable")

    for text in ("old", "new"):
        (tmp_path / text).mkdir()
        (tmp_path / text / "file").write_text(text)
    aside = tmp_path / "aside/old"
    with monkeypatch.context() as patch:
        patch.setattr("ctypes.CDLL", load)
        patch.setattr("os.name", "nt")
        atomic.exchange(tmp_path / "new", tmp_path / "old", aside)
    assert (tmp_path / "old/file").read_text() == "new"
    assert (aside / "file").read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_on_linux_folders_are_exchanged_in_one_step(tmp_path, monkeypatch):
    (tmp_path / "artifact").mkdir()
    monkeypatch.setattr("os.rename", None)
    with replacing(tmp_path / "artifact") as first:
        first.mkdir()
        (first / "file").write_text("first")
    with replacing(tmp_path / "artifact") as second:
        second.mkdir()
        (second / "file").write_text("second")
    assert tree(tmp_path) == {"artifact/file": "second"}


@posix
def test_killed_between_two_renames_nothing_newer_is_replaced(tmp_path):
    kill_a_writer(tmp_path, then="os.makedirs(folder / 'old/artifact')")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact/saved_model.pb").write_text("new")
    atomic.clear_left_over(tmp_path)
    assert tree(tmp_path) == {"artifact/saved_model.pb": "new"}
    assert os.listdir(tmp_path) == ["artifact"]


@posix
def test_killed_between_two_renames_the_old_folder_comes_back(tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact/saved_model.pb").write_text("old")
    put_aside = (
        "(folder / 'old').mkdir(); os.rename('artifact', folder / 'old/artifact')"
    )
    kill_a_writer(tmp_path, then=f"os.chdir(sys.argv[2]); {put_aside}")
    assert not (tmp_path / "artifact").exists()
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "artifact"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["artifact"]
    assert (tmp_path / "artifact/saved_model.pb").read_text() == "old"


@pytest.fixture
def model(monkeypatch):
    """A model whose export writes two files of a SavedModel, or one other file."""

    def write(self, path, format, **kwargs):
        if format == "tf_saved_model":
            os.makedirs(os.path.join(path, "variables"))
            for name in ("saved_model.pb", "variables/variables.index"):
                with open(os.path.join(path, name), "w") as file:
                    file.write("new")
            return
        for ending in ("", ".data"):  # some formats put their weights beside
            with open(str(path) + ending, "w") as file:
                file.write("new")

    monkeypatch.setattr(keras.Model, "export", write)
    # The artifact is text.
    for check in ("refuse_broken_artifact", "refuse_format_of_other_backends"):
        monkeypatch.setattr(f"keras_lora.models.export.{check}", lambda *given: None)
    return keras.Sequential([keras.Input((4,)), keras_lora.LoRADense(3, rank=2)])


def tree(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


NEW = {"saved_model.pb": "new", "variables/variables.index": "new"}


@pytest.mark.parametrize("format", ["tf_saved_model", "onnx"])
@pytest.mark.parametrize("beside", [[], ["saved_model.pb"]])
@pytest.mark.parametrize("place", ["folder", ".", "link"])
def test_export_deletes_nothing_of_others(
    format, beside, place, model, tmp_path, monkeypatch
):
    folder = tmp_path / "results"
    (folder / "notes").mkdir(parents=True)
    for name in ["notes/thesis.txt", *beside]:
        (folder / name).write_text("years of work")
    (tmp_path / "link").symlink_to(folder)
    before = tree(tmp_path)
    if place == ".":
        monkeypatch.chdir(folder)
    path = {"folder": folder, ".": ".", "link": tmp_path / "link"}[place]
    with pytest.raises(FileExistsError, match="is a folder"):
        keras_lora.export(model, path, format=format)
    assert tree(tmp_path) == before


def test_a_folder_is_no_artifact_for_the_names_in_it(model, tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/logo.svg").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="holds assets"):
        keras_lora.export(model, tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("holds", [[], ["saved_model.pb"]])
def test_a_format_of_one_file_does_not_go_into_a_folder(holds, model, tmp_path):
    for name in holds:
        (tmp_path / name).write_text("old")
    with pytest.raises(FileExistsError, match="writes a file"):
        keras_lora.export(model, tmp_path, format="onnx")
    assert os.listdir(tmp_path) == holds


@pytest.mark.parametrize(
    "name, format, last",
    [("", "tf_saved_model", "saved_model.pb"), ("a.onnx", "onnx", "a.onnx")],
)
def test_what_makes_an_artifact_readable_comes_last(
    name, format, last, model, tmp_path, monkeypatch
):
    replace, moved = os.replace, []
    monkeypatch.setattr("os.replace", lambda *x: (moved.append(x[1].name), replace(*x)))
    keras_lora.export(model, tmp_path / name, format=format)
    assert len(moved) == 2
    assert moved[-1] == last


@posix
def test_what_a_killed_writer_left_is_nothing_of_others(model, tmp_path):
    kill_a_writer(tmp_path)
    keras_lora.export(model, tmp_path)
    assert tree(tmp_path) == NEW


def test_export_makes_the_folders_around(model, tmp_path):
    keras_lora.export(model, tmp_path / "results/first/served")
    assert tree(tmp_path / "results/first/served") == NEW


def test_export_through_links(model, tmp_path):
    for name in ("folder", "file.onnx"):
        (tmp_path / f"link_{name}").symlink_to(tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/saved_model.pb").write_text("old")
    (tmp_path / "file.onnx").write_text("old")
    keras_lora.export(model, tmp_path / "link_folder")
    keras_lora.export(model, tmp_path / "link_file.onnx", format="onnx")
    assert (tmp_path / "link_folder").is_symlink()
    assert (tmp_path / "link_file.onnx").is_symlink()
    assert tree(tmp_path / "folder") == NEW
    assert (tmp_path / "file.onnx").read_text() == "new"
    assert (tmp_path / "file.onnx.data").read_text() == "new"


def test_export_fills_an_empty_folder(model, tmp_path, monkeypatch):
    identity = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    keras_lora.export(model, ".")
    assert tree(tmp_path) == NEW
    assert tmp_path.stat().st_ino == identity
    with pytest.raises(FileExistsError, match="current working directory"):
        keras_lora.export(model, tmp_path)
    assert tree(tmp_path) == NEW
