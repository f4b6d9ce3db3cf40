"""Low-rank adapters (LoRA), by hand: a few trainable numbers beside a frozen model.

    y = W x + s B A x        A (r, in) random, B (out, r) zeros at the start: at step 0 nothing changes

What it saves: W gets no gradient and no moments, 12 of full fine-tuning's 16 bytes a weight. The gradient of x still
runs through every W. Hu et al. 2021, https://arxiv.org/abs/2106.09685. s = alpha / r, or alpha / sqrt(r) in rsLoRA
(Kalajdzievski 2023, https://arxiv.org/abs/2312.03732), so that the size of an update does not shrink with the rank.
DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) also learns the length m of each row:

    y = m / ||W + s B A|| (W + s B A) x        the norm is of each row of (out, in), a constant in the backward

An adapter is put on from outside; the model does not know. Its files are PEFT's. This script folds one into its base:

    python lora.py --model DIR --adapter runs/alpaca-DIR/adapter --output merged
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from llama.boundary.command_line import CheckedSettings, parse, run, setting
from llama.boundary.errors import UserError, WeightsError
from llama.boundary.hub import find_model
from llama.boundary.untrusted import read_json_text
from llama.model.quantize import KINDS, QuantizedLinear, quantize
from llama.parallel.collectives import first_rank, together
from llama.parallel.distribute import build, ranks
from llama.storage import pretrained
from llama.storage.atomic import appearing, write_durably
from llama.storage.slices import (
    all_finite,
    local_slice,
    read_tensors,
    region,
    sharded_parameters,
    write_tensors,
)

VARIANTS = ("lora", "rslora", "dora")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Adapter:
    """What an adapter is: r, alpha, dropout on its input while training, variant, and the linears it sits on."""

    rank: int
    alpha: float
    dropout: float = 0.0
    variant: str = "lora"
    targets: tuple[str, ...] = (ALL_LINEAR,)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)


class LoRALinear(nn.Linear):
    """A linear with an adapter. `weight` and `bias` stay where they were, so base checkpoints load untouched.

    Its children are lora_A and lora_B, and for DoRA there is the parameter lora_magnitude_vector (out). Freezing the
    base is the model's business (`apply`). Dropout, where asked for, is on the adapter's input only.
    """

    def add_adapter(self, adapter: Adapter) -> None:
        device = self.weight.device
        self.scaling, self.dropout = adapter.scaling, adapter.dropout
        # fp32 whatever the base is in: updates are far smaller than bf16 can tell apart.
        self.lora_A = nn.Linear(self.in_features, adapter.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(adapter.rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        self.lora_magnitude_vector = Magnitude(self.out_features, device) if adapter.variant == "dora" else None

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        base = super().forward(x)
        low = self.lora_A(F.dropout(x, self.dropout, self.training) if self.dropout else x) * self.scaling
        y = torch.addmm(base, low, self.lora_B.weight.t())
        if self.lora_magnitude_vector is None:
            return y
        magnitude = self.lora_magnitude_vector.weight
        norms = self.row_norms().to(magnitude.dtype)  # rounded as m is: the ratio is exactly 1 at the start
        nothing = norms == 0  # a row of zeros has no length to learn
        ratio = (magnitude + nothing) / (norms + nothing)
        return y * ratio if self.bias is None else y + (ratio - 1) * (y - self.bias)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """||W + s B A|| of each row (out), fp32."""
        base = self.base_weight() if isinstance(self, QuantizedLinear) else self.weight
        delta = self.lora_B.weight.float() @ self.lora_A.weight.float()
        return torch.linalg.vector_norm(base.float() + self.scaling * delta, dim=1)


class Magnitude(nn.Module):
    """DoRA's length of each row of a linear, `weight` (out): a module only so that it can be taken off again."""

    def __init__(self, out_features: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, device=device, dtype=torch.float32))


def apply(model: nn.Module, adapter: Adapter) -> None:
    """Freeze the model and put an adapter on each target, in place: every base parameter keeps its name.

    A target is the end of a module's name, such as q_proj, or `all-linear`: all in the decoder layers. Raises
    UserError for one that matches nothing.
    """
    model.requires_grad_(False)
    linears = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    chosen = set()
    for target in adapter.targets:
        found = [name for name in linears if target == ALL_LINEAR or f".model.layers.{name}".endswith(f".{target}")]
        if not found:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise UserError(f"LoRA target {target!r:.80}: no such linear in the decoder layers, expected {ALL_LINEAR} "
                            f"or some of {known}")
        chosen.update(found)
    for name in linears.keys() & chosen:
        linear = linears[name]
        # As FSDP does to what it shards: another class over the same module. Its forward calls the base's own.
        linear.__class__ = _with_adapter(type(linear))
        linear.add_adapter(adapter)


