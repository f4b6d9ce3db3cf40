"""A folder of things that are made once per content: they appear whole or not at all, whoever else is at it."""

import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.data.rows import DataError
from llama.storage.atomic import sync


def cached(key: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` has filled for this key, now or at an earlier time.

    Processes that want the same one wait for whoever is at it (on a file lock, which the system drops when its holder
    dies), never in a collective that could time out. Raises DataError when the disk refuses.
    """
    folder = cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.exists():
        with _locked(folder.with_suffix(".lock")) as alone:
            if not folder.exists():
                _publish(folder, make, alone)
    return folder


def _publish(folder: Path, make: Callable[[Path], None], alone: bool) -> None:
    ours = f".tmp-{platform.node()}-"  # a lock may hold on one machine only: leave what others may be at
    for left_over in folder.parent.glob(f"{folder.name}{ours}*") if alone else []:  # of a process that died at it
        shutil.rmtree(left_over, ignore_errors=True)
    made = folder.with_suffix(f"{ours}{os.getpid()}")
    try:
        made.mkdir()
        make(made)
        for path in [*made.iterdir(), made]:  # on disk before it has its name: a power cut must not leave half of it
            sync(path)
        made.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another machine has published the same content
            reason = error.strerror or error
            raise DataError(f"{made}: {reason}; free some space, or set LLAMA_CACHE") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def cache_folder() -> Path:
    """$LLAMA_CACHE, else a folder of ours in the user's cache. Raises DataError when it cannot be made."""
    base = os.environ.get("LLAMA_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llama-fine-tuning"
    )
    try:
        os.makedirs(base, exist_ok=True)
        if not os.access(base, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise DataError(f"{base}: {error.strerror}; set LLAMA_CACHE to a folder for encoded data") from None
    return Path(base)


def digest(paths: Iterable[Path]) -> str:
    """A hash of the contents of files. Raises DataError for one that cannot be read."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
    return total.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait until no other process of this machine is in this block; False where nothing can promise that."""
    try:
        file = open(path, "w")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; set LLAMA_CACHE to a folder for encoded data") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:  # some network file systems have no locks: then two may do the same work, safely
            alone = False
        yield alone
