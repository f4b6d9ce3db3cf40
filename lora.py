"""Low-rank adapters (LoRA), by hand: a few trainable numbers beside a frozen model.

    y = W x + s B A x        A (r, in) random, B (out, r) zeros: at the start y is what the base alone computes

Full fine-tuning takes 16 bytes a weight: 4 for W, 4 for its gradient, 8 for its moments. With LoRA, W is frozen and
takes only 2 in bf16 (the backward still runs through it). Hu et al. 2021, https://arxiv.org/abs/2106.09685. The scale s
is alpha / r, or alpha / sqrt(r) in rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732), so that the size of
an update does not shrink with the rank. DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) also learns the length
m of each row:

    y = m / ||W + s B A|| (W + s B A) x        ||.|| is one norm per row (out); no gradient flows through it

`apply_adapter` puts adapters into a finished model. Run as a script, this file merges an adapter into its base:

    python lora.py --model DIR --adapter runs/alpaca-DIR --output merged
"""

from llama.boundary.command_line import announce, parse, run
from llama.storage.settings import MergeSettings

if __name__ == "__main__":  # --help and mistyped flags need not wait until torch is imported
    run(lambda: parse(MergeSettings, description=__doc__))

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama.boundary.choices import ALL_LINEAR
from llama.boundary.errors import UserError, as_user_error
from llama.model import Llama
from llama.model.quantize import KINDS, Int8Linear, NF4Linear, QuantizedLinear, quantize
from llama.model.sums import row_lengths
from llama.parallel.distribute import distribute, keep_frozen_in, on_meta
from llama.parallel.processes import Process, join
from llama.parallel.shards import all_finite, draw, local_slice, whole_tensor
from llama.storage.base import Base
from llama.storage.peft import Adapter, adapter_notes, load_adapter, read_adapter
from llama.storage.pretrained import export_model
from llama.storage.rounding import Rounding
from llama.training.finished_run import from_runs
from llama.training.model_card import companions_of_merge


