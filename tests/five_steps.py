"""Five optimizer steps of the product under any setting of parallelism, and how far they are from one process'.

Everything is the product's own: `fsdp_train.build` and `run_steps`, weights and adapters from files, checkpoints. Only
the examples are made here. Weights and moments are read back from the last checkpoint, where they are whole.
"""

import math
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from ranks import RankPools
from safetensors.torch import load_file
from sharded import this_process
from torch import nn

import fsdp_train
from llama.data.batches import deal
from llama.model import Llama, ModelConfig
from llama.storage import pretrained
from llama.storage.base import Base
from llama.storage.checkpoint import Saver
from llama.storage.config_json import config_to_json
from llama.storage.manifest import read_manifest
from llama.storage.peft import Adapter, save_adapter
from llama.training.plan import Plan
from llama.training.settings import TrainingSettings
from lora import Changes, apply_adapter, initialize_adapter

STEPS = 5
BATCH = 8  # examples of a step
RATE = 1e-4  # AdamW divides by the gradient: the rate says how much of its rounding shows
DECAY = 0.1
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
LIMIT = 0.5  # of the gradient's norm: every step is clipped

# 5 key/value heads, 97 rows and 90 features do not divide by 2 or 4 ranks.
UNEVEN = ModelConfig(vocab_size=97, hidden_size=60, intermediate_size=90, num_hidden_layers=2, num_attention_heads=10,
                     num_key_value_heads=5, head_dim=8, attention_bias=True, mlp_bias=True,
                     initializer_range=0.15)  # fmt: skip
# Widths that NF4 packs, and rows of whole blocks for AdamW's 8-bit moments, also when 2 ranks share the columns.
BLOCKS = replace(UNEVEN, hidden_size=64, intermediate_size=512, num_attention_heads=16, num_key_value_heads=4,
                 head_dim=32, initializer_range=0.08)  # fmt: skip
CONFIGS = {
    "uneven-untied": UNEVEN,
    "uneven-tied": replace(UNEVEN, tie_word_embeddings=True),
    "blocks-untied": BLOCKS,
    "blocks-tied": replace(BLOCKS, tie_word_embeddings=True),
}
ADAPTERS = {variant: Adapter(4, 8.0, variant=variant) for variant in ("lora", "dora")}


@dataclass(frozen=True)
class Trained:
    """What is trained: a shape of CONFIGS, an adapter of ADAPTERS, and the flags for the rest."""

    shape: str
    variant: str | None = None
    quantize: str = "none"
    train_layers: str = "all"


TRAINED: dict[str, Trained] = {}
for ends in ("untied", "tied"):
    TRAINED[f"all-{ends}"] = Trained(f"uneven-{ends}")
    TRAINED[f"all-blocks-{ends}"] = Trained(f"blocks-{ends}")
    TRAINED[f"some-{ends}"] = Trained(f"uneven-{ends}", train_layers="last:1,norm")
    TRAINED[f"lora-{ends}"] = Trained(f"uneven-{ends}", "lora")
    TRAINED[f"dora-{ends}"] = Trained(f"uneven-{ends}", "dora")
    TRAINED[f"lora-int8-{ends}"] = Trained(f"blocks-{ends}", "lora", "int8")
    TRAINED[f"dora-nf4-{ends}"] = Trained(f"blocks-{ends}", "dora", "nf4")


SOME = ("all-tied", "some-untied", "lora-untied", "lora-int8-tied", "dora-nf4-untied")
COMPILED = ("all-untied", "dora-nf4-tied")  # a compilation takes long
BLOCKED = ("all-blocks-untied", "all-blocks-tied", "lora-int8-tied")  # has moments that take 8 bits
ACCUMULATE = {"gradient_accumulation_steps": 2}
DEFER = ACCUMULATE | {"defer_gradient_sync": True}
EIGHT_BIT = {"optimizer": "adamw8bit"}


@dataclass(frozen=True)
class Setting:
    """How many ranks (hybrid: on two nodes), the flags of fsdp_train.py, and with what of TRAINED they are tried."""

    ranks: int
    flags: dict
    trained: tuple[str, ...] = tuple(TRAINED)

    def with_some(self, trained: tuple[str, ...] = SOME, **flags) -> "Setting":
        """The same with further flags, tried with less."""
        return replace(self, flags=self.flags | flags, trained=trained)

    @property
    def has_8_bit_moments(self) -> bool:
        """A moment that lies between two codes may be rounded to the other one, and its weight moves by another part of
        the learning rate: such weights agree to RATE only."""
        return self.flags.get("optimizer") == "adamw8bit"

    @property
    def reference(self) -> str:
        """The one process that it must equal."""
        return "alone-adamw8bit" if self.has_8_bit_moments else "alone"

    def has_float64(self, trained: str) -> bool:
        """8-bit AdamW updates in fp32, and NF4's table of values is made for 16 and 32 bits."""
        return not self.has_8_bit_moments and TRAINED[trained].quantize != "nf4"


