"""What the ranks agree on before anything is built: the batches, the run's folder, where to continue from.

Each rank has read the settings and encoded the data on its own. If the results differ between ranks, the run stops here
with a UserError. Otherwise one rank might later take a step that another does not, and would wait forever.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.boundary.durable import locked
from llama.boundary.errors import UserError
from llama.data.batches import Schedule
from llama.data.examples import EncodedData
from llama.parallel.collectives import from_rank_zero, gather
from llama.parallel.processes import Process, compute_dtype
from llama.storage.manifest import Manifest, compare, find, read_manifest
from llama.training.run_folder import choose_folder
from llama.training.settings import FilledSettings

COUNTS = {"examples", "tokens", "labels", "seconds"}  # what a run adds up over its steps, resumed or not
# Keys in torchrun's store, which survives when torchrun restarts the processes. FOLDER: the run's folder. BEGUN: set
# once the run has started there; from then on the newest checkpoint in that folder belongs to this run.
FOLDER, BEGUN = "folder", "begun"


@dataclass(frozen=True)
class Plan:
    """What all ranks have agreed on before anything is built."""

    schedule: Schedule
    steps: int
    dtype: torch.dtype
    identity: dict  # what a resumed run must share with the run that it continues
    output: Path
    saved: Path | None  # the checkpoint to continue from
    manifest: Manifest | None  # what that checkpoint says of itself

    @property
    def first_step(self) -> int:
        return self.manifest.step if self.manifest else 0

    def is_finished(self, result: Path) -> bool:
        """Whether all steps, the export and the summary are done. Rank 0 looks, for all ranks; collective."""
        paths = (result, self.output / "summary.json")
        return from_rank_zero(lambda: self.first_step == self.steps and all(path.exists() for path in paths))


def make_plan(
    settings: FilledSettings,
    examples: EncodedData,
    identity: dict,
    process: Process,
    default_folder: str,
    locks: ExitStack,
) -> Plan:
    """Choose the batches; choose and lock the run's folder (`default_folder` where --output names none). Collective.

    Raises UserError, on every rank, for data that do not fill a batch, a folder that is taken, and a checkpoint that is
    damaged or was made with other settings.
    """
    _agree(vars(settings))
    schedule = Schedule(
        examples.lengths,
        settings.epochs,
        settings.gradient_accumulation_steps * process.data_ranks,
        settings.batch_size,
        settings.batch_tokens,
        settings.group_by_length,
        settings.seed,
    )
    if schedule.units < schedule.units_per_step:
        packs = f" in {schedule.units} packs of --batch_tokens {settings.batch_tokens}" if settings.batch_tokens else ""
        smaller = "--batch_tokens" if settings.batch_tokens else "--batch_size"
        raise UserError(
            f"--data {settings.data}: {len(examples)} examples{packs}, fewer than one global batch of "
            f"{schedule.units_per_step}; lower {smaller} or --gradient_accumulation_steps, or use fewer processes"
        )
    steps = min(schedule.steps, settings.max_steps) if settings.max_steps else schedule.steps
    dtype = compute_dtype(settings.dtype, process.device)
    identity = identity | {"steps": steps, "global_batch": schedule.units_per_step, "dtype": str(dtype)}
    _agree(identity)
    run = from_rank_zero(lambda: _choose_run(settings, identity, process, default_folder, locks))
    return Plan(schedule, steps, dtype, identity, *run)


def _choose_run(
    settings: FilledSettings, identity: dict, process: Process, default_folder: str, locks: ExitStack
) -> tuple[Path, Path | None, Manifest | None]:
    """The run's folder and the checkpoint to continue from."""
    resume = settings.resume
    if process.store and process.store.check([FOLDER]):  # torchrun has started this run again after a failure
        output = Path(process.store.get(FOLDER).decode())
        if process.store.check([BEGUN]):
            resume = "newest"
    else:
        output = choose_folder(settings.output, default_folder, bool(resume))
        if process.store:
            process.store.set(FOLDER, str(output))
    locks.enter_context(locked(output, wait=False))
    saved = find(output / "checkpoints", resume) if resume else None
    if not saved:
        if resume and ((output / "model").exists() or (output / "adapter").exists()):
            raise UserError(
                f"--resume: {output} has a result but no checkpoint to continue from, and a new start would replace "
                "it; start a new run in another --output without --resume"
            )
        return output, None, None
    manifest = read_manifest(saved)
    compare(saved, manifest.identity, identity, settings.allow_changed)
    if manifest.step > identity["steps"]:
        raise UserError(
            f"{saved}: is after step {manifest.step}, but this run has only {identity['steps']} steps; expected "
            "more --epochs or --max_steps, or an earlier checkpoint by --resume step-N"
        )
    wrong = COUNTS ^ manifest.totals.keys()
    if wrong:
        raise UserError(f"{saved}: its manifest has other counts than {', '.join(sorted(COUNTS))}: {min(wrong)}")
    return output, saved, manifest


def _agree(identity: dict) -> None:
    """Raises UserError where the settings or identities of two ranks differ. Collective."""
    identities = gather(identity)
    for rank, other in enumerate(identities):
        first = identities[0]
        differing = [f"{name} is {first[name]!r} and {other[name]!r}" for name in first if other[name] != first[name]]
        if differing:
            raise UserError(
                f"ranks 0 and {rank} do not agree: {'; '.join(differing)}; expected the same flags, files and versions "
                "on every node"
            )
