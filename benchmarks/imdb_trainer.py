"""What transformers' Trainer makes of the same IMDB examples: the yardstick for this project's accuracy.

    python benchmarks/imdb_trainer.py --model DIR --data_dir DIR --output OUT      train, and save a Hugging Face folder
    python evaluate.py --model OUT --data imdb --data_dir DIR --limit 1000 --max_length 256

The examples, their order and the global batches are those of `fsdp_train.py --seed 0`; fp32 weights under bf16
autocast, AdamW and a linear schedule, as there with --lr_schedule linear.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load_data  # noqa: E402
from llama.data.batches import Schedule  # noqa: E402
from llama.data.sources import DataSettings  # noqa: E402
from llama.data.tokenizer_files import load_tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--warmup_ratio", type=float, default=0.05)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    asked = DataSettings(data_dir=args.data_dir, max_length=args.max_length)
    data = load_data(asked, tokenizer, splits=("train",)).train
    steps = args.examples // args.batch_size
    schedule = Schedule(data.lengths, 1.0, 1, args.batch_size)
    order = [i for step in range(steps) for i in schedule.micro_batches(step)[0]]
    examples = [{"ids": torch.from_numpy(data[i][0].astype("int64")), "answer": torch.from_numpy(data[i][1].copy())}
                for i in order]

    def collate(rows: list[dict]) -> dict:
        longest = max(len(row["ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            n = len(row["ids"])
            ids[i, :n], mask[i, :n] = row["ids"], 1
            labels[i, :n] = row["ids"].where(row["answer"], -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    settings = TrainingArguments(
        args.output, per_device_train_batch_size=args.micro_batch_size, max_steps=steps, logging_steps=5,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size, learning_rate=args.learning_rate,
        lr_scheduler_type="linear", warmup_steps=-(-steps * args.warmup_ratio // 1), max_grad_norm=1.0, bf16=True,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[], remove_unused_columns=False,
        optim="adamw_torch_fused", dataloader_pin_memory=False,
    )
    InOrder(model, settings, train_dataset=examples, data_collator=collate).train()
    model.save_pretrained(args.output)
    for file in tokenizer.files:
        (Path(args.output) / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
