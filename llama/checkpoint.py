"""Saved states of a run that exist whole or not at all.

    checkpoints/step-000100/
        model.safetensors         trainable weights in fp32, under Hugging Face names without the prefix
        optimizer.safetensors     both moments of AdamW
        state.json                step, and what the run must agree with to continue from here

Every rank writes its own slices into shared files under a temporary name; when all are on disk, rank 0 renames the
folder. Files hold whole tensors, so they can be read back by any number of ranks; and nothing in them is a pickle.
"""

import json
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from llama.errors import UserError
from llama.optim import optimizer_tensors, set_optimizer_step
from llama.slices import first_rank, read_tensors, sharded_parameters, sync, together, write_durably, write_tensors

NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(UserError):
    """A checkpoint that cannot be continued from."""


def published(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first. A name still being written ends differently."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict, totals: dict, keep: int
) -> Path:
    """Write `folder/step-NNNNNN` and drop all but the newest `keep` (-1: keep all). Collective.

    `settings` are what a run must share to continue from here, `totals` what it has counted so far. Raises
    WeightsError, on every rank, when any rank cannot write; then nothing has been published or dropped.
    """
    target = folder / f"step-{step:06d}"
    written = target.with_suffix(".tmp")
    with together(written):
        if first_rank():
            for left_over in [*folder.glob("step-*.tmp"), *folder.glob("step-*.old")]:  # by a run that died here
                shutil.rmtree(left_over)
            written.mkdir(parents=True)
    weights = _trainable(model)
    write_tensors(weights, written, "model")
    write_tensors(optimizer_tensors(weights, optimizer), written, "optimizer")
    with together(written):
        if first_rank():
            state = {"step": step, "ranks": dist.get_world_size(), "settings": settings, "totals": totals}
            write_durably(written / "state.json", json.dumps(state, indent=2) + "\n")
            sync(written)
            written.rename(target)
            sync(folder)
            for old in published(folder)[:-keep] if keep > 0 else []:
                _delete(old)
    return target


def read_state(path: Path, settings: dict) -> tuple[int, dict]:
    """The step of a checkpoint and what its run had counted by then.

    Raises CheckpointError, naming each difference, when it was made with other `settings`.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        saved, totals = dict(state["settings"]), dict(state["totals"])
        if state["step"] != (step := int(NAME.fullmatch(path.name)[1])):
            raise ValueError(f"step {state['step']!r:.40}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / 'state.json'}: not the state of this checkpoint ({error})") from None
    differing = [f"{k} was {saved.get(k)!r}, is {settings.get(k)!r}"
                 for k in sorted(saved.keys() | settings.keys()) if saved.get(k) != settings.get(k)]
    if differing:
        raise CheckpointError(f"{path}: made with other settings: {'; '.join(differing)}")
    return step, totals


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Fill model and optimizer from a checkpoint of `step` updates, written by any number of ranks."""
    weights = _trainable(model)
    read_tensors(weights, path, "model")
    read_tensors(optimizer_tensors(weights, optimizer), path, "optimizer")
    set_optimizer_step(optimizer, step)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in sharded_parameters(model).items() if p.requires_grad}


def _delete(path: Path) -> None:
    """Rename first: a crash halfway must not leave half a checkpoint under a whole one's name."""
    doomed = path.with_suffix(".old")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        warnings.warn(f"{path}: could not be deleted ({error.strerror})", stacklevel=2)
