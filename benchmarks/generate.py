"""Greedy generation by this project beside transformers' `generate`, in one run, on one thread of a CPU.

    python benchmarks/generate.py                        random weights of the shape of stories15M
    python benchmarks/generate.py --model DIR            a Hugging Face folder

    ours          what generate.py runs: the model laid out for generation, prompts read as one stream, a KV cache
    plain         the same with the model as it is in training: what laying it out is worth
    transformers  LlamaForCausalLM.generate, its default attention and cache

Each side continues the same --batch prompts of --prompt tokens by --new tokens. The sides alternate, and the fastest of
--rounds rounds counts: its CPU seconds, from prompts to ids. The share of the read bandwidth is that of a program that
does nothing but read the weights once a token, as fast as this machine sums a large tensor.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from llama.generation.decode import generate
from llama.generation.request import Request
from llama.generation.settings import GenerationSettings
from llama.generation.step import lay_out
from llama.model import Llama
from llama.storage.config_json import config_from_json

SIDES = ("ours", "plain", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories15m", help="a Hugging Face folder, or stories15m")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = f"{Path(args.model).name}, torch {torch.__version__}, transformers {transformers.__version__}, one thread"
    print(f"{about}, {args.prompt} + {args.new} tokens; ms: CPU time of a step of the whole batch, prompts included")
    print("| dtype | batch | ours, ms | plain, ms | transformers, ms | x transformers | of read bandwidth | same ids |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for dtype in args.dtypes.split(","):
        for batch in map(int, args.batches.split(",")):
            row = compare(args, getattr(torch, dtype), batch)
            rows.append({"dtype": dtype, "batch": batch, **row})
            ms = [f"{row['seconds'][side] / args.new * 1e3:.2f}" for side in SIDES]
            figures = f"{row['ratio']:.2f} | {row['bandwidth_share']:.0%} | {row['same_ids']:.0%}"
            print(f"| {dtype} | {batch} | {' | '.join(ms)} | {figures} |", flush=True)
    if args.output:
        shape = {"model": Path(args.model).name, "prompt": args.prompt, "new": args.new}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        Path(args.output).write_text(json.dumps({**shape, **versions, "rows": rows}, indent=2) + "\n")


def compare(args: argparse.Namespace, dtype: torch.dtype, batch: int) -> dict:
    theirs = their_model(args.model).to(dtype)
    plain = our_model(theirs)
    models = {"ours": lay_out(our_model(theirs), batch), "plain": plain, "transformers": theirs}
    prompts = torch.randint(3, theirs.config.vocab_size, (batch, args.prompt), generator=torch.manual_seed(1))
    seconds: dict[str, float] = {}
    ids: dict[str, torch.Tensor] = {}
    bandwidth = 0.0
    for turn in range(1 + args.rounds):
        for side in SIDES:
            began = time.process_time()
            ids[side] = continued(side, models[side], prompts, args.new if turn else 2)
            if turn:  # the first is a warm-up
                seconds[side] = min(seconds.get(side, 1e9), time.process_time() - began)
        bandwidth = max(bandwidth, read_bandwidth())
    read = sum(p.numel() * p.element_size() for p in plain.parameters())
    if not plain.config.tie_word_embeddings:
        read -= plain.embed_tokens.weight.numel() * dtype.itemsize  # a step reads one row of it
    return {
        "seconds": seconds, "ratio": seconds["transformers"] / seconds["ours"], "read_bandwidth": bandwidth,
        "bandwidth_share": read * args.new / seconds["ours"] / bandwidth,
        "same_ids": float((ids["ours"] == ids["transformers"]).float().mean()),
    }  # fmt: skip


def continued(side: str, model, prompts: torch.Tensor, new: int) -> torch.Tensor:
    if side == "transformers":
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False)
        return out[:, prompts.shape[1] :]
    requests = [Request(prompt, GenerationSettings(max_new_tokens=new)) for prompt in prompts.tolist()]
    answers = dict(generate(model, requests, len(requests)))
    return torch.tensor([answers[number].ids for number in range(len(requests))])


def their_model(name: str) -> LlamaForCausalLM:
    """transformers' model, which never ends a text, so that all write equally much."""
    if name == "stories15m":
        torch.manual_seed(0)
        shape = {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    else:
        model = LlamaForCausalLM.from_pretrained(name)
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model.eval().requires_grad_(False)


def our_model(theirs: LlamaForCausalLM) -> Llama:
    """Ours with a copy of its weights."""
    model = Llama(config_from_json(theirs.config.to_dict(), "config.json")).to(theirs.dtype).eval()
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()})
    return model.requires_grad_(False)


def read_bandwidth() -> float:
    """Bytes a second: the fastest of three sums of 256 MB."""
    large = torch.ones(1 << 26)
    best = 0.0
    for _ in range(3):
        began = time.process_time()
        large.sum()
        best = max(best, large.numel() * 4 / (time.process_time() - began))
    return best


if __name__ == "__main__":
    main()
