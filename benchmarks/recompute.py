"""What --activation_checkpointing keeps and costs: memory held after the forward, CPU seconds of forward and backward.

    python benchmarks/recompute.py --tokens 1024

Each way runs in a process of its own, on one thread, one after another; documents of 512 tokens, a label for each 8th.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from llama.model import Llama, ModelConfig, PackedDocuments
from llama.parallel.recompute import recompute_activations
from llama.storage.pretrained import initialize_weights

SHAPES = {
    "15M": ModelConfig(vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
                       num_attention_heads=6, num_key_value_heads=6, head_dim=48, tie_word_embeddings=True),
    "SmolLM2": ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                           num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True),
}  # fmt: skip


def resident_megabytes() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def measure(shape: str, dtype: torch.dtype, kind: str, tokens: int) -> tuple[float, float]:
    """Megabytes that the first forward leaves behind for the backward, and the seconds of the faster of two steps."""
    model = Llama(SHAPES[shape])
    initialize_weights(model, seed=0)
    model.to(dtype)
    for layer in model.layers:
        recompute_activations(layer, kind)
    ids, rows = torch.arange(tokens), torch.arange(0, tokens, 8)
    documents = PackedDocuments([512] * (tokens // 512))
    before = resident_megabytes()
    loss = model(ids, documents, rows, ids[rows])
    held = resident_megabytes() - before
    loss.backward()
    seconds = []
    for _ in range(2):
        model.zero_grad()
        began = time.thread_time()
        model(ids, documents, rows, ids[rows]).backward()
        seconds.append(time.thread_time() - began)
    return held, min(seconds)


def in_a_process_of_its_own(*arguments) -> tuple[float, float]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, " ".join(map(str, measure(*arguments))).encode())
        os._exit(0)
    os.close(writer)
    held, seconds = os.read(reader, 100).split()
    return float(held), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="a multiple of 512")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for shape in args.shapes.split(","):
        for dtype in (torch.float32, torch.bfloat16):
            none = in_a_process_of_its_own(shape, dtype, "none", args.tokens)
            for kind in ("none", "selective", "full"):
                held, seconds = none if kind == "none" else in_a_process_of_its_own(shape, dtype, kind, args.tokens)
                ratios = f"{held / none[0]:.2f}, {seconds / none[1]:.2f}"
                print(f"{shape} {dtype} {kind}: {held:.0f} MB, {seconds:.2f} s; of none's {ratios}", flush=True)


if __name__ == "__main__":
    main()
