"""Every setting of a training run: its default, its range and its meaning, stated once."""

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from llama.boundary.choices import (
    ADAPTER_VARIANTS,
    ALL_LINEAR,
    CHECKPOINTINGS,
    LARGEST_RANK,
    OPTIMIZERS,
    QUANTIZED,
    SCHEDULES,
    SHARDINGS,
)
from llama.boundary.records import Settings, setting
from llama.data.sources import DataSettings
from llama.training.tracking import TRACKERS, is_installed

if TYPE_CHECKING:  # it imports torch, and --help must not wait for that
    from llama.storage.peft import Adapter

TRAINED_PART = re.compile(r"last:[1-9][0-9]{0,5}|norm|lm_head|embed_tokens")
ADAPTER_SETTINGS = ("lora_alpha", "lora_dropout", "lora_targets", "lora_variant")

# What a resumed run must share with the run that it continues. The number of ranks and micro-batches may differ: the
# global batches are the same.
IDENTITY = (
    "model", "max_length", "truncate_side", "epochs", "learning_rate", "lr_schedule", "warmup_ratio", "beta2",
    "weight_decay", "max_grad_norm", "seed", "batch_tokens", "group_by_length", "optimizer", "quantize",
    "train_layers", "train_on_prompt", "adapter", "data", "control_tokens", "eval_limit",
)  # fmt: skip

# What a new model takes where no flag says otherwise: a high rate and several passes. 64 examples a step on any number
# of ranks, and float32 on any processor: the curve is the same everywhere.
TINY_RECIPE = {
    "epochs": 3.5,
    "learning_rate": 5e-3,
    "beta2": 0.9,
    "sharding": "grad",
    "dtype": "float32",
    "eval_every": 50,
}
TINY_EXAMPLES_PER_STEP = 64


@dataclass(frozen=True, kw_only=True)
class WhatToTrain(Settings):
    """what to train"""

    model: str = setting("tiny", "tiny (a preset trained from scratch), a Hugging Face folder, or a hub id")
    adapter: str | None = setting(None, "continue training this LoRA adapter, a folder in PEFT's format")
    quantize: str = setting("none", "keep the frozen linears in 8 or 4 bits", choices=("none", *QUANTIZED))
    train_layers: str = setting(
        "all", "all, or last:N and any of norm, lm_head, embed_tokens, with commas: the rest is frozen"
    )
    lora_rank: int = setting(
        0,
        "train an adapter of this rank instead of the model; 0: train the model",
        at_least=0,
        at_most=LARGEST_RANK,
    )
    lora_alpha: float = setting(
        16.0, "the adapter's weight: scaled by alpha / rank (rslora: by alpha / sqrt(rank))", above=0
    )
    lora_dropout: float = setting(0.0, "part of an adapter's input that is dropped in training", at_least=0, below=1)
    lora_targets: str = setting(
        ALL_LINEAR,
        f"linears with an adapter, with commas: {ALL_LINEAR} (in the layers), or ends of names like q_proj,v_proj",
    )
    lora_variant: str = setting("lora", "kind of adapter", choices=ADAPTER_VARIANTS)
    train_on_prompt: bool = setting(False, "learn to predict prompts too, not only answers")


@dataclass(frozen=True, kw_only=True)
class HowToTrain(Settings):
    """how to train"""

    epochs: float | None = setting(
        None, f"passes over the data; 1, for tiny {TINY_RECIPE['epochs']}", above=0, at_most=1e6
    )
    max_steps: int = setting(
        0,
        "stop after this many optimizer steps; the learning rate ends its schedule there; 0: as --epochs says",
        at_least=0,
    )
    batch_size: int | None = setting(
        None,
        f"examples of a rank (or tensor group) at a time; 16, for tiny as many as give {TINY_EXAMPLES_PER_STEP} a step",
        at_least=1,
    )
    batch_tokens: int = setting(
        0,
        "fill each rank's micro-batch with whole examples up to this many tokens, instead of with --batch_size "
        "examples; 0: use --batch_size",
    )
    group_by_length: bool = setting(False, "put examples of similar length into the same step")
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", at_least=1)
    learning_rate: float | None = setting(
        None, f"peak rate; 2e-5, for an adapter 2e-4, for tiny {TINY_RECIPE['learning_rate']}", above=0
    )
    lr_schedule: str = setting("cosine", "what the rate does after the warm-up", choices=SCHEDULES)
    warmup_ratio: float = setting(0.05, "part of the steps over which the rate rises from 0", at_least=0, at_most=1)
    optimizer: str = setting("adamw", "adamw8bit keeps its moments in 8 bits", choices=OPTIMIZERS)
    beta2: float | None = setting(
        None,
        f"how slowly AdamW forgets squared gradients; 0.999, for tiny {TINY_RECIPE['beta2']}",
        at_least=0,
        below=1,
    )
    weight_decay: float = setting(
        0.0, "decay of matrices, per unit of learning rate; norms and biases never decay", at_least=0
    )
    max_grad_norm: float = setting(1.0, "clip the gradient's norm to this; 0: never", at_least=0)
    seed: int = setting(0, "of the data order and of random weights", at_least=0)


