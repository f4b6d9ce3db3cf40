"""The names that flags offer for what torch code does, apart from that code: --help must not wait for torch."""

QUANTIZED = ("int8", "nf4")  # llama/model/quantize.py
ALL_LINEAR = "all-linear"  # PEFT's name for all linears of the decoder layers
ADAPTER_VARIANTS = ("lora", "rslora", "dora")  # lora.py
LARGEST_RANK = 1 << 16
SCHEDULES = ("constant", "linear", "cosine")  # llama/training/optim.py
OPTIMIZERS = ("adamw", "adamw8bit")
CHECKPOINTINGS = ("none", "full", "selective")  # llama/parallel/recompute.py
SHARDINGS = ("full", "grad", "hybrid", "zero1", "none")  # llama/parallel/mesh.py