def _ranks(ranks: int, sharding: str = "full", tensor_parallel: int = 1) -> Setting:
    return Setting(ranks, {"sharding": sharding, "tensor_parallel": tensor_parallel})


FULL_2, FULL_2_TENSOR_2, ZERO1_2_TENSOR_2 = _ranks(2), _ranks(4, "full", 2), _ranks(4, "zero1", 2)
SETTINGS = {
    "alone": _ranks(1),
    "full-2": FULL_2,
    "full-4": _ranks(4),
    "grad-2": _ranks(2, "grad"),
    "grad-4": _ranks(4, "grad"),
    "zero1-2": _ranks(2, "zero1"),
    "zero1-4": _ranks(4, "zero1"),
    "hybrid-2x2": _ranks(4, "hybrid"),
    "none-2": _ranks(2, "none"),
    "none-4": _ranks(4, "none"),
    "tensor-2": _ranks(2, "full", 2),
    "tensor-4": _ranks(4, "full", 4),
    "full-2-tensor-2": FULL_2_TENSOR_2,
    "grad-2-tensor-2": _ranks(4, "grad", 2),
    "zero1-2-tensor-2": ZERO1_2_TENSOR_2,
    "none-2-tensor-2": _ranks(4, "none", 2),
    "hybrid-2x1-tensor-2": _ranks(4, "hybrid", 2),
    "full-2-cpu_offload": FULL_2.with_some(cpu_offload=True),
    "full-2-recompute-full": FULL_2.with_some(activation_checkpointing="full"),
    "full-2-recompute-selective": FULL_2.with_some(activation_checkpointing="selective"),
    "full-2-tensor-2-cpu_offload": FULL_2_TENSOR_2.with_some(cpu_offload=True),
    "full-2-tensor-2-recompute-full": FULL_2_TENSOR_2.with_some(activation_checkpointing="full"),
    "zero1-2-tensor-2-recompute-selective": ZERO1_2_TENSOR_2.with_some(activation_checkpointing="selective"),
    "full-2-compile": FULL_2.with_some(COMPILED, compile=True),
    "zero1-2-tensor-2-compile": ZERO1_2_TENSOR_2.with_some(COMPILED, compile=True),
    "alone-accumulate": _ranks(1).with_some(**ACCUMULATE),
    "full-2-accumulate": FULL_2.with_some(**ACCUMULATE),
    "full-2-accumulate-defer": FULL_2.with_some(**DEFER),
    "hybrid-2x2-accumulate": _ranks(4, "hybrid").with_some(**ACCUMULATE),
    "hybrid-2x2-accumulate-defer": _ranks(4, "hybrid").with_some(**DEFER),
    "zero1-2-tensor-2-accumulate": ZERO1_2_TENSOR_2.with_some(**ACCUMULATE),
    "zero1-2-tensor-2-accumulate-defer": ZERO1_2_TENSOR_2.with_some(**DEFER),
    "alone-adamw8bit": _ranks(1).with_some(BLOCKED, **EIGHT_BIT),
    "full-2-adamw8bit": FULL_2.with_some(BLOCKED, **EIGHT_BIT),
    "full-4-adamw8bit": _ranks(4).with_some(BLOCKED, **EIGHT_BIT),
    "zero1-2-adamw8bit": _ranks(2, "zero1").with_some(BLOCKED, **EIGHT_BIT),
    "zero1-2-tensor-2-adamw8bit": ZERO1_2_TENSOR_2.with_some(BLOCKED, **EIGHT_BIT),
}
# A checkpoint of each of these must continue under each of them.
MOVED = ("alone", "full-2", "full-4", "none-2", "hybrid-2x2", "tensor-2", "full-2-tensor-2", "zero1-2-tensor-2")
MOVED_TRAINED = ("all-tied", "dora-nf4-untied")