@dataclass(frozen=True, kw_only=True)
class WhereToTrain(Settings):
    """on what hardware"""

    dtype: str | None = setting(
        None,
        "what to compute in and to keep frozen weights in (trained ones are kept in float32); bfloat16 where the "
        f"device has it, else float32; for tiny {TINY_RECIPE['dtype']}",
        choices=("bfloat16", "float32"),
    )
    sharding: str | None = setting(
        None,
        "what each rank keeps only a slice of. full: weights, gradients and optimizer state, and weights are gathered "
        "twice a micro-batch; grad: the same, and they are gathered once; hybrid: as full inside a node, and each node "
        f"has a copy; zero1: optimizer state; none: nothing; full, for tiny {TINY_RECIPE['sharding']}",
        choices=SHARDINGS,
    )
    tensor_parallel: int = setting(
        1, "so many neighbouring ranks compute each layer together, on the same examples", at_least=1
    )
    cpu_offload: bool = setting(False, "keep weights and optimizer state in the host's memory; for GPUs")
    defer_gradient_sync: bool = setting(
        False,
        "reduce gradients once a step instead of once a micro-batch; keeps whole fp32 gradients on every rank",
    )
    activation_checkpointing: str = setting(
        "none",
        "full: keep only each layer's input and compute the rest again in the backward; selective: keep products with "
        "weights and attention, too (of compiled layers only attention)",
        choices=CHECKPOINTINGS,
    )
    compile: bool = setting(False, "compile each layer (half a minute at the start)")


