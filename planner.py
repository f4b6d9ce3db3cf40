"""Plan a training job before it has a GPU: what each way to spread it holds, sends and takes, and which is fastest.

    python planner.py --model 70b --gpus 16                             Llama 2 70B, all weights, two nodes of 8
    python planner.py --model 8b --gpus 1 --lora_rank 8 --quantize nf4  an adapter over 4 bits, on one GPU
    python planner.py --model DIR --gpus 8 --gpu_memory 40              the shape of a folder's config.json

No weights are read, and no GPU is needed: everything is counted from the shapes. States (weights, gradients and the
optimizer's moments) are exact to the byte. Activations are counted by running the code on shapes. Times come from the
rates that the flags state: take them to compare settings, not as promises.
"""

from llama.boundary.command_line import parse, run
from llama.training.planner_settings import PlannerSettings

if __name__ == "__main__":  # --help and mistyped flags need not wait until torch is imported
    run(lambda: parse(PlannerSettings, description=__doc__))

from collections.abc import Iterator
from dataclasses import replace

import torch

from llama.boundary.errors import UserError
from llama.parallel.distribute import on_meta
from llama.storage.named_shapes import shape_of
from llama.storage.peft import Adapter
from llama.training.activations import Batch
from llama.training.forecast import Rates
from llama.training.planner import Job, Planner, Row, schemes
from lora import Changes

HEADER = ("fits", "sharding", "tensor", "checkpointing", "states", "activations", "total GB", "sent GB", "step s",
          "tokens/s")  # fmt: skip
WIDTHS = (4, 8, 6, 13, 8, 11, 8, 8, 6, 8)


def main() -> None:
    settings = parse(PlannerSettings, description=__doc__)
    rows = compared(settings)
    room = settings.gpu_memory * 1e9 * (1 - settings.reserve)
    best = next((row for row in rows if row.peak <= room), None)
    print(heading(settings))
    print(table(rows, room, best, settings.rows))
    print(advice(settings, rows, best, room))


def job_of(settings: PlannerSettings) -> Job:
    """What is trained. Raises UserError for a model or an adapter that there is not."""
    adapter = None
    if settings.lora_rank:
        targets = tuple(settings.lora_targets.split(","))
        adapter = Adapter(settings.lora_rank, 16.0, settings.lora_dropout, settings.lora_variant, targets)
    changes = Changes(settings.quantize, adapter, settings.train_layers)
    config = shape_of(settings.model)
    batch = Batch(settings.tokens, getattr(torch, settings.dtype))
    step_tokens = settings.step_tokens or settings.gpus * settings.tokens
    document = min(settings.length, settings.tokens)
    return Job(config, changes.apply, settings.optimizer, batch, step_tokens, document, settings.defer_gradient_sync)


def compared(settings: PlannerSettings) -> list[Row]:
    """A row for each setting that is asked for, the fastest first. Raises UserError where none is possible."""
    asked = [
        scheme
        for scheme in schemes(settings.gpus, settings.node_gpus)
        if settings.sharding in ("all", scheme.sharding)
        and settings.tensor_parallel in (0, scheme.mesh.tensor)
        and settings.activation_checkpointing in ("all", scheme.activation_checkpointing)
    ]
    if not asked:
        expected = f"several nodes for it: --gpus {settings.gpus} are on one, or have one share of the data"
        raise UserError(f"--sharding {settings.sharding}: expected {expected}")
    return Planner(job_of(settings), Rates.of(settings)).rows(asked)


def heading(settings: PlannerSettings) -> str:
    job = job_of(settings)
    whole = on_meta(job.config)
    job.change(whole)
    weights = sum(p.numel() for p in whole.parameters())
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    return (
        f"{settings.model}: {weights / 1e9:,.2f} billion numbers, {trained / 1e9:,.3f} trained; {settings.gpus} GPUs "
        f"of {settings.gpu_memory:g} GB\nA step of {job.step_tokens:,} tokens in micro-batches of {settings.tokens:,}. "
        "GB are those of the fullest GPU;\ntotal: at the fullest point of a step, with weights gathered "
        "from other GPUs and logits;\nthe fastest that fits is the BEST.\n"
    )


