"""The accuracy on IMDB beside the way of a notebook that uses transformers, in one run and on one thread.

    python benchmarks/imdb_evaluation.py --model DIR --data_dir DIR                         a Hugging Face folder
    python benchmarks/imdb_evaluation.py --model stories15m --tokenizer FILE --data_dir DIR     random weights

    ours       what `python evaluate.py` runs: packed, the shared instruction computed once, one logit row per review
    unshared   the same, where each review computes the instruction
    notebook   transformers: 32 reviews padded to --max_length, the logits of all tokens, two of the last row compared

The same weights, prompts and answer tokens in bf16. The sides alternate; reviews per second are those of the round with
the fewest seconds of the processor, and answers are compared review by review.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from side_by_side import make_stories15m  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import llama.evaluation.shared_prefix  # noqa: E402
from data import load_data  # noqa: E402
from llama.data.examples import EncodedData  # noqa: E402
from llama.data.sources import DataSettings  # noqa: E402
from llama.evaluation.score import answer_ids, evaluate, sample_indices  # noqa: E402
from llama.parallel.processes import join  # noqa: E402
from llama.storage.base import Base  # noqa: E402
from lora import Changes, open_model  # noqa: E402

Answers = dict[int, int]  # of each review: the index of the likelier word
PADDED_BATCH = 32
NEVER = 1 << 60  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories15m", help="a Hugging Face folder, or stories15m")
    parser.add_argument("--tokenizer", help="a 32,000-piece tokenizer.model for stories15m")
    parser.add_argument("--data_dir", required=True, help="the folder of IMDB")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--reviews", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--output", help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if args.model == "stories15m":
            if not args.tokenizer:
                parser.error("--model stories15m needs --tokenizer, a tokenizer.model with 32,000 pieces")
            make_stories15m(Path(scratch) / "model", Path(args.tokenizer))
            args.model = str(Path(scratch) / "model")
        report(args, *measure(args))


def measure(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Answers], list[int]]:
    """Of each side the seconds of its fastest round and its answers, and the right answers."""
    base = Base.pretrained(args.model, args.max_length)
    settings = DataSettings(data="imdb", data_dir=args.data_dir, max_length=args.max_length)
    found = load_data(settings, base.tokenizer, splits=("test",))
    chosen = sample_indices(len(found.test), args.reviews).tolist()
    words = answer_ids(found.template, base.tokenizer)
    dtype = getattr(torch, args.dtype)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    seconds: dict[str, float] = {}
    answers: dict[str, Answers] = {}
    with join() as process:
        model = open_model(base, Changes(train_layers="none"), process, dtype)

        def ours(least_saved: int) -> Answers:
            llama.evaluation.shared_prefix.LEAST_SAVED = least_saved
            _, scored = evaluate(model, found.test, process, 16, args.reviews, words)
            return {i: int(example.probabilities[1] > example.probabilities[0]) for i, example in scored.items()}

        shares = llama.evaluation.shared_prefix.LEAST_SAVED
        sides: dict[str, Callable[[], Answers]] = {
            "ours": lambda: ours(shares),
            "unshared": lambda: ours(NEVER),
            "notebook": lambda: notebook(theirs, found.test, chosen, words, args.max_length),
        }
        for turn in range(args.rounds):
            for side, run in sides.items():
                began = time.process_time()
                answers[side] = run()
                took = time.process_time() - began
                seconds[side] = min(took, seconds.get(side, took))
                print(f"round {turn + 1} {side}: {took:.2f} s", file=sys.stderr, flush=True)
    return seconds, answers, [int(found.test.answers[i]) for i in chosen]


@torch.no_grad()
def notebook(model, data: EncodedData, chosen: list[int], words: list[int], max_length: int) -> Answers:
    found: Answers = {}
    for start in range(0, len(chosen), PADDED_BATCH):
        part = chosen[start : start + PADDED_BATCH]
        ids = torch.zeros(len(part), max_length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            tokens, is_answer = data[i]
            prompt = torch.from_numpy(tokens[~is_answer].astype("int64"))
            ids[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits
        last = logits[torch.arange(len(part)), mask.sum(-1) - 1]
        found |= zip(part, last[:, words].argmax(-1).tolist(), strict=True)
    return found


def report(args: argparse.Namespace, seconds: dict, answers: dict[str, Answers], right: list[int]) -> None:
    rows = {}
    for side, took in seconds.items():
        given = [answers[side][i] for i in sorted(answers[side])]
        agreed = sum(answers[side][i] == answer for i, answer in answers["ours"].items())
        rows[side] = {
            "reviews_per_second": args.reviews / took,
            "accuracy": sum(a == b for a, b in zip(given, right, strict=True)) / len(right),
            "agrees_with_ours": agreed,
        }
    slowest = rows["notebook"]["reviews_per_second"]
    what = f"{args.reviews} reviews of at most {args.max_length} tokens"
    print(f"{Path(args.model).name}, {args.dtype}, {what}, one thread")
    print("| | reviews/s | x notebook | accuracy | answers as ours |\n|---|---|---|---|---|")
    for side, row in rows.items():
        speed = row["reviews_per_second"]
        print(f"| {side} | {speed:.2f} | {speed / slowest:.2f} | {row['accuracy']:.3f} | {row['agrees_with_ours']} |")
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
