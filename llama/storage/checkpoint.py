"""Saved states of a run that exist whole or not at all.

    checkpoints/step-000100/
        model.safetensors         trainable weights in fp32, under Hugging Face names without the prefix
        optimizer.safetensors     both moments of AdamW
        manifest.json             step, counts, size and digest of each file, what a resumed run must share

Every rank writes its own slices into shared files in step-000100.tmp; when all are on disk, rank 0 renames the folder.
One that is being deleted is .deleting, one that is newer than what a run went back to .aside: neither is a checkpoint.
Files hold whole tensors, so they can be read back by any number of ranks; and nothing in them is a pickle.

    python -m llama.storage.checkpoint list RUN                      what is there
    python -m llama.storage.checkpoint verify RUN                    is it whole: reads every byte
    python -m llama.storage.checkpoint export RUN OUT [--step NAME]  what the run would have left, had it ended there
"""

import hashlib
import json
import math
import re
import shutil
import threading
import warnings
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from llama.boundary.command_line import Parser, run
from llama.boundary.errors import UserError, WeightsError, one_line
from llama.boundary.untrusted import inside, read_json_text
from llama.parallel.collectives import first_rank, together
from llama.storage.atomic import appearing, digests, write_durably
from llama.storage.slices import Part, read_tensors, sharded_parameters, write_tensors
from llama.training.optim import optimizer_tensors, set_optimizer_step

NAME = re.compile(r"step-(\d{6,9})")
MANIFEST = "manifest.json"
DELETING = ".deleting"
PIN = "keep"  # a file of this name in a checkpoint's folder, which anybody may put there, saves it from deletion


class CheckpointError(UserError):
    """A checkpoint that cannot be continued from."""


# What is there


def published(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. The name of one that is still being written ends differently."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def choose(folder: Path, wanted: str) -> Path | None:
    """The checkpoint to continue from: the "newest" if there is any, or the one that is named, as step-100.

    A newest one that is damaged is refused when it is read: only its user can decide to go back. Raises
    CheckpointError where the named one is not there.
    """
    found = published(folder)
    if wanted == "newest":
        return found[-1] if found else None
    named = re.fullmatch(r"step-(\d{1,9})", wanted)
    chosen = [path for path in found if named and step_of(path) == int(named[1])]
    if not chosen:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder}: has no checkpoint {wanted!r:.40}; expected one of these: {names}")
    return chosen[0]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    `settings` are what a run must share to continue from here, `totals` what it has counted so far, `held_out` how
    it did on held-out data at this step (empty: not measured), `files` size and digest of each.
    """

    step: int
    ranks: int
    settings: dict
    totals: dict
    held_out: dict
    files: dict


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError for a file that is missing, damaged, or of another checkpoint."""
    where = path / MANIFEST
    try:
        content = json.loads(read_json_text(path, MANIFEST))
        if content.pop("sha256") != _digest(content):
            raise ValueError("its own digest differs")
        found = Manifest(**content)
        typed = {"step": int, "ranks": int, "settings": dict, "totals": dict, "held_out": dict, "files": dict}
        if wrong := [name for name, kind in typed.items() if type(getattr(found, name)) is not kind]:
            raise TypeError(f"{wrong[0]} is not of its kind")
        if not all({name: type(value) for name, value in file.items()} == {"bytes": int, "sha256": str}
                   for file in found.files.values()):
            raise ValueError("files without size and digest")
        numbers = [*found.totals.values(), *found.held_out.values()]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError("a count is not a number")
        if found.totals.get("seconds", 1) <= 0:
            raise ValueError("it took no time")
        if found.step != step_of(path):
            raise ValueError(f"step {found.step!r:.40}")
    except WeightsError as error:
        raise CheckpointError(f"{error}; {_way_back(path)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged ({one_line(error)}); {_way_back(path)}") from None
    return found


def compare(path: Path, saved: dict, settings: dict, allowed: str = "") -> None:
    """Raises CheckpointError, naming each difference, where a run's settings are not those of the checkpoint.

    `allowed`: names of settings, with commas, that may differ.
    """
    tolerated = set(filter(None, allowed.split(",")))
    if unknown := tolerated - settings.keys():
        raise CheckpointError(f"--allow_changed {','.join(sorted(unknown))!r:.100}: expected names among "
                              f"{', '.join(sorted(settings))}")
    differing = [f"{k} was {saved.get(k)!r:.200}, is {settings.get(k)!r:.200}"
                 for k in sorted((saved.keys() | settings.keys()) - tolerated) if saved.get(k) != settings.get(k)]
    if differing:
        raise CheckpointError(f"{path}: made with other settings: {'; '.join(differing)}")


