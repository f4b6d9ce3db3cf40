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
from llama.storage.named_shapes import shape_of
from llama.storage.peft import Adapter
from llama.training.activations import Batch
from llama.training.forecast import Rates
from llama.training.planning import Job, Planner, Row, schemes
from lora import Changes

DATA_SHEET = {"bfloat16": 989.0, "float32": 67.0}  # TFLOP/s of an H100
HEADER = ("sharding", "tensor", "checkpointing", "states", "activations", "total GB", "sent GB", "step s", "tokens/s")
WIDTHS = (8, 6, 13, 9, 11, 9, 8, 7, 9)


def main() -> None:
    settings = parse(PlannerSettings, description=__doc__)
    planner = Planner(job_of(settings), rates_of(settings))
    rows = compared(settings, planner)
    room = settings.gpu_memory * 1e9 * (1 - settings.reserve)
    best = next((row for row in rows if row.peak <= room), None)
    print(heading(settings, planner))
    print(table(rows, room, best, settings.rows))
    print(advice(settings, rows, best, room))


def job_of(settings: PlannerSettings) -> Job:
    """What is trained. Raises UserError for a model or an adapter that there is not."""
    adapter = None
    if settings.lora_rank:
        targets = tuple(settings.lora_targets.split(","))
        adapter = Adapter(settings.lora_rank, 16.0, settings.lora_dropout, settings.lora_variant, targets)
    changes = Changes(settings.quantize, adapter, settings.train_layers)
    batch = Batch(settings.tokens, getattr(torch, settings.dtype))
    return Job(
        shape_of(settings.model),
        changes.apply,
        settings.optimizer,
        batch,
        settings.step_tokens or settings.gpus * settings.tokens,
        min(settings.length, settings.tokens),
        settings.defer_gradient_sync,
    )


def rates_of(settings: PlannerSettings) -> Rates:
    peak = settings.peak_tflops or DATA_SHEET[settings.dtype]
    return Rates(
        operations=peak * 1e12 * settings.efficiency,
        memory=settings.memory_gb_s * 1e9,
        link=settings.link_gb_s * 1e9,
        network=settings.network_gb_s * 1e9,
        layer_starts=settings.layer_ms / 1e3,
        node_gpus=settings.own_node,
    )


def compared(settings: PlannerSettings, planner: Planner) -> list[Row]:
    """A row for each setting that is asked for, the fastest first. Raises UserError where none is possible."""
    rows, refused = [], None
    for scheme in schemes(settings.gpus, settings.node_gpus):
        asked = (
            settings.sharding in ("all", scheme.sharding)
            and settings.tensor_parallel in (0, scheme.mesh.tensor)
            and settings.activation_checkpointing in ("all", scheme.activation_checkpointing)
        )
        if asked:
            try:
                rows.append(planner.row(scheme))
            except UserError as error:
                refused = error
    if not rows:
        raise refused or UserError(f"--sharding {settings.sharding}: not on --gpus {settings.gpus}")
    return sorted(rows, key=lambda row: (row.seconds, row.peak))


def heading(settings: PlannerSettings, planner: Planner) -> str:
    whole = planner.whole
    weights = sum(p.numel() for p in whole.parameters())
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    tokens = planner.job.step_tokens
    return (
        f"{settings.model}: {weights / 1e9:,.2f} billion numbers, {trained / 1e9:,.3f} trained; {settings.gpus} GPUs "
        f"of {settings.gpu_memory:g} GB\nA step of {tokens:,} tokens in micro-batches of {settings.tokens:,}; "
        "all figures but tokens/s are those of the fullest\nGPU; total: its fullest moment, with "
        "weights gathered from other GPUs and logits\n"
    )


def table(rows: list[Row], room: float, best: Row | None, limit: int) -> str:
    """The fastest rows first; the best one is always among them."""
    shown = rows[:limit] if limit else rows
    if best and best not in shown:
        shown = [*shown[:-1], best]
    lines = ["  ".join(f"{name:>{width}}" for name, width in zip(HEADER, WIDTHS, strict=True))]
    for row in shown:
        verdict = "fits" if row.peak <= room else "too large"
        mark = "  <- fastest that fits" if row is best else f"  {verdict}"
        cells = (
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
        lines.append("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)) + mark)
    if len(shown) < len(rows):
        lines.append(f"{len(rows) - len(shown)} more settings are not shown; --rows 0 shows all")
    return "\n".join(lines)


def advice(settings: PlannerSettings, rows: list[Row], best: Row | None, room: float) -> str:
    if best:
        return f"\n{command(settings, best)}"
    nearest = min(rows, key=lambda row: row.peak)
    lines = [f"\nnothing fits into {room / 1e9:.1f} GB; nearest, {nearest.peak / 1e9:.1f} GB: {flags(nearest)}"]
    for words, changed in ways_out(settings):
        row = min(compared(changed, Planner(job_of(changed), rates_of(changed))), key=lambda row: row.peak)
        verdict = "fits" if row.peak <= room else "does not fit either"
        lines.append(f"with {words}: {row.peak / 1e9:.1f} GB, {verdict}")
    return "\n".join(lines)


def ways_out(settings: PlannerSettings) -> Iterator[tuple[str, PlannerSettings]]:
    """What would take less memory: the flags, and the settings with them."""
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


def flags(row: Row) -> str:
    """The flags of fsdp_train.py for one row."""
    scheme = row.scheme
    words = [f"--sharding {scheme.sharding}"]
    if scheme.mesh.tensor > 1:
        words.append(f"--tensor_parallel {scheme.mesh.tensor}")
    if scheme.activation_checkpointing != "none":
        words.append(f"--activation_checkpointing {scheme.activation_checkpointing}")
    if scheme.micro_batches > 1:
        words.append(f"--gradient_accumulation_steps {scheme.micro_batches}")
    if scheme.defer_gradient_sync:
        words.append("--defer_gradient_sync")
    return " ".join(words)


def command(settings: PlannerSettings, best: Row) -> str:
    """What to type. The model's name is a folder of weights only where the plan was made from one."""
    words = [f"torchrun --nproc_per_node {settings.own_node} fsdp_train.py --model {settings.model}"]
    for name in ("lora_rank", "lora_targets", "lora_dropout", "lora_variant", "quantize", "train_layers", "optimizer"):
        value = getattr(settings, name)
        if value != getattr(PlannerSettings, name):
            words.append(f"--{name} {value}")
    words += [f"--dtype {settings.dtype} --batch_tokens {settings.tokens}", flags(best)]
    return " ".join(words)


if __name__ == "__main__":
    run(main)
