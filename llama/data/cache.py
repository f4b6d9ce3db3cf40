"""A folder of results that are computed once for each content. A result is there as a whole or not at all."""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from llama.boundary.durable import locked, sync
from llama.boundary.errors import UserError, reason


def cached(key: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` has filled for this key, now or earlier.

    Processes that want the same folder wait for the one that fills it. They wait on a file lock, which the system
    releases when its holder dies, and not in a collective, which could time out.

    Raises UserError when the folder cannot be written.
    """
    folder = cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.exists():
        return folder
    try:
        with locked(folder.with_suffix(".lock"), wait=True, create=True) as held:
            if not folder.exists():
                _publish(folder, make, held)
    except OSError as error:
        raise UserError(f"{folder}: {reason(error)}; free some space, or set LLAMA_CACHE to another folder") from None
    return folder


def _publish(folder: Path, make: Callable[[Path], None], held: bool) -> None:
    """Fill a folder with a temporary name and then rename it. `held`: no other process of this machine does the same.
    """
    suffix = f".tmp-{platform.node()}-"
    if held:
        # What processes of this machine left when they died. Another machine may be writing now, because a lock on a
        # network file system may not reach it: keep what has the name of another machine.
        for left_over in folder.parent.glob(f"{folder.name}{suffix}*"):
            shutil.rmtree(left_over, ignore_errors=True)
    unfinished = folder.with_suffix(f"{suffix}{os.getpid()}")
    try:
        unfinished.mkdir()
        make(unfinished)
        for path in [*unfinished.iterdir(), unfinished]:
            sync(path)  # before the rename: after a power cut, a folder with the final name must have all its content
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # if it exists, another machine has published the same content
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def cache_folder() -> Path:
    """$LLAMA_CACHE, else a folder of this project in the user's cache. Raises UserError when it cannot be made."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("LLAMA_CACHE") or os.path.join(caches, "llama-fine-tuning"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; set LLAMA_CACHE to a folder for encoded data") from None
    return folder


def digest(paths: Iterable[Path]) -> str:
    """A hash of the contents of files. Raises UserError for a file that cannot be read."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
    return total.hexdigest()