class LoRALinear(nn.Linear):
    """A linear with an adapter. `weight` and `bias` keep their names, so base checkpoints load untouched.

    Its children are lora_A and lora_B, and for DoRA there is the parameter lora_magnitude_vector (out). Freezing the
    base is up to `apply_adapter`. Dropout, where asked for, is on the adapter's input only.
    """

    def add_adapter(self, adapter: Adapter) -> None:
        device = self.weight.device
        self.scaling, self.dropout = adapter.scaling, adapter.dropout
        # fp32 whatever the base is in: bf16 would round most updates away.
        self.lora_A = nn.Linear(self.in_features, adapter.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(adapter.rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        self.lora_magnitude_vector = Magnitude(self.out_features, device) if adapter.variant == "dora" else None

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        base = super().forward(x)
        dropped = self.drop(x) if self.dropout else x
        low = self.lora_A(dropped) * self.scaling  # (T, r)
        y = torch.addmm(base, low, self.lora_B.weight.t())
        if self.lora_magnitude_vector is None:
            return y
        magnitude = self.lora_magnitude_vector.weight
        # FSDP gathers m in the compute dtype. Norms rounded to it, too, make the ratio exactly 1 at the start.
        ratio = length_ratio(magnitude, self.row_norms().to(magnitude.dtype))
        return y * ratio if self.bias is None else y + (ratio - 1) * (y - self.bias)  # the bias is not scaled

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """||W + s B A|| of each row (out), fp32 (fp64 for an adapter in fp64)."""
        weight = self.base_weight() if isinstance(self, QuantizedLinear) else self.weight
        dtype = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        low = self.lora_A.weight.to(dtype) * self.scaling
        return self.lengths(torch.addmm(weight.to(dtype), self.lora_B.weight.to(dtype), low))

    lengths = staticmethod(row_lengths)  # tensor parallelism replaces it where a rank has some columns only


class LoRAInt8Linear(LoRALinear, Int8Linear):
    """An adapter over a frozen linear of 8 bits a weight."""


class LoRANF4Linear(LoRALinear, NF4Linear):
    """An adapter over a frozen linear of 4 bits a weight (QLoRA)."""


WITH_ADAPTER = {nn.Linear: LoRALinear, Int8Linear: LoRAInt8Linear, NF4Linear: LoRANF4Linear}


class Magnitude(nn.Module):
    """DoRA's length of each row of a linear, `weight` (out): a module only so that it can be taken off again."""

    def __init__(self, out_features: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, device=device, dtype=torch.float32))


def length_ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / ||W + s B A|| for each row; 1 for a row of zeros, which has no direction to stretch."""
    is_zero = norms == 0
    return (magnitude + is_zero) / (norms + is_zero)


def apply_adapter(model: Llama, adapter: Adapter) -> None:
    """Freeze the model and put an adapter on each target, in place: every base parameter keeps its name.

    A target is the end of a module's name, such as q_proj, or `all-linear`: all in the decoder layers. Raises
    UserError for a target that matches nothing.
    """
    model.requires_grad_(False)
    linears = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    chosen = set()
    for target in adapter.targets:
        # A target may be any end of the full name "model.layers.0.mlp.up_proj", as in PEFT; whole words only.
        found = [name for name in linears if target == ALL_LINEAR or f".model.layers.{name}".endswith(f".{target}")]
        if not found:
            expected = f"{ALL_LINEAR} or some of {', '.join(dict.fromkeys(n.rpartition('.')[2] for n in linears))}"
            raise UserError(f"LoRA target {target!r:.80}: no such linear in the decoder layers, expected {expected}")
        chosen.update(found)
    for name in chosen:
        linear = linears[name]
        # Change the object's class instead of wrapping it (FSDP does the same): parameter names and hooks stay.
        linear.__class__ = WITH_ADAPTER[type(linear)]
        assert isinstance(linear, LoRALinear)
        linear.add_adapter(adapter)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def initialize_adapter(model: nn.Module, seed: int) -> None:
    """Set lora_A to uniform in +-1/sqrt(in) (as PEFT does, He et al. 2015), lora_B to 0, m to the norms of W's rows.

    The base weights must be loaded already. The numbers do not depend on the number of ranks.
    """

    def uniform(whole: Tensor, generator: torch.Generator) -> None:
        whole.uniform_(-1, 1, generator=generator)
        whole /= math.sqrt(whole.shape[1])  # whole: (r, in)

    for name, linear in adapted(model).items():
        draw(linear.lora_A.weight, name, seed, uniform)
        local_slice(linear.lora_B.weight)[0].zero_()
        if linear.lora_magnitude_vector is not None:
            magnitude = local_slice(linear.lora_magnitude_vector.weight)[0]
            magnitude.copy_(linear.lengths(_local_rows(linear).to(magnitude.dtype)))


def _local_rows(linear: LoRALinear) -> Tensor:
    """This rank's rows of W."""
    if not isinstance(linear, QuantizedLinear):
        return local_slice(linear.weight)[0]
    packed = [local_slice(tensor)[0] for tensor in linear.packed_weight().values()]
    return linear.dequantize_rows(*packed, dtype=torch.float32)


@torch.no_grad()
def merge(model: Llama, quantized: str | None = None, rounding: Rounding | None = None) -> None:
    """Add every adapter to its base weight and remove it; the model's output stays the same. Collective.

    W <- W + s B A, and for DoRA its rows scaled to length m. `quantized`: int8 or nf4 if the adapter was trained over
    such a base. Then W is first rounded in the same way, because the adapter has learned to correct that rounding.
    `rounding` adds up the changes. Raises ValueError if the model itself is quantised, and where `quantize` would.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("merge: the model is quantised; open it without --quantize and pass `quantized` instead")
    if quantized:
        _round_as(model, quantized)
    for linear in adapted(model).values():
        weight = local_slice(linear.weight)[0]
        low = whole_tensor(linear.lora_A.weight.detach())
        delta = local_slice(linear.lora_B.weight)[0].float() @ low.float()
        rows = weight.float() + linear.scaling * delta
        if linear.lora_magnitude_vector is not None:
            magnitude = local_slice(linear.lora_magnitude_vector.weight)[0].float()
            rows *= length_ratio(magnitude, row_lengths(rows))[:, None]
        if rounding:
            rounding.add(weight, rows)
        weight.copy_(rows)
        plain: nn.Linear = linear
        plain.__class__ = nn.Linear
        for child in ("lora_A", "lora_B", "lora_magnitude_vector"):
            delattr(plain, child)


def _round_as(model: Llama, kind: str) -> None:
    """Round the linears of the decoder layers as `quantize` does, and keep them as plain weights."""
    packed = KINDS[kind]
    for name, linear in model.layers.named_modules():
        if isinstance(linear, nn.Linear) and ".lora_" not in name:
            packed.check(name, linear)
            weight = local_slice(linear.weight)[0]
            weight.copy_(packed.dequantize_rows(*packed.quantize_rows(weight).values(), dtype=torch.float32))


@dataclass(frozen=True)
class Changes:
    """What is done to a model before it is sharded: linears packed, an adapter put on, parts frozen."""

    quantize: str = "none"
    adapter: Adapter | None = None
    train_layers: str = "all"  # "none" freezes everything, for a model that is only used
    adapter_folder: str | None = None  # where the adapter's weights are; None: they start from random ones

    def apply(self, model: Llama) -> None:
        """Quantise first: it replaces the linears that the adapter is then put on. Raises UserError on a misfit."""
        if self.quantize != "none":
            with as_user_error(f"--quantize {self.quantize}"):
                quantize(model, self.quantize)
        if self.adapter:
            apply_adapter(model, self.adapter)
        if self.train_layers == "none":
            model.requires_grad_(False)
        elif self.train_layers != "all":
            train_only(model, self.train_layers.split(","))

    def load(self, model: Llama, seed: int = 0) -> None:
        """Fill the adapter of a sharded model whose base is loaded. Collective."""
        if self.adapter_folder:
            load_adapter(model, self.adapter_folder)
        elif self.adapter:
            initialize_adapter(model, seed)


def train_only(model: Llama, parts: list[str]) -> None:
    """Freeze all but the named parts: last:N layers, norm, lm_head, embed_tokens.

    The backward stops at the lowest trained part: autograd computes nothing below it. Raises UserError for a part that
    the model does not have.
    """
    model.requires_grad_(False)
    both_ends = {"lm_head", "embed_tokens"}
    for part in parts:
        name, _, count = part.partition(":")
        if name == "last":
            if int(count) > len(model.layers):
                raise UserError(f"--train_layers {part}: the model has {len(model.layers)} layers")
            model.layers[-int(count) :].requires_grad_(True)
            continue
        if model.config.tie_word_embeddings and name in both_ends and not both_ends <= set(parts):
            raise UserError(f"--train_layers {part}: lm_head and embed_tokens are one matrix, expected both or neither")
        getattr(model, name).requires_grad_(True)


def open_model(base: Base, changes: Changes, process: Process, dtype: torch.dtype, whole: bool = False) -> Llama:
    """The model that `base` and `changes` describe, with its weights: sharded, as fsdp_train.build does. Or `whole`, to
    be used and not trained: all of it on this rank, frozen, in `dtype`, without FSDP around it."""
    model = on_meta(base.config)
    changes.apply(model)
    if whole:
        keep_frozen_in(dtype, model.requires_grad_(False))
        model.eval().to_empty(device=process.device)
    else:
        distribute(model, process, dtype)
    base.load(model)
    changes.load(model)
    return model


def main() -> None:
    settings = from_runs(parse(MergeSettings, description=__doc__))
    output = Path(settings.output)
    if not output.name or output.exists():
        raise UserError(f"--output {settings.output}: expected a name that is free")
    base = Base.pretrained(settings.model)
    announce([*base.notes, *adapter_notes(settings.adapter)])
    rounding = Rounding(getattr(torch, settings.dtype) if settings.dtype else base.dtype)
    changes = Changes(adapter=read_adapter(settings.adapter), adapter_folder=settings.adapter)
    with join() as process:
        model = open_model(base, changes, process, torch.float32)
        with as_user_error(f"--quantize {settings.quantize}"):
            merge(model, None if settings.quantize == "none" else settings.quantize, rounding)
        if not all_finite(model, rounding.dtype):
            problem = f"a weight is not finite in {rounding.dtype_name}, so nothing was written"
            raise UserError(f"{settings.model} with {settings.adapter}: {problem}")
        export_model(model, output, base.config_json, companions_of_merge(base, Path(settings.adapter)), rounding.dtype)
        about = rounding.sentence("use --dtype float32, or keep the adapter beside its base")
        if process.is_rank_zero:
            print(f"{output}: {settings.model} with {settings.adapter} folded in; {about}")


if __name__ == "__main__":
    run(main, keep_going=True)