def verify(path: Path, manifest: Manifest) -> None:
    """Read every file of a checkpoint and compare it with the manifest. Collective; ranks share the work.

    Raises CheckpointError, on every rank, naming the file that is missing, cut, changed or too much.
    """
    try:
        with together(path):
            for name in manifest.files if first_rank() else []:  # others may see them late
                inside(path, name, "")
            more = {p.name for p in path.iterdir() if ".safetensors" in p.name} - manifest.files.keys()
            if more:
                raise WeightsError(f"{path / min(more)}: not in the manifest")
        found = digests(path, sorted(manifest.files))
    except WeightsError as error:
        raise CheckpointError(f"{error}; {_way_back(path)}") from None
    for name, expected in manifest.files.items():
        if found[name] != expected:
            told = "; expected ".join(f"{file['bytes']:,} bytes, digest {file['sha256']:.12}"
                                      for file in (found[name], expected))
            raise CheckpointError(f"{path / name}: damaged: {told}; {_way_back(path)}")


def _way_back(path: Path) -> str:
    older = [p.name for p in published(path.parent) if step_of(p) < step_of(path)]
    return f"to continue from the one before it: --resume {older[-1]}" if older else "there is no older checkpoint"


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Reading and writing


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int) -> None:
    """Fill model and optimizer (None: the model alone) from a checkpoint of `step` updates, written by any number of
    ranks. Raises WeightsError for tensors that are missing, foreign or of another shape."""
    weights = _trainable(model)
    read_tensors(weights, path, "model")
    if optimizer:
        read_tensors(optimizer_tensors(weights, optimizer), path, "optimizer")
        set_optimizer_step(optimizer, step)


class Saver:
    """Saves the checkpoints of one run: while it waits, or from a copy in the host's memory while it goes on."""

    def __init__(self, folder: Path, keep: int, in_background: bool = False):
        """`keep`: how many of the newest stay (-1: all); the best by held-out loss and pinned ones stay besides."""
        self.folder, self.keep, self.in_background = folder, keep, in_background
        # Collectives of two threads would take each other's messages.
        self.group = dist.new_group(backend="gloo") if in_background and dist.is_initialized() else None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict, totals: dict,
        held_out: dict | None = None,
    ) -> None:
        """Write `folder/step-NNNNNN`. Collective. Waits for the save before it, which is published first.

        Raises WeightsError, on every rank, when any rank cannot write; then nothing has been deleted. In the background
        that is raised by the next `save` or `wait`.
        """
        self.wait()
        weights = _trainable(model)
        tensors = {"model": weights, "optimizer": optimizer_tensors(weights, optimizer)}
        parts = {stem: {name: Part.of(t) for name, t in of.items()} for stem, of in tensors.items()}
        about = {"step": step, "ranks": dist.get_world_size() if dist.is_initialized() else 1, "settings": settings,
                 "totals": dict(totals),
                 "held_out": {name: value for name, value in (held_out or {}).items() if math.isfinite(value)}}
        if not self.in_background:
            _write(self.folder, parts, about, self.keep)
            return
        copies = {stem: {name: part.copied() for name, part in of.items()} for stem, of in parts.items()}
        # A daemon: a process that has to end does not wait for it.
        self.thread = threading.Thread(target=self._write, args=(copies, about), daemon=True)
        self.thread.start()

    def _write(self, copies: dict, about: dict) -> None:
        try:
            _write(self.folder, copies, about, self.keep, self.group)
        except Exception as error:
            self.error = error
            warnings.warn(f"step {about['step']} was not saved, the run will stop at the next save: {one_line(error)}",
                          stacklevel=1)

    def wait(self) -> None:
        """Return when all that was to be saved is published. Raises what kept it from being."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            raise error


def _write(folder: Path, parts: dict, about: dict, keep: int, group: dist.ProcessGroup | None = None) -> None:
    with together(folder, group):
        for left_over in [*folder.glob("step-*.tmp"), *folder.glob(f"step-*{DELETING}")] if first_rank() else []:
            _remove(left_over)  # of a run that died there
    with appearing(folder / f"step-{about['step']:06d}", lambda name: True, group) as unfinished:
        for stem, tensors in parts.items():
            write_tensors(tensors, unfinished, stem, group=group)
        with together(unfinished, group):
            names = sorted(path.name for path in unfinished.iterdir())
        files = digests(unfinished, names, group)
        with together(unfinished, group):
            if first_rank():
                content = about | {"files": files}
                content = json.loads(json.dumps(content))  # as it reads back: no tuples, and no keys but strings
                text = json.dumps(content | {"sha256": _digest(content)}, indent=2)
                write_durably(unfinished / MANIFEST, text + "\n")
    with together(folder, group):
        for old in _to_delete(folder, keep) if first_rank() else []:
            _delete(old)


def _to_delete(folder: Path, keep: int) -> list[Path]:
    """All but the newest `keep`, the best and the pinned ones."""
    found = published(folder)
    if keep == -1:
        return []
    kept = {*found[-keep:], best(found)}
    return [path for path in found if path not in kept and not (path / PIN).exists()]


def best(found: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss among those where it was measured, the later one of equals."""
    losses = {}
    for path in found:
        try:
            held_out = read_manifest(path).held_out
        except CheckpointError:
            continue  # it is told when somebody wants to use it
        if "loss" in held_out:
            losses[path] = held_out["loss"]
    return min(reversed(losses), key=losses.get, default=None)


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a run that goes back to it will write anew. Rank 0 only."""
    moved = []
    for path in published(folder):
        if step_of(path) > step:
            names = (path.with_suffix(f".aside{n or ''}") for n in range(10_000))
            moved.append(path.rename(next(name for name in names if not name.exists())))
    return moved


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in sharded_parameters(model).items() if p.requires_grad}


def _delete(path: Path) -> None:
    """Rename first: a crash halfway must not leave half a checkpoint under a whole one's name."""
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


