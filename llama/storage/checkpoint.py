"""Saved states of a run, which exist whole or not at all.

Every rank writes its own slices into shared files in step-000100.tmp; when all are on disk, rank 0 renames the folder.
Files hold whole tensors, so any number of ranks can read them back; and nothing in them is a pickle, which could run
code when it is read. What they hold is tensors by name; what these mean is known to those that save and load them.
"""

import math
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from llama import __version__
from llama.boundary.durable import sync, write_durably
from llama.boundary.errors import one_line
from llama.parallel.collectives import fail_together, is_rank_zero
from llama.parallel.shards import Part
from llama.storage.atomic import atomic_folder, digests
from llama.storage.manifest import MANIFEST, PIN, Manifest, best, published, step_of
from llama.storage.slices import read_tensors, write_tensors

DELETING = ".deleting"
Tensors = Mapping[str, Mapping[str, Tensor]]  # by the stem of their file ("model", "optimizer"), then by name


def load_checkpoint(path: Path, tensors: Tensors) -> None:
    """Fill the tensors from a checkpoint, which any number of ranks may have written. Raises UserError for tensors that
    are missing, foreign or of another shape."""
    for stem, named in tensors.items():
        read_tensors(named, path, stem)


class Saver:
    """Saves the checkpoints of one run: training waits for it, or goes on while a copy is written."""

    def __init__(self, folder: Path, keep: int, in_background: bool = False):
        """`keep`: how many of the newest stay (-1: all); the best by held-out loss and pinned ones stay besides."""
        self.folder = folder
        self.keep = keep
        self.in_background = in_background
        # Collectives of two threads in one group would receive each other's messages.
        self.group = dist.new_group(backend="gloo") if in_background and dist.is_initialized() else None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    @property
    def newest(self) -> str:
        """For a message: the newest whole checkpoint of the run."""
        found = published(self.folder)
        return str(found[-1]) if found else "none yet"

    def save(self, step: int, tensors: Tensors, identity: dict, totals: dict, held_out: dict) -> None:
        """Write `folder/step-NNNNNN`. Collective. Waits first for the save before it.

        Raises UserError, on every rank, when any rank cannot write; then nothing has been deleted. In the background,
        the next `save` or `wait` raises it.
        """
        self.wait()
        parts = {}
        for stem, named in tensors.items():
            parts[stem] = {name: Part.of(tensor) for name, tensor in named.items()}
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        finite = {name: value for name, value in held_out.items() if math.isfinite(value)}
        manifest = Manifest(step, ranks, identity, dict(totals), finite, {}, __version__)
        if not self.in_background:
            _write(self.folder, parts, manifest, self.keep)
            return
        copies = {stem: {name: part.copied() for name, part in own.items()} for stem, own in parts.items()}
        # A daemon thread: a process that has to end does not wait for it.
        self.thread = threading.Thread(target=self._write_in_background, args=(copies, manifest), daemon=True)
        self.thread.start()

    def _write_in_background(self, copies: dict, manifest: Manifest) -> None:
        try:
            _write(self.folder, copies, manifest, self.keep, self.group)
        except Exception as error:
            self.error = error
            problem = f"step {manifest.step} was not saved, the run will stop at the next save: {one_line(error)}"
            warnings.warn(problem, stacklevel=1)

    def wait(self) -> None:
        """Return when everything that was to be saved is published. Raises the error of a save that failed."""
        if self.thread:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error:
            raise error


def _write(
    folder: Path, parts: dict, manifest: Manifest, keep: int, group: dist.ProcessGroup | None = None
) -> None:
    with fail_together(folder, group):
        if is_rank_zero():
            for left_over in [*folder.glob("step-*.tmp"), *folder.glob(f"step-*{DELETING}")]:
                _remove(left_over)  # of a run that died while it wrote or deleted it
    with atomic_folder(folder / f"step-{manifest.step:06d}", lambda name: "/" not in name, group) as unfinished:
        for stem, named in parts.items():
            write_tensors(named, unfinished, stem, group=group)
        with fail_together(unfinished, group):
            names = sorted(path.name for path in unfinished.iterdir())
        files = digests(unfinished, names, group)
        with fail_together(unfinished, group):
            if is_rank_zero():
                write_durably(unfinished / MANIFEST, replace(manifest, files=files).to_text())
    with fail_together(folder, group):
        if is_rank_zero():
            for old in _to_delete(folder, keep):
                _delete(old)


def _to_delete(folder: Path, keep: int) -> list[Path]:
    """All but the newest `keep`, the best and the pinned ones."""
    found = published(folder)
    if keep == -1:
        return []
    kept = {*found[-keep:], best(found)}
    return [path for path in found if path not in kept and not (path / PIN).exists()]


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`: a run that goes back to it will write them again. Rank 0 only."""
    moved = []
    for path in published(folder):
        if step_of(path) > step:
            names = (path.with_suffix(f".aside{number or ''}") for number in range(10_000))
            free = next(name for name in names if not name.exists())
            moved.append(path.rename(free))
    if moved:
        sync(folder)  # one that a power cut brought back would be taken for the newest of this run
    return moved


def _delete(path: Path) -> None:
    """Rename first: a crash in the middle must not leave half a checkpoint under the name of a whole one."""
    doomed = path.with_suffix(DELETING)
    try:
        path.rename(doomed)
    except OSError as error:
        warnings.warn(f"{path}: could not be deleted ({one_line(error)})", stacklevel=2)
    else:
        _remove(doomed)


def _remove(path: Path) -> None:
    try:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    except OSError as error:
        warnings.warn(f"{path}: could not be deleted ({one_line(error)})", stacklevel=2)
