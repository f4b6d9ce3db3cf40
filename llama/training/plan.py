"""What the ranks agree on before anything is built: batches, the run's folder, where to continue from.

Each has read the settings and encoded the data alone. Whatever differs between them stops the run here, before one
could wait for a step that another never makes.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama.boundary.command_line import CheckedSettings
from llama.boundary.errors import UserError
from llama.data.batches import Schedule
from llama.parallel.distribute import Ranks, compute_dtype
from llama.storage import checkpoint, pretrained
from llama.training.journal import choose_folder, locked

COUNTS = {"examples", "tokens", "labels", "seconds"}  # what a run adds up over its steps, resumed or not
# What one attempt leaves for the next in a store that outlives it: its folder, and that it has begun there, so that
# from now on the newest checkpoint is its own.
FOLDER, BEGUN = "folder", "begun"


@dataclass(frozen=True)
class Plan:
    """What all ranks have agreed on before anything is built."""

    schedule: Schedule
    steps: int
    dtype: torch.dtype
    binding: dict  # what a resumed run must share with the one it continues
    output: Path
    saved: Path | None  # the checkpoint to continue from
    manifest: checkpoint.Manifest | None  # what it says of itself

    @property
    def first_step(self) -> int:
        return self.manifest.step if self.manifest else 0


def make_plan(settings: CheckedSettings, task: Any, here: Ranks, folder: str, locks: ExitStack) -> Plan:
    """Choose the batches and the run's folder (`folder`, if --output names none), locked by `locks`. Collective.

    Raises UserError, on every rank, for data that do not fill a batch, a folder that is taken, and a checkpoint that is
    damaged or was made with other settings.
    """
    data, at_once = task.train, settings.gradient_accumulation_steps * here.world_size
    schedule = Schedule(data.lengths, settings.epochs, at_once, settings.batch_size, settings.batch_tokens,
                        settings.group_by_length, settings.seed)
    if schedule.units < schedule.per_step:
        packs = f" in {schedule.units} packs of --batch_tokens {settings.batch_tokens}" if settings.batch_tokens else ""
        raise UserError(f"--data {settings.data}: {len(data)} examples{packs}, fewer than one global batch of "
                        f"{schedule.per_step}")
    steps = min(schedule.steps, settings.max_steps) if settings.max_steps else schedule.steps
    dtype = compute_dtype(settings.dtype, here.device)
    # Ranks and micro-batches may differ from the checkpoint's: the global batches are the same.
    binding = {name: getattr(settings, name) for name in (
        "model", "max_length", "truncate_side", "epochs", "learning_rate", "lr_schedule", "warmup_ratio",
        "beta2", "weight_decay", "max_grad_norm", "seed", "batch_tokens", "group_by_length", "optimizer", "quantize",
        "train_layers", "train_on_prompt", "adapter")}
    binding |= {"steps": steps, "global_batch": schedule.per_step, "dtype": str(dtype), "data": settings.data,
                "template": task.data.template.name, "fingerprint": data.fingerprint,
                "bundled_sample": task.data.source.bundled_sample,
                "base": pretrained.fingerprint(task.folder) if task.folder else None,
                # As it reads back from JSON, where there are no tuples.
                "lora": json.loads(json.dumps(asdict(task.adapter))) if task.adapter else None}
    _agree(binding, here)
    output, saved, manifest = _from_first_rank(here, lambda: _choose_run(settings, binding, here, folder, locks))
    return Plan(schedule, steps, dtype, binding, output, saved, manifest)


def _choose_run(
    settings: CheckedSettings, binding: dict, here: Ranks, folder: str, locks: ExitStack
) -> tuple[Path, Path | None, checkpoint.Manifest | None]:
    """The run's folder and the checkpoint to continue from. Rank 0 looks and decides: two that look might see
    different things."""
    resume = settings.resume
    if here.store and here.store.check([FOLDER]):  # of an attempt before this one: torchrun has started it again
        output = Path(here.store.get(FOLDER).decode())
        resume = "newest" if here.store.check([BEGUN]) else resume
    else:
        output = choose_folder(settings.output, folder, bool(resume))
        if here.store:
            here.store.set(FOLDER, str(output))
    locks.enter_context(locked(output))
    saved = checkpoint.choose(output / "checkpoints", resume) if resume else None
    if resume and not saved and ((output / "model").exists() or (output / "adapter").exists()):
        raise UserError(f"--resume: {output} has a result but no checkpoint to continue from, and a new start would "
                        "replace it")
    manifest = checkpoint.read_manifest(saved) if saved else None
    if saved:
        checkpoint.compare(saved, manifest.settings, binding, settings.allow_changed)
        if manifest.step > binding["steps"]:
            raise UserError(f"{saved}: is after step {manifest.step}, but this run has only {binding['steps']} steps")
        if counts := COUNTS ^ manifest.totals.keys():
            raise UserError(f"{saved}: its manifest has other counts than {', '.join(sorted(COUNTS))}: {min(counts)}")
    return output, saved, manifest


def _from_first_rank(here: Ranks, decide: Callable[[], Any]) -> Any:
    """What `decide` returns on rank 0, on every rank; where it raises a UserError there, all raise it. Collective."""
    answer = [None]
    if here.is_first:
        try:
            answer = [decide()]
        except UserError as error:
            answer = [error]
        except OSError as error:
            answer = [UserError(f"{error.filename}: {error.strerror}")]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def _agree(binding: dict, here: Ranks) -> None:
    """Every process read its data and chose its defaults alone: stop before any of them could wait for a step that
    another never makes."""
    everyone = [None] * here.world_size
    dist.all_gather_object(everyone, binding)
    for rank, other in enumerate(everyone):
        if differing := [name for name in binding if other[name] != everyone[0][name]]:
            told = "; ".join(f"{name} is {everyone[0][name]!r} and {other[name]!r}" for name in differing)
            raise UserError(f"ranks 0 and {rank} do not agree: {told}; expected the same files and versions everywhere")
