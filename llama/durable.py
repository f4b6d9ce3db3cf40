"""What is on disk is whole: files and folders that appear at once, are proved by digests, and fail on all ranks alike.

A crash can stop a program between any two instructions. So everything is written under a temporary name, forced to
the disk, and only then given its own name, which is one step for the file system: it happened or it did not.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from llama.errors import UserError, WeightsError, one_line

BLOCK = 64 * 2**20  # bytes hashed at a time: what ranks share a large file's digest by
PATIENCE = 60.0  # seconds to wait for what another machine wrote to show on a shared disk


def first_rank() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def together(where: Path, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What fails on one rank inside this block fails on all: nobody waits for a rank that is gone. Collective.

    Raises WeightsError on every rank when any had an OSError or a UserError; other errors stay as they are on
    the rank that had them. Leaving the block is a barrier. A thread of its own needs a process group of its own.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    message = error and one_line(error)
    if isinstance(error, OSError):
        message = f"{error.filename or where}: {error.strerror}"
    messages = [message]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message, group=group)
    if error and not isinstance(error, OSError | UserError):
        raise error
    if failed := next(filter(None, messages), None):
        raise WeightsError(failed)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, text: str) -> None:
    """Write a small new file, and return when it is on disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
    sync(path)


def replace_durably(path: Path, text: str) -> None:
    """Write a small file that may exist: whoever reads it finds the old text or the new one, never a part."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    write_durably(unfinished, text)
    os.replace(unfinished, path)
    sync(path.parent)


def wait_until_visible(path: Path) -> None:
    """On a disk shared by machines a name can show late. Raises WeightsError when it has not after PATIENCE."""
    give_up = time.monotonic() + PATIENCE
    while not os.path.lexists(path):
        if time.monotonic() > give_up:
            raise WeightsError(f"{path}: written by another rank, but not to be seen here after {PATIENCE:.0f} s; "
                               "expected one disk that all machines share")
        time.sleep(0.1)


@contextmanager
def appearing(folder: Path, ours: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder to write into, which gets its name when the block is left without an error. Collective.

    `ours` says which file names such a folder can hold: what an earlier attempt left behind is deleted, but never a
    folder with anything else in it. Raises WeightsError, on every rank, if the name is taken.
    """
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    with together(folder):
        if first_rank():
            if os.path.lexists(folder):
                raise WeightsError(f"{folder}: exists already, expected a name that is free")
            if unfinished.is_dir() and not unfinished.is_symlink():
                for path in unfinished.iterdir():
                    if path.is_dir() or not ours(path.name):
                        raise WeightsError(f"{path}: not from an attempt to write {folder}; expected its folder to be "
                                           "free for temporary files")
                shutil.rmtree(unfinished)
            unfinished.mkdir(parents=True)
    yield unfinished
    with together(folder):
        if first_rank():
            sync(unfinished)
            unfinished.rename(folder)
            sync(folder.parent)


def digests(folder: Path, names: Sequence[str], group: dist.ProcessGroup | None = None) -> dict[str, dict]:
    """{name: {"bytes": size, "sha256": digest}} of files, read back from disk. Collective; ranks share the blocks.

    The digest is the SHA-256 of the SHA-256s of each 64 MiB of the file, so it does not depend on the number of ranks.
    Raises WeightsError, on every rank, for a file that any of them cannot read.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, sizes = {}, {}
    with together(folder, group):
        for name in names:
            if not first_rank():
                wait_until_visible(folder / name)
            sizes[name] = (folder / name).stat().st_size
        blocks = [(name, place) for name in names for place in range(0, max(1, sizes[name]), BLOCK)]
        for name, place in blocks[rank::ranks]:
            mine[name, place] = _hash_block(folder / name, place)
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * ranks
        dist.all_gather_object(everyone, mine, group=group)
    hashed = {block: digest for part in everyone for block, digest in part.items()}
    of_file = {name: hashlib.sha256(b"".join(hashed[b] for b in blocks if b[0] == name)).hexdigest() for name in names}
    return {name: {"bytes": sizes[name], "sha256": of_file[name]} for name in names}


def _hash_block(path: Path, place: int) -> bytes:
    total, end = hashlib.sha256(), place + BLOCK
    with open(path, "rb", buffering=0) as file:
        file.seek(place)
        while piece := file.read(min(2**20, end - file.tell())):
            total.update(piece)
    return total.digest()
