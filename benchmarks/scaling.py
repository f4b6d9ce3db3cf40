"""Bytes that each setting sends in one optimizer step, counted, beside the formulas that planner.py uses.

    python benchmarks/scaling.py                         the table, 1, 2 and 4 ranks of this machine
    python benchmarks/scaling.py --output FILE           and the figures as JSON

Real ranks (gloo) take real steps of a small Llama with the trainer's own code. Every collective that reaches c10d is
seen by its dispatcher, those of FSDP and of the backward, too. Counted: the bytes that are gathered, reduced and
scattered, or reduced. Sent: by a ring, (n - 1) / n of them, twice that for an all-reduce.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import fsdp_train
from llama.data.batches import deal, pack
from llama.model import ModelConfig
from llama.parallel.distribute import keep_frozen_in, on_meta
from llama.parallel.mesh import DIMENSIONS, MeshShape, mesh_shape
from llama.parallel.processes import Process, join
from llama.parallel.scheme import Scheme, fullest_tensor_rank
from llama.parallel.shards import local_slice
from llama.parallel.traffic import Message, messages
from llama.storage.peft import Adapter
from llama.training.settings import TrainingSettings
from lora import Changes

SHAPE = ModelConfig(vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
                    num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=512)
TOKENS = 128  # of an example
EXAMPLES = 4  # in a micro-batch
KINDS = {  # operators of c10d: which of their arguments has all the bytes, and what they are
    "_allgather_base_": (0, "all_gather"), "allgather_": (0, "all_gather"),
    "_reduce_scatter_base_": (1, "reduce_scatter"),
    "allreduce_": (0, "all_reduce"), "allreduce_coalesced_": (0, "all_reduce"), "broadcast_": (0, "broadcast"),
}
SETTINGS = {
    1: ({"sharding": "full"},),
    2: (
        {"sharding": "none"}, {"sharding": "zero1"}, {"sharding": "grad"}, {"sharding": "full"},
        {"sharding": "full", "dtype": "float32"}, {"sharding": "full", "tensor_parallel": 2},
        {"sharding": "full", "activation_checkpointing": "full"},
        {"sharding": "full", "gradient_accumulation_steps": 4},
        {"sharding": "full", "gradient_accumulation_steps": 4, "defer_gradient_sync": True},
        {"sharding": "grad", "gradient_accumulation_steps": 4},
        {"sharding": "grad", "gradient_accumulation_steps": 4, "defer_gradient_sync": True},
        {"sharding": "none", "gradient_accumulation_steps": 4},
        {"sharding": "zero1", "gradient_accumulation_steps": 4},
    ),
    4: (
        {"sharding": "none"}, {"sharding": "zero1"}, {"sharding": "grad"}, {"sharding": "full"},
        {"sharding": "hybrid"}, {"sharding": "hybrid", "gradient_accumulation_steps": 4},
        {"sharding": "full", "tensor_parallel": 2}, {"sharding": "zero1", "tensor_parallel": 2},
        {"sharding": "full", "tensor_parallel": 4},
        {"sharding": "full", "tensor_parallel": 2, "activation_checkpointing": "full"},
        {"sharding": "full", "tensor_parallel": 2, "gradient_accumulation_steps": 4},
        {"sharding": "full", "lora_rank": 8}, {"sharding": "none", "lora_rank": 8},
        {"sharding": "full", "lora_rank": 8, "quantize": "nf4"},
        {"sharding": "full", "tensor_parallel": 2, "lora_rank": 8},
        {"sharding": "full", "tensor_parallel": 2, "lora_rank": 8, "activation_checkpointing": "full"},
        {"sharding": "full", "train_layers": "last:2,norm,lm_head"},
        {"sharding": "full", "tensor_parallel": 2, "train_layers": "last:2,norm,lm_head"},
        {"sharding": "zero1", "tensor_parallel": 2, "train_layers": "norm,lm_head"},
    ),
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Bytes of all collectives inside it, by kind and by the ranks of their group: {(kind, (0, 1)): bytes}."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        room, _, operator = func._schema.name.partition("::")
        if room in ("c10d", "_c10d_functional") and operator != "barrier":
            place, kind = KINDS[operator]  # a KeyError names an operator that nobody has counted yet
            ranks = tuple(dist.get_process_group_ranks(_group(args)))
            if len(ranks) > 1:
                self.bytes[kind, ranks] += sum(tensor.numel() * tensor.itemsize for tensor in _flat(args[place]))
        return func(*args, **(kwargs or {}))


def _group(args: tuple) -> dist.ProcessGroup:
    objects = [a for a in args if isinstance(a, torch.ScriptObject)]
    (group,) = (a for a in objects if "ProcessGroup" in str(a._type()))
    return dist.ProcessGroup.unbox(group)


def _flat(tensors):
    """The tensors of lists of lists, or one tensor."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for inner in tensors for tensor in _flat(inner)]


class Data:
    """Examples of random tokens, all of them labels except for the first."""

    def __init__(self, count: int):
        self.lengths = np.full(count, TOKENS)
        self.label_counts = self.lengths - 1
        self.tokens = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (count, TOKENS), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int):
        return self.tokens[i], np.arange(TOKENS) > 0


