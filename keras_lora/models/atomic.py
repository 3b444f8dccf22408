"""Replaces files and folders as a whole, or not at all."""

import contextlib
import ctypes
import errno
import os
import platform
import re
import secrets
import shutil
import tempfile
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
# The name of a temporary folder holds the process id, a token of this run (a
# container's first process always has the same id) and the machine.
TOKEN, NODE = secrets.token_hex(4), re.sub(r"\W", "_", platform.node())
TEMPORARY = re.compile(rf"\.keras_lora-(\d{{1,9}})-(\w+)-\w+@{NODE}")


@contextlib.contextmanager
def temporary_folder(parent):
    """Context with a temporary folder; removes those that killed processes left."""
    clear_left_over(parent)
    with tempfile.TemporaryDirectory(
        prefix=f".keras_lora-{os.getpid()}-{TOKEN}-", suffix=f"@{NODE}", dir=parent
    ) as folder:
        yield Path(folder)


@contextlib.contextmanager
def replacing(path):
    """Yields a path to write to; it takes the place of `path` at the end.

    It lies in a temporary folder on the same disk, under the same name, as some
    formats insist on their ending; what they write beside it goes along. A link
    stays a link, and what it points to is replaced. An empty folder is filled in
    place, because a mount point or a working directory cannot be exchanged. If the
    body raises, `path` is left as it was.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = path.is_dir() and not entries(path)
    with temporary_folder(path if empty else path.parent) as folder:
        new = folder / path.name
        try:
            yield new
        except Exception as error:
            raise_as_os_error(error, path)
            raise
        if empty:
            move(new, path, last="saved_model.pb")
        elif path.is_dir():
            exchange(new, path, folder / "old" / path.name)
        else:
            move(folder, path.parent, last=path.name)


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES)


def raise_as_os_error(error, path):
    """Raises OSError for another error whose text is that of, say, a full disk."""
    for number in DISK_ERRORS:
        text = os.strerror(number)
        if not isinstance(error, OSError) and text in str(error):
            raise OSError(number, text, str(path)) from error


FILE_ENDINGS = (".keras", ".h5", ".json", ".safetensors", ".bin", ".onnx", ".zip")


def refuse_file_name(path, what):
    """Raises if the path of a folder is that of a file, or looks like one."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"The path must be a string or a Path. Received: {path!r}.")
    if os.path.isdir(path):
        return
    if os.path.exists(path):
        raise FileExistsError(f"{str(path)!r} is a file, and {what} is a folder.")
    if str(path).endswith(FILE_ENDINGS):
        raise ValueError(
            f"{str(path)!r} has a name like a file, and {what} is a folder. For a "
            ".keras file of the model, with its adapters, call `model.save`."
        )


def entries(folder):
    """Returns the names in a folder, without temporary folders of this package."""
    return {name for name in os.listdir(folder) if not TEMPORARY.fullmatch(name)}


def move(source, folder, last):
    """Moves all files to another folder; `last`, which readers look for, goes last."""
    for name in sorted(os.listdir(source), key=lambda name: name == last):
        os.replace(source / name, folder / name)


def exchange(new, path, aside):
    """Swaps two folders: in one step on Linux, elsewhere in two renames."""
    # Windows has no library without a name.
    library = ctypes.CDLL(None) if os.name == "posix" else None
    renameat2 = getattr(library, "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(new), os.fsencode(path)
        if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
            return
    aside.parent.mkdir()
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise


def clear_left_over(parent):
    """Removes temporary folders of processes that have ended."""
    for name in os.listdir(parent):
        match = TEMPORARY.fullmatch(name)
        if match is None or is_running(int(match[1]), match[2]):
            continue
        for old in Path(parent, name).glob("old/*"):  # killed between two renames
            if not Path(parent, old.name).exists():
                os.rename(old, Path(parent, old.name))
        shutil.rmtree(Path(parent, name), ignore_errors=True)


def is_running(process, token):
    if process == os.getpid():
        return token == TOKEN
    if os.name != "posix":
        return True  # there `os.kill` does more than ask
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def write(path, content):
    """Writes bytes that are on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
