"""How much memory fine-tuning takes on each of some GPUs, as planner.py counts it: no weights are needed.

    python benchmarks/memory.py                            the table for 7B, 8B, 13B and 70B
    python benchmarks/memory.py --check DIR                the same count beside a measured run of a Hugging Face folder

The table is for --activation_checkpointing full. --check starts real ranks on this machine's CPU. Their peak is above
what they hold after their imports, and freed memory is given back at once. A run on a CPU keeps freed memory, because
that is faster; between what it keeps there are gaps, so its process grows by up to a third more than its tensors take.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fsdp_train
import planner
from llama.model import PackedDocuments
from llama.parallel import processes
from llama.parallel.collectives import gather
from llama.parallel.mesh import mesh_shape
from llama.parallel.processes import join
from llama.parallel.scheme import Scheme
from llama.parallel.shards import local_slice
from llama.storage.base import Base
from llama.training.forecast import Rates
from llama.training.memory import size
from llama.training.planner import Planner
from llama.training.planner_settings import PlannerSettings
from llama.training.settings import TrainingSettings
from llama.training.state import training_state
from lora import Changes

SHAPES = {"Llama 2 7B": "7b", "Llama 3 8B": "8b", "Llama 2 13B": "13b", "Llama 2 70B": "70b"}
METHODS = {
    "full": {}, "full, adamw8bit": {"optimizer": "adamw8bit"}, "LoRA": {"lora_rank": 8},
    "LoRA, int8": {"lora_rank": 8, "quantize": "int8"}, "LoRA, nf4": {"lora_rank": 8, "quantize": "nf4"},
}  # fmt: skip
# What is measured: ranks, and flags of the trainer.
CHECKED = [
    (1, {"dtype": "float32"}), (1, {"dtype": "bfloat16"}),
    (1, {"dtype": "float32", "activation_checkpointing": "full"}),
    (1, {"dtype": "float32", "lora_rank": 8}), (1, {"dtype": "bfloat16", "lora_rank": 8}),
    (1, {"dtype": "bfloat16", "lora_rank": 8, "activation_checkpointing": "full"}),
    (1, {"dtype": "bfloat16", "lora_rank": 8, "quantize": "nf4", "activation_checkpointing": "full"}),
    (2, {"dtype": "float32"}), (2, {"dtype": "float32", "lora_rank": 8}),
    (2, {"dtype": "float32", "sharding": "zero1"}), (2, {"dtype": "float32", "tensor_parallel": 2}),
]  # fmt: skip


def table(tokens: int, gpus: list[int]) -> dict:
    out = {}
    print(f"| GB a rank, {tokens} tokens | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in gpus) + " |")
    print("|---" * (len(gpus) + 1) + "|")
    for name, shape in SHAPES.items():
        for method, flags in METHODS.items():
            totals = []
            for n in gpus:
                settings = PlannerSettings(model=shape, gpus=n, tokens=tokens, sharding="full", tensor_parallel=1,
                                           activation_checkpointing="full", **flags)
                (row,) = planner.compared(settings)
                totals.append(row.peak / 1e9)
            out[f"{name}, {method}"] = dict(zip(map(str, gpus), totals, strict=True))
            print(f"| {name}, {method} | " + " | ".join(f"{total:.0f}" for total in totals) + " |", flush=True)
    return out


def planned(folder: str, ranks: int, given: dict, tokens: int) -> tuple[int, float]:
    """Bytes of states, and at the peak, on a CPU."""
    own = {"dtype", "lora_rank", "quantize", "optimizer"}
    settings = PlannerSettings(model=folder, gpus=ranks, tokens=tokens,
                               **{name: value for name, value in given.items() if name in own})
    sharding = given.get("sharding", "full")
    mesh = mesh_shape(sharding, given.get("tensor_parallel", 1), ranks, ranks)
    job = planner.job_of(settings)
    batch = replace(job.batch, on_gpu=False)
    job = replace(job, batch=batch, step_tokens=tokens * mesh.data_ranks)
    row = Planner(job, Rates.of(settings)).row(
        Scheme(sharding, mesh, given.get("activation_checkpointing", "none")))
    return row.held.total, row.peak


def check(folder: str, tokens: int, chosen: list[int]) -> list[dict]:
    """Real processes take two steps; what the fullest rank holds and held at most, beside the count. `chosen`: which of
    CHECKED, by number; none: all."""
    out = []
    print("| ranks | setting | MB of states: counted | held | peak: counted | measured | off |")
    print("|---" * 7 + "|")
    for ranks, given in [CHECKED[i] for i in chosen] or CHECKED:
        measured = measure(folder, ranks, given, tokens)
        states, peak = planned(folder, ranks, given, tokens)
        out.append({"ranks": ranks, "setting": given, "counted_states": states, "counted_peak": peak} | measured)
        words = ", ".join(f"{name} {value}" for name, value in given.items())
        cells = [f"{value / 1e6:.0f}" for value in (states, measured["states"], peak, measured["peak"])]
        print(f"| {ranks} | {words} | " + " | ".join(cells) + f" | {peak / measured['peak'] - 1:+.0%} |", flush=True)
    return out


def measure(folder: str, ranks: int, given: dict, tokens: int) -> dict:
    """{"states": bytes, "peak": bytes} of the fullest rank of a real run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__,
               "--one_run", json.dumps(given), "--check", folder, "--tokens", str(tokens)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # mallopt(3)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run(folder: str, given: dict, tokens: int) -> None:
    """One rank of a measured run, built by the trainer's own code."""
    torch.set_num_threads(1)
    processes.keep_freed_memory = lambda: None
    settings = TrainingSettings(model=folder, **given).with_recipe(1)
    base = Base.pretrained(folder)
    changes = Changes(settings.quantize, settings.asked_adapter(), settings.train_layers)
    with join(settings.sharding, settings.tensor_parallel) as process:
        before = resident("VmRSS")
        task = SimpleNamespace(base=base, changes=changes)
        plan = SimpleNamespace(dtype=getattr(torch, settings.dtype), saved=None, manifest=None)
        model, optimizer = fsdp_train.build(settings, task, process, plan)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of steps, not of loading, which maps the whole file
        documents = PackedDocuments([min(512, tokens)] * (tokens // min(512, tokens)))
        stream = torch.randint(0, base.config.vocab_size, (tokens,))
        for _ in range(2):
            optimizer.zero_grad()
            model(stream, documents, torch.arange(tokens), stream).backward()
            fsdp_train.gradient_norm(model)
            optimizer.step()
        kept = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        moments = training_state(model, optimizer)["optimizer"]
        held = size(local_slice(tensor)[0] for tensor in (*kept, *moments.values()))
        of_ranks = gather((held, resident("VmHWM") - before))
        if process.is_rank_zero:
            states, peak = max(of_ranks)
            print(json.dumps({"states": states, "peak": peak}), flush=True)


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="in one micro-batch of one rank")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--check", help="a Hugging Face folder to run for real, on ranks of this machine")
    parser.add_argument("--only", type=int, nargs="+", default=[], help="check only these rows, counted from 0")
    parser.add_argument("--one_run", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures to this JSON file")
    args = parser.parse_args()
    if args.one_run:
        return run(args.check, json.loads(args.one_run), args.tokens)
    results = check(args.check, args.tokens, args.only) if args.check else table(args.tokens, args.gpus)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
