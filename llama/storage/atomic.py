"""Folders that appear under their name only when they are whole, and digests that prove that they still are.

A crash can stop a program between any two instructions. So everything is written into a folder with another name,
forced to disk, and only then renamed. A rename is one step for the file system: it has happened or it has not.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from llama.boundary.durable import sync
from llama.boundary.errors import UserError
from llama.parallel.collectives import fail_together, gather, is_rank_zero, wait_until_visible

HASHED_AT_ONCE = 64 * 2**20  # bytes; ranks share the hashing of a large file in blocks of this size


@contextmanager
def atomic_folder(
    folder: Path, is_ours: Callable[[str], bool], group: dist.ProcessGroup | None = None, replace: bool = False
) -> Iterator[Path]:
    """A new folder to write into, which gets its name when the block ends without an error. Collective.

    An unfinished folder of an earlier attempt is deleted, but only if `is_ours` accepts the name of every file in it
    (and of every folder in it; a file in a folder has the name folder/file).
    With `replace`, an existing folder is deleted first, so a crash leaves none; else it is a UserError on every rank.
    """
    folder = Path(folder)
    if not folder.name or folder.name == "..":
        raise UserError(f"{folder}: exists already, expected a name that is free")
    unfinished = folder.with_name(folder.name + ".tmp")
    with fail_together(folder, group):
        if is_rank_zero():
            if replace and folder.exists():
                shutil.rmtree(folder)
            if os.path.lexists(folder):
                raise UserError(f"{folder}: exists already, expected a name that is free")
            _delete_left_over(unfinished, folder, is_ours)
            unfinished.mkdir(parents=True)
    yield unfinished
    with fail_together(folder, group):
        if is_rank_zero():
            sync(unfinished)
            unfinished.rename(folder)
            sync(folder.parent)


def _delete_left_over(unfinished: Path, folder: Path, is_ours: Callable[[str], bool]) -> None:
    if not unfinished.is_dir() or unfinished.is_symlink():
        return
    for path in unfinished.rglob("*"):
        if not is_ours(path.relative_to(unfinished).as_posix()):
            raise UserError(
                f"{path}: not from an attempt to write {folder}; expected its folder to be free for temporary files"
            )
    shutil.rmtree(unfinished)


def digests(folder: Path, names: Sequence[str], group: dist.ProcessGroup | None = None) -> dict[str, dict]:
    """{name: {"bytes": size, "sha256": digest}} of files, read back from disk. Collective; ranks share the blocks.

    The digest is the SHA-256 of the SHA-256s of each 64 MiB of the file, so it does not depend on the number of ranks.
    Raises UserError, on every rank, for a file that any of them cannot read.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sizes, hashed = {}, {}
    with fail_together(folder, group):
        for name in names:
            if rank > 0:
                wait_until_visible(folder / name)
            sizes[name] = (folder / name).stat().st_size
        blocks = []
        for name in names:
            blocks += [(name, start) for start in range(0, max(1, sizes[name]), HASHED_AT_ONCE)]
        for name, start in blocks[rank::ranks]:
            hashed[name, start] = _hash_block(folder / name, start)
    for other in gather(hashed, group):
        hashed |= other
    found = {}
    for name in names:
        of_blocks = b"".join(hashed[block] for block in blocks if block[0] == name)
        found[name] = {"bytes": sizes[name], "sha256": hashlib.sha256(of_blocks).hexdigest()}
    return found


def _hash_block(path: Path, start: int) -> bytes:
    total = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while piece := file.read(min(2**20, start + HASHED_AT_ONCE - file.tell())):
            total.update(piece)
    return total.digest()
