"""A training step of this project beside one of transformers' Trainer: what benchmarks/imdb.py and lora.py share.

Same weights, same encoded examples (real lengths, up to --max_length tokens), same global batch of 16, AdamW, clipping
at 1. Every measurement is a fresh process on one thread; the sides alternate, and medians over all steps are shown.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
BATCH, SEED, WARM_UP = 16, 0, 1


def main(doc: str, data: str, sides: tuple[str, ...], lora_rank: int = 0) -> None:
    """`sides`: of ours, ours-single, ours-compile, ours-checkpointed, trainer-fast, trainer-padded, trainer-like."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories15m", help="a Hugging Face folder, or stories15m")
    parser.add_argument("--tokenizer", help="a 32,000-piece tokenizer.model for stories15m")
    parser.add_argument("--data_dir", required=True, help=f"where {data} is: a folder, or its file")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per side")
    parser.add_argument("--sides", default=",".join(sides))
    parser.add_argument("--output", help="write the table's figures to this JSON file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data, args.lora_rank = data, lora_rank
    if args.side:
        print(json.dumps(measure(args)))
        return
    if args.model == "stories15m" and not args.tokenizer:
        parser.error("--model stories15m needs --tokenizer, a tokenizer.model with 32,000 pieces")
    with tempfile.TemporaryDirectory() as scratch:
        if args.model == "stories15m":
            make_stories15m(Path(scratch) / "model", Path(args.tokenizer))
            args.model = str(Path(scratch) / "model")
        results = {side: [] for side in args.sides.split(",")}
        for turn in range(args.rounds):
            for side in results:
                results[side].append(in_fresh_process(args, side))
                print(f"round {turn + 1} {side}: {results[side][-1]}", file=sys.stderr, flush=True)
        report(args, results, matmul_peak())


def in_fresh_process(args: argparse.Namespace, side: str) -> dict:
    command = [sys.executable, sys.argv[0], "--side", side, "--model", args.model, "--max_length", str(args.max_length),
               "--steps", str(args.steps), "--data_dir", args.data_dir]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """One side's seconds per step, and the most memory its process ever held."""
    import torch

    torch.set_num_threads(1)
    from data import load_data
    from llama.data.batches import Schedule
    from llama.data.sources import DataSettings
    from llama.storage.base import Base

    settings = DataSettings(data=args.data, data_dir=args.data_dir, max_length=args.max_length, skip_bad_rows=True)
    base = Base.pretrained(args.model)
    data = load_data(settings, base.tokenizer).train
    schedule = Schedule(data.lengths, 1.0, 1, BATCH, seed=SEED)
    batches = [schedule.micro_batches(step)[0] for step in range(WARM_UP + args.steps)]
    run = ours if args.side.startswith("ours") else trainer
    seconds = run(args, data, batches)[WARM_UP:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    timed = batches[WARM_UP:]
    return {
        "seconds": seconds, "tokens": [int(data.lengths[b].sum()) for b in timed], "peak_memory_bytes": peak,
        "flops": [flops(base.config, data.lengths[b], int(data.label_counts[b].sum()),
                        bool(args.lora_rank)) for b in timed],
    }


def flops(config, lengths, labels: int, frozen: bool) -> float:
    """Floating-point operations one training step of these examples needs: 6 per weight of a linear layer and token (4
    where it is frozen; adapters are not counted), 12 per pair of positions that attend, head and feature; the
    vocabulary for labels alone."""
    H, N, K = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    layer = config.hidden_size * (2 * N * H + 2 * K * H + 3 * config.intermediate_size)
    each = 4 if frozen else 6
    linear = each * config.num_hidden_layers * layer * int(lengths.sum())
    attention = 12 * config.num_hidden_layers * N * H * int((lengths * (lengths + 1) // 2).sum())
    return float(linear + attention + each * config.hidden_size * config.vocab_size * labels)


def ours(args: argparse.Namespace, data, batches: list[list[int]]) -> list[float]:
    from types import SimpleNamespace

    import torch

    import fsdp_train
    from llama.parallel.processes import join
    from llama.storage.base import Base
    from llama.storage.peft import Adapter
    from llama.training.settings import TrainingSettings
    from lora import Changes

    settings = TrainingSettings(
        compile=args.side == "ours-compile", max_length=args.max_length, batch_size=BATCH,
        activation_checkpointing="full" if args.side == "ours-checkpointed" else "none", seed=SEED,
    ).with_recipe(1)  # fmt: skip
    changes = Changes(adapter=Adapter(args.lora_rank, 16.0) if args.lora_rank else None)
    task = SimpleNamespace(base=Base.pretrained(args.model), changes=changes, examples=data)
    single = args.side == "ours-single"
    schedule = SimpleNamespace(micro_batches=lambda step: [[i] for i in batches[step]] if single else [batches[step]])
    plan = SimpleNamespace(schedule=schedule, dtype=torch.bfloat16, saved=None)
    seconds = []
    with join() as process:
        model, optimizer = fsdp_train.build(settings, task, process, plan)
        current = SimpleNamespace(settings=settings, task=task, process=process, plan=plan, model=model)
        for step in range(len(batches)):
            began = time.perf_counter()
            fsdp_train.train_step(current, step)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
    return seconds


def trainer(args: argparse.Namespace, data, batches: list[list[int]]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    fast, like = args.side == "trainer-fast", args.side == "trainer-like"
    dtype = torch.float32 if like else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model.config.use_cache = False
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=16, target_modules="all-linear",
                                                 lora_dropout=0.0, task_type="CAUSAL_LM"))

    def example(i: int) -> dict:
        ids, is_answer = data[i]
        return {"input_ids": ids.tolist(), "labels": [t if a else -100 for t, a in zip(ids.tolist(), is_answer.tolist(),
                                                                                       strict=True)]}

    def collate(rows: list[dict]) -> dict:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "labels": -100}
        batch = {name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
                 for name, value in fill.items()}
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return batch | {"attention_mask": torch.tensor(mask)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        seconds, began = [], 0.0

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch, per_device_train_batch_size=1 if fast else BATCH, gradient_accumulation_steps=BATCH if fast else 1,
            max_steps=len(batches), learning_rate=2e-5, lr_scheduler_type="constant", max_grad_norm=1.0, bf16=like,
            use_cpu=True, save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, optim="adamw_torch_fused", remove_unused_columns=False,
        )
        clock = Clock()
        InOrder(model, settings, train_dataset=[example(i) for batch in batches for i in batch], data_collator=collate,
                callbacks=[clock]).train()
    return clock.seconds


def make_stories15m(folder: Path, tokenizer: Path) -> None:
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
                         num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True, bos_token_id=1,
                         eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.model")


def matmul_peak() -> float:
    """The machine's best bf16 matrix product on one thread, in operations per second, measured here and now."""
    code = ("import torch, time; torch.set_num_threads(1); n = 2048\n"
            "a, b = (torch.randn(n, n, dtype=torch.bfloat16) for _ in range(2)); best = 0\n"
            "for _ in range(12):\n    t = time.perf_counter(); a @ b\n"
            "    best = max(best, 2 * n**3 / (time.perf_counter() - t))\nprint(best)")
    out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, text=True,
                         stdout=subprocess.PIPE).stdout
    return float(out)


def report(args: argparse.Namespace, results: dict[str, list[dict]], peak: float) -> None:
    import torch
    import transformers

    rows = {}
    for side, processes in results.items():
        step = [(s, t, f) for p in processes for s, t, f in zip(p["seconds"], p["tokens"], p["flops"], strict=True)]
        rows[side] = {
            "examples_per_second": statistics.median(BATCH / s for s, _, _ in step),
            "tokens_per_second": statistics.median(t / s for s, t, _ in step),
            "matmul_peak_fraction": statistics.median(f / s for s, _, f in step) / peak,
            "peak_memory_bytes": max(p["peak_memory_bytes"] for p in processes), "steps": len(step),
        }
    base = rows.get("trainer-fast", {}).get("examples_per_second")
    print(f"\n{args.data}, {Path(args.model).name}, lora_rank {args.lora_rank}; "
          f"torch {torch.__version__}, transformers {transformers.__version__}, one thread, matmul peak "
          f"{peak / 1e9:.0f} GFLOP/s in bf16; {next(iter(rows.values()))['steps']} steps of {BATCH} examples a side")
    print("| | examples/s | x trainer-fast | tokens/s | of matmul peak | peak memory |\n|---|---|---|---|---|---|")
    for side, row in rows.items():
        ratio = f"{row['examples_per_second'] / base:.2f}" if base else "-"
        print(f"| {side} | {row['examples_per_second']:.2f} | {ratio} | {row['tokens_per_second']:.0f} | "
              f"{row['matmul_peak_fraction']:.0%} | {row['peak_memory_bytes'] / 1e9:.2f} GB |")
    if args.output:
        Path(args.output).write_text(json.dumps({"matmul_peak": peak, "sides": rows}, indent=2) + "\n")