@cache  # one class for all linears of a kind: compiled code is shared by type
def _with_adapter(base: type[nn.Linear]) -> type[LoRALinear]:
    return LoRALinear if base is nn.Linear else type(f"LoRA{base.__name__}", (LoRALinear, base), {})


def prepare(model: nn.Module, adapter: Adapter | None, kind: str) -> None:
    """What is done to a model before it is sharded: pack its linears (`kind`: none, int8, nf4), then adapt them."""
    if kind != "none":
        quantize(model, kind)
    if adapter:
        apply(model, adapter)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The linears with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# Values


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """A uniform in +-1/sqrt(in) (as PEFT: He et al. 2015), B zero, m the rows' own lengths; load the base before.

    The same for any number of ranks: each draws an A whole, from a generator seeded by `seed` and its name, and keeps
    its part.
    """
    for name, linear in adapted(model).items():
        generator = pretrained.seeded_generator(seed, name)
        whole = torch.empty(linear.lora_A.weight.shape).uniform_(-1, 1, generator=generator)
        whole /= math.sqrt(linear.in_features)
        local, start = local_slice(linear.lora_A.weight)
        local.copy_(whole[region(start, local)])
        local_slice(linear.lora_B.weight)[0].zero_()
        if linear.lora_magnitude_vector is not None:
            local_slice(linear.lora_magnitude_vector.weight)[0].copy_(
                torch.linalg.vector_norm(_local_rows(linear).float(), dim=1))


def _local_rows(linear: LoRALinear) -> Tensor:
    """This rank's rows of W."""
    if isinstance(linear, QuantizedLinear):
        packed = [local_slice(tensor)[0] for tensor in linear.packed_weight().values()]
        return linear.dequantize_rows(*packed, dtype=torch.float32)
    return local_slice(linear.weight)[0]