@dataclass(frozen=True, kw_only=True)
class WhatToKeep(Settings):
    """what to keep"""

    config: str | None = setting(
        None, "take flags from this JSON file, a run.json or one of recipes/; flags given here count more"
    )
    output: str | None = setting(None, "the run's folder; else runs/DATA-MODEL, or the next free number of it")
    eval_every: int | None = setting(
        None,
        f"evaluate every N steps; 0: only before and after; 0, for tiny {TINY_RECIPE['eval_every']}",
        at_least=0,
    )
    eval_limit: int = setting(1000, "held-out examples to evaluate on, a fixed random choice; 0: all", at_least=0)
    sample_prompts: int = setting(
        2,
        "show the model's answers to so many held-out prompts, before and after training, and keep them in "
        "summary.json; 0: none",
        at_least=0,
    )
    save_every: int = setting(0, "save a checkpoint every N steps; 0: as --save_minutes says", at_least=0)
    save_minutes: float = setting(
        30.0, "save a checkpoint once the last one is so old; 0: only at the end, and when told to stop", at_least=0
    )
    async_save: bool = setting(False, "write checkpoints from a copy in the host's memory, while training goes on")
    keep_checkpoints: int = setting(
        2,
        "newest checkpoints to keep, besides the one with the lowest held-out loss and those in which somebody put a "
        "file named keep; -1: all",
    )
    resume: str | None = setting(
        None,
        "continue the run in the output folder from its newest checkpoint, or from a named one, such as step-100",
        bare="newest",
    )
    allow_changed: str = setting(
        "",
        "settings that may differ from those of the checkpoint, with commas; the error message of --resume lists them",
    )
    log_every: int = setting(1, "write every Nth step to metrics.jsonl", at_least=1)
    track: str = setting("none", "also show metrics.jsonl in this tracker, whose package you install", choices=TRACKERS)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(WhatToTrain, HowToTrain, WhereToTrain, WhatToKeep, DataSettings):
    """Every setting of a run."""

    def checks(self):
        for_an_adapter = bool(self.lora_rank)
        return [
            *super().checks(),
            (
                "batch_tokens",
                f"0, or --max_length {self.max_length} or more",
                self.batch_tokens == 0 or self.batch_tokens >= self.max_length,
            ),
            ("batch_tokens", "0 with --group_by_length", not (self.batch_tokens and self.group_by_length)),
            ("adapter", "a folder", self.adapter != ""),
            ("adapter", "a pretrained --model", not (self.adapter and self.model == "tiny")),
            ("lora_rank", "0 with --adapter, which has its own", not (self.adapter and self.lora_rank)),
            (
                "lora_rank",
                "0 with --model tiny: nobody else has its random weights",
                not (self.lora_rank and self.model == "tiny"),
            ),
            *((name, "--lora_rank with it", for_an_adapter or self._is_default(name)) for name in ADAPTER_SETTINGS),
            (
                "quantize",
                "--lora_rank or --adapter: packed weights cannot be trained",
                self.quantize == "none" or self.has_adapter,
            ),
            ("train_layers", "all with an adapter", self.train_layers == "all" or not self.has_adapter),
            (
                "train_layers",
                "all, or last:N and any of norm, lm_head, embed_tokens",
                self.train_layers == "all" or all(map(TRAINED_PART.fullmatch, self.train_layers.split(","))),
            ),
            ("keep_checkpoints", "1 or more, or -1", self.keep_checkpoints >= 1 or self.keep_checkpoints == -1),
            (
                "resume",
                "nothing after it, or step-N",
                self.resume is None or bool(re.fullmatch(r"newest|step-\d{1,9}", self.resume)),
            ),
            ("allow_changed", "--resume with it", not self.allow_changed or self.resume is not None),
            ("track", f"its package to be installed: pip install {self.track}", is_installed(self.track)),
        ]

    def _is_default(self, name: str) -> bool:
        return getattr(self, name) == getattr(type(self), name)

    @property
    def has_adapter(self) -> bool:
        return bool(self.lora_rank or self.adapter)

    def asked_adapter(self) -> "Adapter | None":
        """The adapter to train: a new one (--lora_rank), or one to continue (--adapter)."""
        from llama.storage.peft import Adapter, read_adapter

        if self.adapter:
            return read_adapter(self.adapter)
        if not self.lora_rank:
            return None
        targets = tuple(self.lora_targets.split(","))
        return Adapter(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_variant, targets)

    def with_recipe(self, data_ranks: int) -> "FilledSettings":
        """Fill what was left open: as for a pretrained model, or as for a new one."""
        recipe: dict = {
            "epochs": 1.0,
            "batch_size": 16,
            "learning_rate": 2e-4 if self.has_adapter else 2e-5,
            "beta2": 0.999,
            "sharding": "full",
            "eval_every": 0,
        }
        if self.model == "tiny":
            micro_batches = data_ranks * self.gradient_accumulation_steps
            recipe = TINY_RECIPE | {"batch_size": max(1, TINY_EXAMPLES_PER_STEP // micro_batches)}
        filled = {name: value for name, value in recipe.items() if getattr(self, name) is None}
        return FilledSettings(**vars(self) | filled)

    def identity(self, base: str | None, adapter: "Adapter | None", about_data: dict) -> dict:
        """What all ranks, and a resumed run and its checkpoint, must have in common. `base`: a hash of its weights."""
        lora = asdict(adapter) | {"targets": list(adapter.targets)} if adapter else None  # a list, as in JSON
        return {name: getattr(self, name) for name in IDENTITY} | {"base": base, "lora": lora} | about_data


class FilledSettings(TrainingSettings):
    """The same after `with_recipe`: each of these has a value."""

    epochs: float
    batch_size: int
    learning_rate: float
    beta2: float
    sharding: str
    eval_every: int


def is_due(done: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after step `done`."""
    return every > 0 and done % every == 0