class Data:
    """What a run asks of EncodedData: 8 examples for each step. Of each 8 the longest and the three shortest have
    labels, so that `deal` gives the others, which have none, to ranks of their own."""

    def __init__(self):
        rng = np.random.default_rng(0)
        shape = [(120, 70), (25, 0), (24, 0), (23, 0), (22, 0), (9, 1), (7, 3), (5, 2)]  # tokens, labels
        self.examples = []
        for _ in range(STEPS):
            for tokens, labels in shape:
                length = tokens + int(rng.integers(3))
                ids = rng.integers(0, UNEVEN.vocab_size, length).astype(np.int32)
                self.examples.append((ids, np.arange(length) >= length - labels))
        self.lengths = np.array([len(ids) for ids, _ in self.examples])
        self.label_counts = np.array([int(is_label.sum()) for _, is_label in self.examples])

    def __getitem__(self, i: int):
        return self.examples[i]

    def micro_batches(self, step: int, parts: int) -> list[list[int]]:
        """Of all ranks. The last step has three examples: some ranks have none."""
        first = step * BATCH
        chosen = list(range(first, first + BATCH))
        if step == STEPS - 1:
            chosen = [first, first + 4, first + 7]
        return deal(chosen, self.lengths, parts, BATCH // parts)


def write_files(parent: Path) -> None:
    """A base of each shape and an adapter of each variant for it, none of them trivial."""
    for name, config in CONFIGS.items():
        model = Llama(config)
        generator = torch.Generator().manual_seed(1)
        pretrained.initialize_weights(model, seed=0)
        _shake([p for p in model.parameters() if p.ndim == 1], 0.25, generator)
        pretrained.export_model(model, parent / name / "base", config_to_json(config), dtype=torch.float32)
        for variant, adapter in ADAPTERS.items():
            model = Llama(config)
            pretrained.load_weights(model, parent / name / "base")
            apply_adapter(model, adapter)
            initialize_adapter(model, seed=0)
            _shake([p for p in model.parameters() if p.requires_grad], 0.05, generator)
            save_adapter(model, parent / name / variant, adapter, "base")


@torch.no_grad()
def _shake(parameters: list[nn.Parameter], size: float, generator: torch.Generator) -> None:
    for parameter in parameters:
        parameter += size * torch.randn(parameter.shape, generator=generator)


@dataclass(frozen=True)
class InDtype(Changes):
    """The same changes, and all weights in this dtype: float64 shows what float32's rounding would hide."""

    dtype: torch.dtype = torch.float32

    def apply(self, model: Llama) -> None:
        super().apply(model)
        model.to(self.dtype)


class Recorder:
    """In place of a Report: keeps loss and norm of each step."""

    failed = False

    def __init__(self):
        self.steps: list[tuple[float, float]] = []

    def progress_bar(self):
        return nullcontext()

    def step(self, done: int, loss: float, norm: float, rate: float, counts: dict) -> None:
        self.steps.append((loss, norm))

    def check(self) -> None:
        """Nothing is written that could fail."""

    def held_out(self, done: int, metrics: dict) -> dict:
        return metrics


@dataclass(frozen=True)
class Work:
    """A run of five steps: what is trained, under which setting, in which dtype."""

    files: Path  # of `write_files`
    output: Path
    trained: str
    setting: str
    dtype: torch.dtype = torch.float32
    saved: Path | None = None  # a checkpoint to continue from

    @property
    def adapter(self) -> Adapter | None:
        variant = TRAINED[self.trained].variant
        return ADAPTERS[variant] if variant else None

    @property
    def base(self) -> Base:
        shape = TRAINED[self.trained].shape
        folder, config = self.files / shape / "base", CONFIGS[shape]
        return Base("base", folder, config_to_json(config), config, None, torch.float32, [])

    @property
    def changes(self) -> Changes:
        asked = TRAINED[self.trained]
        folder = str(self.files / asked.shape / asked.variant) if asked.variant else None
        return InDtype(asked.quantize, self.adapter, asked.train_layers, folder, self.dtype)


def train(work: Work) -> list[tuple[float, float]]:
    """On each rank: (loss, gradient norm) of each step that is left. Leaves checkpoints of steps 2, 4 and 5 in
    `work.output`, and what a run exports: a model or an adapter."""
    alike: dict = {"max_grad_norm": LIMIT, "learning_rate": RATE, "weight_decay": DECAY, "save_every": 2}
    settings = TrainingSettings(**alike, **SETTINGS[work.setting].flags).with_recipe(1)
    if settings.compile:
        torch._dynamo.reset()  # the compilations of earlier runs would count towards its limit
        torch._inductor.config.compile_threads = 1  # no pool of compilers that would outlive the ranks
    process, data = this_process(settings.sharding, settings.tensor_parallel), Data()
    parts = settings.gradient_accumulation_steps * process.data_ranks
    manifest = read_manifest(work.saved) if work.saved else None
    schedule = SimpleNamespace(micro_batches=lambda step: data.micro_batches(step, parts))
    plan = Plan(schedule, STEPS, work.dtype, {}, work.output, work.saved, manifest)
    task = fsdp_train.Task(work.base, work.changes, SimpleNamespace(test=None), data, None)
    model, optimizer = fsdp_train.build(settings, task, process, plan)
    recorder, saver = Recorder(), Saver(work.output / "checkpoints", -1)
    current = fsdp_train.Run(settings, task, process, plan, model, optimizer, saver, recorder)
    fsdp_train.run_steps(current)
    if work.dtype != torch.float32:
        return recorder.steps
    if work.adapter:
        save_adapter(model, work.output / "adapter", work.adapter, "base")
    else:
        pretrained.export_model(model, work.output / "model", work.base.config_json, dtype=torch.float32)
    return recorder.steps


# What came of it


@dataclass(frozen=True)
class Result:
    """(loss, norm) of each step by rank, and the tensors of the last checkpoint and of the export, by file and name."""

    steps: list[tuple[float, float]]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, by_rank: list, output: Path) -> "Result":
        assert all(steps == by_rank[0] for steps in by_rank), "ranks report different losses or norms"
        files = [*(output / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"), *output.glob("*/*.safetensors")]
        tensors = {f"{path.parent.name}/{path.stem} {name}": tensor
                   for path in files for name, tensor in load_file(path).items()}
        return cls(by_rank[0], tensors)


def differences(found: Result, expected: Result) -> dict[str, float]:
    """The largest absolute difference of losses, of gradient norms, of updated weights and of moments."""
    assert found.tensors.keys() == expected.tensors.keys()
    left = len(found.steps)  # a run that continued another has fewer
    steps = np.abs(np.array(found.steps) - np.array(expected.steps)[-left:])
    found_by_kind = {"loss": [steps[:, 0].max()], "norm": [steps[:, 1].max()], "weights": [0.0], "moments": [0.0]}
    for name, tensor in found.tensors.items():
        kind = "moments" if "/optimizer " in name else "weights"
        if tensor.is_floating_point():  # not the codes of 8-bit moments
            found_by_kind[kind].append(float((tensor - expected.tensors[name]).abs().max()))
    return {kind: float(f"{np.max(values):.3g}") for kind, values in found_by_kind.items()}  # NaN, if there is one


def are_equal(found: Result, expected: Result) -> bool:
    """Bit for bit: the losses and norms of the steps that both took, weights, moments and exports."""
    left = len(found.steps)
    same_steps = found.steps == expected.steps[-left:]
    return same_steps and all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)


def is_near(found: dict[str, float], setting: str, dtype: torch.dtype) -> bool:
    """Whether differences are within the tolerance of the dtype."""
    limits = dict.fromkeys(("loss", "norm", "weights", "moments"), TOLERANCES[dtype])
    if SETTINGS[setting].has_8_bit_moments:
        limits["weights"] = RATE
    return all(found.get(kind, math.inf) <= limit for kind, limit in limits.items())


class Runs:
    """Runs under settings, on pools of ranks. Those that others are compared with are done once, and stay."""

    def __init__(self, folder: Path, ranks: RankPools):
        self.folder, self.ranks = folder, ranks
        self.kept: dict[Path, Result] = {}
        write_files(folder / "files")

    def output(self, setting: str, trained: str, dtype: torch.dtype = torch.float32) -> Path:
        """The folder of a run that stays."""
        output = self.folder / f"{setting} {trained} {dtype}"
        if output not in self.kept:
            self.kept[output] = self._run(Work(self.folder / "files", output, trained, setting, dtype))
        return output

    def parity(self, setting: str, trained: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """How far a setting is from one process."""
        expected = self.kept[self.output(SETTINGS[setting].reference, trained, dtype)]
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            found = self._run(Work(self.folder / "files", Path(output), trained, setting, dtype))
        return differences(found, expected)

    def moved(self, saver: str, reader: str, trained: str) -> dict[str, float]:
        """How far the run under `saver` is from one that continues its checkpoint of step 2 under `reader`. `bitwise`:
        whether they are equal."""
        whole = self.output(saver, trained)
        saved = whole / "checkpoints" / "step-000002"
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            found = self._run(Work(self.folder / "files", Path(output), trained, reader, saved=saved))
        return differences(found, self.kept[whole]) | {"bitwise": are_equal(found, self.kept[whole])}

    def _run(self, work: Work) -> Result:
        return Result.of(self.ranks(SETTINGS[work.setting].ranks, train, work, timeout=600), work.output)
