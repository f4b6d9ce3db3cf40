"""The flags of planner.py."""

from dataclasses import dataclass, field, fields
from typing import Any

from llama.boundary.choices import CHECKPOINTINGS, SHARDINGS
from llama.boundary.records import Settings, setting
from llama.training.settings import TrainingSettings

DATA_SHEET = {"bfloat16": 989.0, "float32": 67.0}  # TFLOP/s of an H100


def as_in_training(name: str) -> Any:
    """A flag of fsdp_train.py, with the same default, meaning and range."""
    (entry,) = (entry for entry in fields(TrainingSettings) if entry.name == name)
    return field(default=entry.default, metadata=entry.metadata)


@dataclass(frozen=True, kw_only=True)
class WhatToPlan(Settings):
    """what to train"""

    model: str = setting(help="tiny, 1b, 7b, 8b, 13b, 70b, llama3-70b, or a folder, of which config.json is read")
    quantize: str = as_in_training("quantize")
    train_layers: str = as_in_training("train_layers")
    lora_rank: int = as_in_training("lora_rank")
    lora_targets: str = as_in_training("lora_targets")
    lora_dropout: float = as_in_training("lora_dropout")
    lora_variant: str = as_in_training("lora_variant")
    optimizer: str = as_in_training("optimizer")
    dtype: str = setting("bfloat16", "what to compute in", choices=("bfloat16", "float32"))


@dataclass(frozen=True, kw_only=True)
class OneStep(Settings):
    """one optimizer step"""

    tokens: int = setting(4096, "tokens of a micro-batch", at_least=1, at_most=1 << 30)
    step_tokens: int = setting(
        0, "tokens of a step, on all GPUs together; 0: one micro-batch for each GPU", at_least=0, at_most=1 << 40
    )
    length: int = setting(512, "tokens of a text, for the arithmetic of attention", at_least=1, at_most=1 << 30)
    defer_gradient_sync: bool = as_in_training("defer_gradient_sync")
    sharding: str = setting("all", "compare all, or only this one", choices=("all", *SHARDINGS))
    tensor_parallel: int = setting(0, "compare only this number of ranks that share a layer; 0: all", at_least=0)
    activation_checkpointing: str = setting("all", "compare all, or only this one", choices=("all", *CHECKPOINTINGS))


@dataclass(frozen=True, kw_only=True)
class OnWhat(Settings):
    """on what hardware; the defaults of rates are an H100's"""

    gpus: int = setting(help="how many GPUs, in all nodes together", at_least=1, at_most=1 << 20)
    node_gpus: int = setting(8, "GPUs of one node", at_least=1, at_most=1 << 10)
    gpu_memory: float = setting(80.0, "GB (1e9 bytes) of one GPU", above=0)
    reserve: float = setting(
        0.05, "part of the memory that is left to CUDA, NCCL and gaps between tensors", at_least=0, below=1
    )
    peak_tflops: float | None = setting(
        None,
        f"TFLOP/s of the chip's data sheet; {DATA_SHEET['bfloat16']:g} for bfloat16, {DATA_SHEET['float32']:g} for "
        "float32",
        above=0,
    )
    efficiency: float = setting(
        0.4, "the part of it that training's products reach; 0.4 was measured on one H200", above=0, at_most=1
    )
    memory_gb_s: float = setting(3350.0, "GB/s that the GPU reads or writes in its memory", above=0)
    link_gb_s: float = setting(350.0, "GB/s that a GPU sends inside its node (NVLink)", above=0)
    network_gb_s: float = setting(40.0, "GB/s that a GPU sends to other nodes (a 400 Gb/s card each)", above=0)
    layer_ms: float = setting(
        13.5, "ms in which Python starts the kernels of one layer, forward and backward; measured, one H200", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class PlannerSettings(WhatToPlan, OneStep, OnWhat):
    """Every flag of planner.py."""

    rows: int = setting(24, "lines of the table; 0: all", at_least=0)

    def checks(self):
        has_adapter = bool(self.lora_rank)
        nodes_are_full = self.gpus % self.node_gpus == 0 or self.gpus < self.node_gpus
        return [
            ("gpus", f"fewer than --node_gpus {self.node_gpus}, or a multiple of it", nodes_are_full),
            ("quantize", "--lora_rank with it: packed weights cannot be trained",
             self.quantize == "none" or has_adapter),
            ("train_layers", "all with --lora_rank", self.train_layers == "all" or not has_adapter),
            ("tensor_parallel", f"a number that divides --gpus {self.gpus} and --node_gpus {self.node_gpus}",
             self.tensor_parallel == 0
             or self.gpus % self.tensor_parallel == 0 and self.own_node % self.tensor_parallel == 0),
            ("step_tokens", f"0, or --tokens {self.tokens} or more",
             self.step_tokens == 0 or self.step_tokens >= self.tokens),
            *((name, "--lora_rank with it", has_adapter or getattr(self, name) == getattr(type(self), name))
              for name in ("lora_targets", "lora_dropout", "lora_variant")),
        ]  # fmt: skip

    @property
    def peak(self) -> float:
        """TFLOP/s."""
        return self.peak_tflops or DATA_SHEET[self.dtype]

    @property
    def own_node(self) -> int:
        """GPUs of the only node, or of each."""
        return min(self.gpus, self.node_gpus)
