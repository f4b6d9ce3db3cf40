"""An adapter's two files, as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from llama.boundary.choices import ALL_LINEAR, LARGEST_RANK
from llama.boundary.durable import write_durably
from llama.boundary.errors import UserError
from llama.boundary.records import read_record, setting
from llama.boundary.untrusted import read_json
from llama.parallel.collectives import fail_together, is_rank_zero
from llama.parallel.shards import local_slice, sharded_parameters
from llama.storage.atomic import atomic_folder
from llama.storage.slices import read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
RANK, ALPHA, DROPOUT = {"at_least": 1, "at_most": LARGEST_RANK}, {"above": 0}, {"at_least": 0, "below": 1}
# Settings of PEFT that change what an adapter computes, and that this code does not know: refused unless empty.
UNKNOWN_IF_SET = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules", "target_parameters",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "kasa_config", "use_bdlora",
    "use_qalora", "velora_config", "monteclora_config", "arrow_config",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adapter is: its rank, alpha, dropout on its input in training, variant, and the linears it is on."""

    rank: int = setting(**RANK)
    alpha: float = setting(**ALPHA)
    dropout: float = setting(0.0, **DROPOUT)
    variant: str = "lora"
    targets: tuple[str, ...] = (ALL_LINEAR,)

    @property
    def scaling(self) -> float:
        """s in y = W x + s B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)


@dataclass(frozen=True)
class _Numbers:
    """The numbers and switches of adapter_config.json that an adapter follows, under PEFT's own names."""

    r: int = setting(**RANK)
    lora_alpha: float = setting(**ALPHA)
    lora_dropout: float = setting(0.0, **DROPOUT)
    use_rslora: bool = setting(False)
    use_dora: bool = setting(False)


def save_adapter(model: nn.Module, folder: Path, adapter: Adapter, base: str, replace: bool = False) -> None:
    """Write a folder that PEFT opens; it appears under its name once it is whole. Collective.

    Raises UserError, on every rank, if the name is taken or any rank cannot write.
    """
    tensors = _peft_tensors(model)
    targets = list(adapter.targets)
    if ALL_LINEAR in targets:  # PEFT would search for all linears again, perhaps in another model: name them
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": targets,
        "bias": "none",
        "use_rslora": adapter.variant == "rslora",
        "use_dora": adapter.variant == "dora",
        "inference_mode": True,
    }
    with atomic_folder(folder, {CONFIG, f"{WEIGHTS}.safetensors"}.__contains__, replace=replace) as unfinished:
        with fail_together(unfinished):
            if is_rank_zero():
                write_durably(unfinished / CONFIG, json.dumps(about, indent=2) + "\n")
        write_tensors(tensors, unfinished, WEIGHTS)


def read_adapter(folder: str | Path) -> Adapter:
    """What an adapter_config.json asks for. Raises UserError for a setting that this code does not implement."""
    path = Path(folder) / CONFIG
    about = read_json(folder, CONFIG)
    _refuse_unknown(path, about)
    targets = about.get("target_modules")
    if targets == ALL_LINEAR:
        targets = [targets]
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{path}: target_modules is {targets!r:.200}, expected a list of names")
    read = read_record(_Numbers, {entry.name: about.get(entry.name) for entry in fields(_Numbers)}, path)
    if read.use_dora and read.use_rslora:
        raise UserError(f"{path}: use_dora and use_rslora together, expected one of them")
    variant = "rslora" if read.use_rslora else "lora"
    if read.use_dora:
        variant = "dora"
    return Adapter(read.r, read.lora_alpha, read.lora_dropout, variant, tuple(targets))


def _refuse_unknown(path: Path, about: dict) -> None:
    for key, plain in (("peft_type", "LORA"), ("bias", "none"), ("fan_in_fan_out", False), ("lora_bias", False)):
        if about.get(key, plain) != plain:
            raise UserError(f"{path}: {key} is {about[key]!r:.60}, expected {plain!r}")
    for key in UNKNOWN_IF_SET:
        if about.get(key):
            raise UserError(f"{path}: {key} is {str(about[key])[:60]}, expected none: all targets are adapted alike")
    if about.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise UserError(f"{path}: init_lora_weights is {str(about['init_lora_weights'])[:60]}, which changes the base")


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Fill the adapters that are on the model. Raises UserError, on every rank, for tensors that are missing, foreign,
    of another shape, or not finite. Collective."""
    tensors = _peft_tensors(model)
    with fail_together(folder):
        read_tensors(tensors, Path(folder), WEIGHTS)
        broken = []
        for name, tensor in tensors.items():
            local, _ = local_slice(tensor)
            if not local.isfinite().all():
                broken.append(name)
        if broken:
            raise UserError(f"{folder}: {broken[0]} is not finite, as are {len(broken) - 1} others")


def _peft_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in PEFT's files."""
    tensors = {}
    for name, parameter in sharded_parameters(model).items():
        if ".lora_" in name:
            tensors[f"base_model.model.model.{name.replace('_vector.weight', '_vector')}"] = parameter
    return tensors
