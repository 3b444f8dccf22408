"""Files and folders that are replaced as a whole, or not at all."""

import contextlib
import ctypes
import os
import shutil
import tempfile
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextlib.contextmanager
def replacing(path):
    """Yields a path to write to; it takes the place of `path` at the end.

    It lies in a temporary folder beside `path`, under the same name, as some formats
    insist on their ending. If the body raises, what stood at `path` still does.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
        new = Path(folder, path.name)
        yield new
        if path.is_dir() and not path.is_symlink():
            exchange(new, path, Path(folder, "old"))
        else:
            os.replace(new, path)


def exchange(new, path, aside):
    """Swaps two folders: in one step on Linux, elsewhere in two renames."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(new), os.fsencode(path)
        if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
            return
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise


def copy_others(old, new, names):
    """What else stands in the old folder goes along, linked where that works."""
    if old.is_dir():
        shutil.copytree(
            old,
            new,
            copy_function=link_or_copy,
            dirs_exist_ok=True,
            symlinks=True,
            ignore=lambda folder, entries: names if Path(folder) == old else [],
        )


def link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