def mesh_process(given: dict, node_ranks: int) -> Process:
    """This process in the mesh of a setting; two nodes are made out where it asks for them."""
    shape = mesh_shape(given["sharding"], given.get("tensor_parallel", 1), dist.get_world_size(), node_ranks)
    return Process(dist.get_rank(), dist.get_world_size(), torch.device("cpu"),
                   init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Some numbers in each rank's slices: what is sent does not depend on them."""
    for parameter in model.parameters():
        local = local_slice(parameter)[0]
        if local.is_floating_point():
            local.normal_(std=0.02)
        else:
            local.fill_(1)


def job_of(given: dict, process: Process, micro_batches: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """What the trainer's `build` and `train_step` ask for, with random weights and data."""
    settings = TrainingSettings(model="small", **given).with_recipe(process.world_size)
    adapter = Adapter(settings.lora_rank, 16.0) if settings.lora_rank else None
    changes = Changes(settings.quantize, adapter, settings.train_layers)
    parts = process.data_ranks * micro_batches
    data = Data(parts * EXAMPLES)
    base = SimpleNamespace(config=SHAPE, load=fill)
    schedule = SimpleNamespace(micro_batches=lambda step: deal(list(range(len(data))), data.lengths, parts, EXAMPLES))
    plan = SimpleNamespace(schedule=schedule, dtype=getattr(torch, settings.dtype), saved=None, manifest=None)
    task = SimpleNamespace(base=base, changes=changes, examples=data, data=SimpleNamespace(test=None), words=None)
    return SimpleNamespace(settings=settings, process=process, task=task, plan=plan), changes


def formula(given: dict, process: Process, changes: Changes, micro_batches: int) -> list[Message]:
    dtype = getattr(torch, given["dtype"])
    model = on_meta(fullest_tensor_rank(SHAPE, process.tensor_ranks))
    changes.apply(model)
    keep_frozen_in(dtype, model)
    scheme = Scheme(given["sharding"], MeshShape(*process.mesh.shape), given.get("activation_checkpointing", "none"),
                    micro_batches, given.get("defer_gradient_sync", False))
    batch = pack(Data(EXAMPLES), range(EXAMPLES))
    return messages(model, scheme, len(batch.tokens), dtype, len(batch.rows))


def measure(given: dict, steps: int) -> dict:
    """One step counted, then some timed. Collective; the figures are this rank's."""
    given = {"dtype": "bfloat16"} | given
    nodes = 2 if given["sharding"] == "hybrid" else 1
    process = mesh_process(given, dist.get_world_size() // nodes)
    micro_batches = given.get("gradient_accumulation_steps", 1)
    run, changes = job_of(given, process, micro_batches)
    run.model, optimizer = fsdp_train.build(run.settings, run.task, process, run.plan)
    run.model.train()

    def step(number: int) -> None:
        fsdp_train.train_step(run, number)
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    with Counted() as counted:
        step(1)
    seconds = []
    for number in range(2, 2 + steps):
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
    members = {name: tuple(dist.get_process_group_ranks(process.mesh.get_group(name))) for name in DIMENSIONS}
    members["world"] = tuple(range(process.world_size))
    expected = Counter()
    for message in formula(given, process, changes, micro_batches):
        expected[message.kind, members[message.over]] += message.moved
    by_kind = {kind: [sum(n for (k, _), n in found.items() if k == kind) for found in (counted.bytes, expected)]
               for kind in sorted({kind for kind, _ in (*counted.bytes, *expected)})}
    return {
        "by_kind": by_kind,
        "sent": sent(counted.bytes), "sent_by_formula": sent(expected),
        "differences": {f"{kind} {ranks}": counted.bytes[kind, ranks] - expected[kind, ranks]
                        for kind, ranks in {*counted.bytes, *expected}
                        if counted.bytes[kind, ranks] != expected[kind, ranks]},
        "ms": 1e3 * float(np.median(seconds)) if seconds else None,
    }


def sent(found: Counter) -> float:
    return sum((2 if kind == "all_reduce" else 1) * count * (len(ranks) - 1) / len(ranks)
               for (kind, ranks), count in found.items())


def work(steps: int) -> None:
    """One of several ranks: takes all settings for this number of ranks, one after the other."""
    torch.set_num_threads(1)
    with join() as process:
        for given in SETTINGS[process.world_size]:
            result = measure(given, steps)
            if process.is_rank_zero:
                print(json.dumps({"ranks": process.world_size, "setting": given} | result), flush=True)


def name_of(given: dict) -> str:
    words = [given["sharding"]]
    words += [f"{key} {value}" for key, value in given.items() if key != "sharding"]
    return ", ".join(words).replace("gradient_accumulation_steps", "micro-batches").replace(" True", "")


def table(results: list[dict]) -> str:
    psi = sum(p.numel() for p in on_meta(SHAPE).parameters())
    head = ("ranks", "setting", "all-gather MB", "reduce-scatter MB", "all-reduce MB", "sent MB", "formula MB",
            "difference", "sent, bytes a weight", "ms a step")  # fmt: skip
    lines = [f"Psi = {psi:,} weights; a micro-batch has {TOKENS * EXAMPLES} tokens", f"| {' | '.join(head)} |",
             "|---" * len(head) + "|"]
    for row in results:
        kinds = [row["by_kind"].get(kind, [0])[0] for kind in ("all_gather", "reduce_scatter", "all_reduce")]
        cells = [f"{count / 1e6:.3f}" for count in (*kinds, row["sent"], row["sent_by_formula"])]
        cells.append(str(row["differences"] or "0"))
        cells += [f"{row['sent'] / psi:.2f}", f"{row['ms']:.0f}" if row["ms"] else "-"]
        lines.append(f"| {row['ranks']} | {name_of(row['setting'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each setting")
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.steps)
    results = []
    for ranks in args.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
                   __file__, "--work", "--steps", str(args.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        results += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(table(results))
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
