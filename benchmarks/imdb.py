"""This project beside transformers' Trainer on the IMDB job, in one run.

    python benchmarks/imdb.py --model DIR --data_dir DIR                             a Hugging Face folder
    python benchmarks/imdb.py --model stories15m --tokenizer FILE --data_dir DIR     random weights of that shape

    ours            what `python fsdp_train.py` runs: fp32 weights, bf16 compute, packed, one logit row per review
    ours-compile    the same with --compile
    trainer-fast    Trainer, bf16 weights, micro-batches of one review (so without padding): the fastest it gets here
    trainer-like    Trainer, fp32 weights under bf16 autocast, 16 reviews padded to the longest: the same arithmetic
"""

from side_by_side import main

if __name__ == "__main__":
    main(__doc__, "imdb", ("ours", "ours-compile", "trainer-fast", "trainer-like"))