@torch.no_grad()
def merge(model: nn.Module, quantized: str | None = None) -> None:
    """Fold every adapter into its base and take it off: the model computes the same without it. Collective.

    W <- W + s B A, and for DoRA its rows scaled to length m. `quantized`: the adapter was trained over a base of this
    kind, so all that `quantize` packs is first rounded as it was there; merged into the weights themselves, it would be
    another model. Raises UserError where `quantize` would, ValueError for a base that is still packed.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("merge: the base is packed; build it plain, and say what it was in `quantized`")
    for name, linear in model.layers.named_modules():
        if quantized and isinstance(linear, nn.Linear) and ".lora_" not in name:
            kind = KINDS[quantized]
            kind.check(name, linear)
            weight = local_slice(linear.weight)[0]
            weight.copy_(kind.dequantize_rows(*kind.quantize_rows(weight).values(), dtype=torch.float32))
    for linear in adapted(model).values():
        weight = local_slice(linear.weight)[0]
        rows = weight.float()
        low = linear.lora_A.weight.detach()
        low = low.full_tensor() if isinstance(low, DTensor) else low
        rows = rows + linear.scaling * (local_slice(linear.lora_B.weight)[0].float() @ low.float())
        if linear.lora_magnitude_vector is not None:
            magnitude = local_slice(linear.lora_magnitude_vector.weight)[0].float()
            norms = torch.linalg.vector_norm(rows, dim=1)
            rows *= ((magnitude + (norms == 0)) / (norms + (norms == 0)))[:, None]
        weight.copy_(rows)
        linear.__class__ = nn.Linear
        for child in ("lora_A", "lora_B", "lora_magnitude_vector"):
            delattr(linear, child)


# Files, in PEFT's format (https://huggingface.co/docs/peft/developer_guides/checkpoint)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
LARGEST_RANK = 1 << 16


def save(model: nn.Module, folder: Path, adapter: Adapter, base: str) -> None:
    """Write a folder that PEFT opens; it appears under its name once it is whole. Collective.

    Raises WeightsError, on every rank, if the name is taken or any rank cannot write.
    """
    targets = list(adapter.targets)
    if ALL_LINEAR in targets:  # which PEFT would look for anew, in another model
        targets = sorted({name.rpartition(".")[2] for name in adapted(model)})
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": adapter.rank,
        "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout, "target_modules": targets, "bias": "none",
        "use_rslora": adapter.variant == "rslora", "use_dora": adapter.variant == "dora", "inference_mode": True,
    }
    with appearing(folder, {CONFIG, f"{WEIGHTS}.safetensors"}.__contains__) as unfinished:
        with together(unfinished):
            if first_rank():
                write_durably(unfinished / CONFIG, json.dumps(about, indent=2) + "\n")
        write_tensors(_peft_tensors(model), unfinished, WEIGHTS)


def read_adapter(folder: str | Path) -> Adapter:
    """What an adapter_config.json asks for. Raises UserError for what this code would compute otherwise."""
    path = Path(folder) / CONFIG
    try:
        about = json.loads(read_json_text(Path(folder), CONFIG))
        switches = [about.get(name, False) for name in ("use_rslora", "use_dora")]
        if not all(isinstance(value, bool | None) for value in switches):
            raise ValueError(f"use_rslora, use_dora: {switches}"[:200])
        targets = about["target_modules"]
        adapter = Adapter(
            about["r"], about["lora_alpha"], about.get("lora_dropout", 0.0),
            "dora" if about.get("use_dora") else "rslora" if about.get("use_rslora") else "lora",
            (targets,) if targets == ALL_LINEAR else tuple(targets))
        if isinstance(targets, str) and targets != ALL_LINEAR:
            raise ValueError(f"target_modules is the pattern {targets!r}, expected a list of names")
        numbers = (adapter.rank, adapter.alpha, adapter.dropout)
        fine = type(adapter.rank) is int and 0 < adapter.rank <= LARGEST_RANK and targets
        fine = fine and all(type(n) in (int, float) for n in numbers) and all(isinstance(t, str) for t in targets)
        fine = fine and 0 <= adapter.dropout < 1 and 0 < float(adapter.alpha) < math.inf
        if not fine:
            raise ValueError(f"r, lora_alpha, lora_dropout, target_modules: {(*numbers, adapter.targets)}"[:200])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected an adapter in PEFT's format") from None
    except WeightsError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}, expected the settings of a LoRA") from None
    for key, plain in (("peft_type", "LORA"), ("bias", "none"), ("fan_in_fan_out", False), ("lora_bias", False)):
        if about.get(key, plain) != plain:
            raise UserError(f"{path}: {key} is {about[key]!r:.60}, expected {plain!r}")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules",
                "target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
                "kasa_config", "use_bdlora", "use_qalora", "velora_config", "monteclora_config", "arrow_config"):
        if about.get(key):
            raise UserError(f"{path}: {key} is {str(about[key])[:60]}, expected none: all targets are adapted alike")
    if about.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise UserError(f"{path}: init_lora_weights is {str(about['init_lora_weights'])[:60]}, which changes the base")
    if about.get("use_dora") and about.get("use_rslora"):
        raise UserError(f"{path}: use_dora and use_rslora together, expected one of them")
    return adapter


def load(model: nn.Module, folder: str | Path) -> None:
    """Fill the adapters that `apply` has put on. Raises WeightsError for tensors that are missing, foreign, of another
    shape, or not finite. Collective."""
    tensors = _peft_tensors(model)
    with together(Path(folder)):
        read_tensors(tensors, Path(folder), WEIGHTS)
        broken = [name for name, tensor in tensors.items() if not local_slice(tensor)[0].isfinite().all()]
        if broken:
            raise WeightsError(f"{folder}: {broken[0]} is not finite, as are {len(broken) - 1} others")


def _peft_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in PEFT's files."""
    wanted = {name for name, _ in model.named_parameters() if ".lora_" in name}
    return {f"base_model.model.model.{name.replace('_vector.weight', '_vector')}": parameter
            for name, parameter in sharded_parameters(model).items() if name in wanted}


@dataclass(frozen=True, kw_only=True)
class Settings(CheckedSettings):
    script = "lora.py"

    model: str = setting(help="the base: a Hugging Face folder, or a hub id")
    adapter: str = setting(help="folder with adapter_config.json and adapter_model.safetensors")
    output: str = setting(help="the Hugging Face folder to write")
    quantize: str = setting("none", "what the adapter's base was rounded to in training", choices=("none", *KINDS))
    dtype: str = setting("bfloat16", "of the weights written", choices=("bfloat16", "float16", "float32"))


def main() -> None:
    settings = parse(Settings, description=__doc__)
    if not Path(settings.output).name or Path(settings.output).exists():
        raise UserError(f"--output {settings.output}: expected a name that is free")
    folder = find_model(settings.model)
    config_json, config, tokenizer = pretrained.open_folder(folder)
    adapter = read_adapter(settings.adapter)
    with ranks() as here:
        model = build(config, here, torch.float32, adapt=lambda model: apply(model, adapter))
        pretrained.load(model, folder)
        load(model, settings.adapter)
        merge(model, None if settings.quantize == "none" else settings.quantize)
        if not all_finite(model, getattr(torch, settings.dtype)):
            raise UserError(f"{settings.model} with {settings.adapter}: a weight is not finite in {settings.dtype}, so "
                            "nothing was written")
        pretrained.export(model, Path(settings.output), config_json, tokenizer.files, getattr(torch, settings.dtype))
        if here.is_first:
            print(f"{settings.output}: {settings.model} with {settings.adapter} folded in")


if __name__ == "__main__":
    run(main)