# The command


def listing(folder: Path) -> str:
    """A line for each checkpoint of a run: its name, size, held-out loss, and what keeps it."""
    found = published(folder / "checkpoints")
    lines = []
    for path in found:
        marks = [word for word, marked in (("newest", path == found[-1]), ("best", path == best(found)),
                                           ("pinned", (path / PIN).exists())) if marked]
        try:
            manifest = read_manifest(path)
            size = sum(file["bytes"] for file in manifest.files.values())
            told = [f"{size / 1e6:,.1f} MB", f"written by {manifest.ranks} ranks",
                    *(f"{name} {value:.4g}" for name, value in manifest.held_out.items()), *marks]
        except CheckpointError as error:
            told = [one_line(error)]
        lines.append(f"{path.name}  {'  '.join(told)}")
    others = sorted(path.name for path in (folder / "checkpoints").glob("step-*") if path not in found)
    return "\n".join([*lines, *(f"{name}  not a checkpoint: unfinished or set aside" for name in others)])


def main() -> None:
    parser = Parser(prog="python -m llama.storage.checkpoint", description=__doc__,
                    formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, help_text in (("list", "what is there"), ("verify", "is it whole: reads every byte"),
                            ("export", "write what the run would have left, had it ended there")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("run", type=Path, help="the run's folder")
        if name == "export":
            command.add_argument("out", type=Path, help="the folder to make")
            command.add_argument("--model", help="where the model is that the run began with, if it has moved")
        if name != "list":
            command.add_argument("--step", help="step-N, newest or best (default: newest; verify: all)")
    asked = parser.parse_args()
    found = published(asked.run / "checkpoints")
    if not found:
        raise CheckpointError(f"{asked.run}: has no checkpoint")
    if asked.command == "list":
        print(listing(asked.run))
        return
    if asked.step == "best":
        chosen = [best(found)]
        if chosen == [None]:
            raise CheckpointError(f"{asked.run}: no checkpoint has a held-out loss: the run had no --eval_every")
    else:
        chosen = [choose(asked.run / "checkpoints", asked.step or "newest")]
    if asked.command == "export":
        import fsdp_train  # which knows how a run builds its model, and imports this module

        fsdp_train.export_checkpoint(chosen[0], asked.out, asked.model)
        return
    damaged = []
    for path in chosen if asked.step else found:
        try:
            verify(path, read_manifest(path))
            print(f"{path.name} is whole")
        except CheckpointError as error:
            damaged.append(error)
            print(f"{path.name} is damaged")
    if damaged:
        raise damaged[-1]


if __name__ == "__main__":
    from llama.storage.checkpoint import main  # the module that others import, not a second one named __main__

    run(main)
