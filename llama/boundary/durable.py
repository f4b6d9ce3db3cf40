"""Small files that one process writes: on disk before anyone relies on them, and locked where two could write."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.boundary.errors import UserError


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk: a power cut cannot undo them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, text: str) -> None:
    """Write a new small file, and return when it is on disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
    sync(path)


def replace_durably(path: Path, text: str) -> None:
    """Write a small file that may exist already. A reader finds the old text or the new one, never a part."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    write_durably(unfinished, text)
    os.replace(unfinished, path)
    sync(path.parent)


@contextmanager
def locked(path: Path, wait: bool, create: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder, or of a file that holds nothing else (`create`: it is made where it is missing).

    The system releases the lock when this process ends, even if it is killed. If another process holds it, wait for it
    (`wait`) or raise UserError. Yields False if the file system has no locks: then two processes may run this block.
    """
    # A network file system locks only what is open for writing. A folder cannot be opened for writing.
    mode = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    handle = os.open(path, mode, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            raise UserError(f"{path}: in use by another run; wait until it ends, or name another folder") from None
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)
