"""A LoRA step of this project beside peft under transformers' Trainer, in one run: rank 8 on all seven linears.

    python benchmarks/lora.py --model DIR --data_dir alpaca.jsonl

    ours            what `python fsdp_train.py --lora_rank 8` runs: bf16 base, fp32 adapters, packed, logits for labels
    ours-checkpointed   the same with --activation_checkpointing full
    ours-single     the same in micro-batches of one example
    ours-compile    the same with --compile
    trainer-fast    peft and Trainer, bf16 base, micro-batches of one example (so without padding)
    trainer-like    peft and Trainer, fp32 base under bf16 autocast, 16 examples padded to the longest
    trainer-padded  peft and Trainer, bf16 base, 16 examples padded to the longest
"""

from side_by_side import main

SIDES = ("ours", "ours-checkpointed", "ours-single", "ours-compile", "trainer-fast", "trainer-like", "trainer-padded")

if __name__ == "__main__":
    main(__doc__, "alpaca", SIDES, lora_rank=8)
