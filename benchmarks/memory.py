"""How much memory fine-tuning takes on each of some GPUs, counted on the meta device: no weights are needed.

    python benchmarks/memory.py                            the table for 7B, 8B, 13B and 70B
    python benchmarks/memory.py --check DIR                the same count beside a measured run of a Hugging Face folder

Counted, per rank: its slices of weights (fp32 where trained, bf16 or packed where frozen), of gradients (fp32) and of
AdamW's moments; two layers and the embedding and head gathered whole in bf16, the gradients of one such unit before
they are reduced, and a linear made whole from its 8 or 4 bits; the inputs of all layers and everything inside one, for
--tokens tokens a rank under --activation_checkpointing full; and three fp32 copies of the logits of 512 rows.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from llama.boundary.untrusted import read_json
from llama.model import ModelConfig
from llama.model.loss import CHUNK
from llama.model.quantize import KINDS
from llama.parallel.distribute import keep_frozen_in, on_meta
from llama.storage.base import config_from_json
from llama.storage.peft import Adapter
from llama.training.optim import build_adamw
from llama.training.state import training_state
from lora import Changes

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "Llama 2 7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama 3 8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama 2 13B": (5120, 13824, 40, 40, 40, 32000),
    "Llama 2 70B": (8192, 28672, 80, 64, 8, 32000),
}
RANK = 8
METHODS = ("full", "full, adamw8bit", "LoRA", "LoRA, int8", "LoRA, nf4")


def config_of(shape: tuple[int, ...]) -> ModelConfig:
    D, F, layers, heads, kv, V = shape
    return ModelConfig(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=kv, head_dim=D // heads)


def changes_of(method: str) -> Changes:
    kind = next((kind for kind in KINDS if kind in method), "none")
    return Changes(kind, Adapter(RANK, 16.0) if "LoRA" in method else None)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def count(c: ModelConfig, method: str, ranks: int, tokens: int) -> dict[str, float]:
    """Bytes per rank, by what they are for. Not all of it is needed at the same moment: a little too much."""
    model = on_meta(c)
    changes_of(method).apply(model)
    keep_frozen_in(torch.bfloat16, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_adamw(model, 1e-4, 0.0, kind="adamw8bit" if "adamw8bit" in method else "adamw")
    root = [p for name, p in model.named_parameters() if not name.startswith("layers.")]
    layer = list(model.layers[0].parameters())
    units = [root, layer, layer]
    # FSDP copies and casts what it gathers even on one rank, but for what is frozen there; it reduces in fp32.
    gathered = sum(p.numel() * min(p.itemsize, 2) for unit in units for p in unit if ranks > 1 or p.requires_grad)
    unreduced = (2 + 4) * max(sum(p.numel() for p in unit if p.requires_grad) for unit in units)
    dequantised = {"int8": 4, "nf4": 6}.get(method[-4:].strip(), 0) * c.hidden_size * c.intermediate_size
    inside = 2 * (8 * c.hidden_size + 4 * c.intermediate_size + 2 * c.num_key_value_heads * c.head_dim)
    return {
        "weights": size(model.parameters()) / ranks, "gradients": 4 * sum(p.numel() for p in trained) / ranks,
        "moments": size(training_state(model, optimizer)["optimizer"].values()) / ranks,
        "gathered": gathered + unreduced + dequantised,
        "activations": tokens * (2 * c.hidden_size * c.num_hidden_layers + inside),
        "logits": 3 * 4 * min(CHUNK, tokens) * c.vocab_size,
    }


def table(tokens: int, gpus: list[int]) -> dict:
    out = {}
    print(f"| GB a rank, {tokens} tokens | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in gpus) + " |")
    print("|---" * (len(gpus) + 1) + "|")
    for name, shape in SHAPES.items():
        for method in METHODS:
            totals = [sum(count(config_of(shape), method, n, tokens).values()) / 1e9 for n in gpus]
            out[f"{name}, {method}"] = dict(zip(map(str, gpus), totals, strict=True))
            print(f"| {name}, {method} | " + " | ".join(f"{total:.0f}" for total in totals) + " |", flush=True)
    return out


def check(folder: str, tokens: int) -> dict:
    """A real process takes two steps; what it holds and held at most, beside the count."""
    out = {}
    print("| MB | states counted | states held | peak counted | peak measured |\n|---|---|---|---|---|")
    for method in METHODS:
        command = [sys.executable, __file__, "--run", method, "--check", folder, "--tokens", str(tokens)]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                                             env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout.splitlines()[-1])
        counted = count(config_from_json(read_json(folder, "config.json")), method, 1, tokens)
        states = counted["weights"] + counted["gradients"] + counted["moments"]
        out[method] = measured | {"counted_states": states, "counted_peak": sum(counted.values())}
        row = (states, measured["states"], sum(counted.values()), measured["peak"])
        print(f"| {method} | " + " | ".join(f"{value / 1e6:.0f}" for value in row) + " |", flush=True)
    return out


def run(folder: str, method: str, tokens: int) -> None:
    from llama.model import PackedDocuments
    from llama.parallel.distribute import distribute
    from llama.parallel.processes import join
    from llama.parallel.shards import local_slice
    from llama.storage.base import Base

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024

    torch.set_num_threads(1)
    base, changes = Base.pretrained(folder), changes_of(method)
    with join() as process:
        before = resident("VmRSS")
        model = on_meta(base.config)
        changes.apply(model)
        distribute(model, process, torch.bfloat16, activation_checkpointing="full")
        base.load(model)
        changes.load(model)
        optimizer = build_adamw(model, 1e-4, 0.0, kind="adamw8bit" if "adamw8bit" in method else "adamw")
        documents = PackedDocuments([512] * (tokens // 512))
        stream = torch.randint(0, base.config.vocab_size, (tokens,))
        for _ in range(2):
            model(stream, documents, torch.arange(tokens), stream).backward()
            optimizer.step()
        kept = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        moments = training_state(model, optimizer)["optimizer"]
        held = size(local_slice(tensor)[0] for tensor in (*kept, *moments.values()))
        print(json.dumps({"states": held, "peak": resident("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="in one micro-batch of one rank")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--check", help="a Hugging Face folder to run for real, on one process of this machine")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures to this JSON file")
    args = parser.parse_args()
    if args.run:
        return run(args.check, args.run, args.tokens)
    results = check(args.check, args.tokens) if args.check else table(args.tokens, args.gpus)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
