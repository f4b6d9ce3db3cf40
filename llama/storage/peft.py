"""An adapter's two files, as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from llama.boundary.choices import ALL_LINEAR, LARGEST_RANK
from llama.boundary.durable import write_durably
from llama.boundary.errors import UserError, as_user_error, first_few
from llama.boundary.foreign import described_folder
from llama.boundary.records import read_record, setting
from llama.boundary.untrusted import read_json
from llama.parallel.collectives import fail_together, is_rank_zero
from llama.parallel.shards import local_slice, sharded_parameters
from llama.storage.atomic import atomic_folder
from llama.storage.companions import NO_COMPANIONS, Companions
from llama.storage.manifest import checkpoint_at, read_manifest, verify
from llama.storage.slices import read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
RANK: dict = {"at_least": 1, "at_most": LARGEST_RANK}
ALPHA: dict = {"above": 0}
DROPOUT: dict = {"at_least": 0, "below": 1}
# Settings of PEFT that change what an adapter computes, and that this code does not know: refused unless empty.
UNKNOWN_IF_SET = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules", "target_parameters",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "kasa_config", "use_bdlora",
    "use_qalora", "velora_config", "monteclora_config", "arrow_config",
)  # fmt: skip
# Settings that must have this value, where they are given.
FIXED = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "lora_bias": False}
# Settings of PEFT that change nothing in an adapter that is trained: where it comes from, how it began, and what only
# counts beside a setting that is refused. Any other setting that nothing here reads is announced by name.
HARMLESS = {
    "target_modules", "init_lora_weights", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# How an adapter may have begun (init_lora_weights) on a base that stays as it is.
KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
# These begin with a part of the base's weights, which PEFT subtracts from the base: W becomes W - s B A.
SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")


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


def save_adapter(
    model: nn.Module,
    folder: Path,
    adapter: Adapter,
    base: str,
    beside: Companions = NO_COMPANIONS,
    replace: bool = False,
) -> None:
    """Write a folder that PEFT opens, with what is `beside` the weights; it appears under its name once it is whole.
    Collective.

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

    def is_ours(name: str) -> bool:
        return beside.owns(name) or name in (CONFIG, f"{WEIGHTS}.safetensors")

    with atomic_folder(folder, is_ours, replace=replace) as unfinished:
        with fail_together(unfinished):
            if is_rank_zero():
                beside.write(unfinished)
                write_durably(unfinished / CONFIG, json.dumps(about, indent=2) + "\n")
        write_tensors(tensors, unfinished, WEIGHTS)


def read_adapter(folder: str | Path) -> Adapter:
    """What an adapter_config.json asks for, or a checkpoint of a run. Raises UserError for a setting that this code
    does not implement."""
    saved = checkpoint_at(folder)
    if saved:
        return adapter_of_checkpoint(saved)
    path = Path(folder) / CONFIG
    if Path(folder).is_dir() and not os.path.lexists(path):
        found = described_folder(Path(folder), WEIGHTS)
        raise UserError(f"{folder}: has no {CONFIG}, expected an adapter's folder in PEFT's format{found}")
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


def adapter_of_checkpoint(saved: Path) -> Adapter:
    """Raises UserError for a checkpoint that holds a model, and for one that does not say what its adapter is."""
    lora = read_manifest(saved).origin(saved).lora
    if lora is None:
        raise UserError(f"--adapter {saved}: holds a model, expected an adapter; give it as --model")
    with as_user_error(saved, "a manifest that says what the adapter is"):
        return read_record(Adapter, lora | {"targets": tuple(lora["targets"])}, saved)


def _refuse_unknown(path: Path, about: dict) -> None:
    for key, plain in FIXED.items():
        if about.get(key, plain) != plain:
            raise UserError(f"{path}: {key} is {about[key]!r:.60}, expected {plain!r}")
    for key in UNKNOWN_IF_SET:
        if about.get(key):
            raise UserError(f"{path}: {key} is {str(about[key])[:60]}, expected none: all targets are adapted alike")
    began = about.get("init_lora_weights")
    if began in KEEPS_BASE:
        return
    expected = "an adapter of an unchanged base"
    if str(began).startswith(SUBTRACTED):
        expected += "; PEFT's save_pretrained makes one of it, with path_initial_model_for_weight_conversion"
    raise UserError(f"{path}: init_lora_weights is {str(began)[:60]}, which changes the base, expected {expected}")


def adapter_notes(folder: str | Path | None) -> list[str]:
    """Sentences on what an adapter_config.json holds and `read_adapter`, which has accepted it, does not use."""
    if not folder or checkpoint_at(folder):
        return []
    about = read_json(folder, CONFIG)
    known = {entry.name for entry in fields(_Numbers)} | FIXED.keys() | {*UNKNOWN_IF_SET} | HARMLESS
    unused = [name for name, value in about.items() if value is not None and name not in known]
    return [f"{Path(folder) / CONFIG}: not used: {first_few(unused, 12)}"] if unused else []


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Fill the adapters that are on the model, from PEFT's files or a checkpoint. Raises UserError, on every rank, for
    tensors that are missing, foreign, of another shape, or not finite. Collective."""
    tensors, stem, saved = _peft_tensors(model), WEIGHTS, checkpoint_at(folder)
    if saved:
        tensors, stem = _adapters_parameters(model), "model"
        verify(saved, read_manifest(saved), stem)
    with fail_together(folder):
        read_tensors(tensors, saved or Path(folder), stem)
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
    for name, parameter in _adapters_parameters(model).items():
        tensors[f"base_model.model.model.{name.replace('_vector.weight', '_vector')}"] = parameter
    return tensors


def _adapters_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in sharded_parameters(model).items() if ".lora_" in name}
