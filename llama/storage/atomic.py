"""What is on disk is whole: files and folders that appear at once, and are proved by digests.

A crash can stop a program between any two instructions. So everything is written under a temporary name, forced to
the disk, and only then given its own name, which is one step for the file system: it happened or it did not.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from llama.boundary.errors import WeightsError
from llama.parallel.collectives import first_rank, together, wait_until_visible

BLOCK = 64 * 2**20  # bytes hashed at a time: what ranks share a large file's digest by


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


@contextmanager
def appearing(
    folder: Path, ours: Callable[[str], bool], group: dist.ProcessGroup | None = None
) -> Iterator[Path]:
    """A new folder to write into, which gets its name when the block is left without an error. Collective.

    `ours` says which file names such a folder can hold: what an earlier attempt left behind is deleted, but never a
    folder with anything else in it. Raises WeightsError, on every rank, if the name is taken.
    """
    folder = Path(folder)
    if not folder.name or folder.name == "..":
        raise WeightsError(f"{folder}: exists already, expected a name that is free")
    unfinished = folder.with_name(folder.name + ".tmp")
    with together(folder, group):
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
    with together(folder, group):
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