def table(rows: list[Row], room: float, best: Row | None, limit: int) -> str:
    """Rows that fit come first, the fastest first among them; so the best one is always shown."""
    ordered = sorted(rows, key=lambda row: row.peak > room)
    shown = ordered[:limit] if limit else ordered
    lines = [aligned(HEADER)]
    for row in shown:
        verdict = "yes" if row.peak <= room else "no"
        cells = (
            "BEST" if row is best else verdict,
            row.scheme.sharding,
            str(row.scheme.mesh.tensor),
            row.scheme.activation_checkpointing,
            f"{row.held.total / 1e9:,.2f}",
            f"{row.activations / 1e9:,.2f}",
            f"{row.peak / 1e9:,.2f}",
            f"{row.sent / 1e9:,.2f}",
            f"{row.seconds:,.2f}",
            f"{row.tokens_per_second:,.0f}",
        )
        lines.append(aligned(cells))
    if len(shown) < len(rows):
        lines.append(f"{len(rows) - len(shown)} more settings are not shown; --rows 0 shows all")
    return "\n".join(lines)


def aligned(cells: tuple[str, ...]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def advice(settings: PlannerSettings, rows: list[Row], best: Row | None, room: float) -> str:
    if best:
        return f"\n{command(settings, best)}"
    nearest = min(rows, key=lambda row: row.peak)
    lines = [f"\nnothing fits into {room / 1e9:.1f} GB; nearest, {nearest.peak / 1e9:.1f} GB: {nearest.flags}"]
    for words, changed in ways_out(settings):
        least = min(row.peak for row in compared(changed))
        lines.append(f"with {words}: {least / 1e9:.1f} GB, {'fits' if least <= room else 'does not fit either'}")
        if least <= room and words.startswith("--gpus"):
            break
    return "\n".join(lines)


def ways_out(settings: PlannerSettings) -> Iterator[tuple[str, PlannerSettings]]:
    """What would take less memory: the flags, and the settings with them. More GPUs come last, the fewest first."""
    if settings.activation_checkpointing == "all":
        settings = replace(settings, activation_checkpointing="full")
    if settings.optimizer != "adamw8bit":
        yield "--optimizer adamw8bit", replace(settings, optimizer="adamw8bit")
    if not settings.lora_rank:
        lora = replace(settings, lora_rank=8, train_layers="all")
        yield "--lora_rank 8", lora
        yield "--lora_rank 8 --quantize nf4", replace(lora, quantize="nf4")
    elif settings.quantize == "none":
        yield "--quantize nf4", replace(settings, quantize="nf4")
    for times in (2, 4, 8, 16, 32):
        gpus = times * settings.gpus
        if gpus <= settings.node_gpus or gpus % settings.node_gpus == 0:
            yield f"--gpus {gpus}", replace(settings, gpus=gpus)


def command(settings: PlannerSettings, best: Row) -> str:
    """What to type, on each node: R is its number from 0, HOST the first one's name. The model's name is a folder of
    weights only where the planner was given one."""
    nodes = settings.gpus // settings.own_node
    of_nodes = f"--nnodes {nodes} --node_rank R --master_addr HOST " if nodes > 1 else ""
    words = [f"torchrun {of_nodes}--nproc_per_node {settings.own_node} fsdp_train.py --model {settings.model}"]
    for name in ("lora_rank", "lora_targets", "lora_dropout", "lora_variant", "quantize", "train_layers", "optimizer"):
        value = getattr(settings, name)
        if value != getattr(PlannerSettings, name):
            words.append(f"--{name} {value}")
    words += [f"--dtype {settings.dtype} --batch_tokens {settings.tokens}", best.flags]
    return " ".join(words)


if __name__ == "__main__":
    run(main)
