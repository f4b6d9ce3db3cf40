"""Frozen linears in 8 or 4 bits a weight: a base that fits where a bf16 one does not, under trainable adapters.

    int8  w = q * s          q = round(w / s) in -127..127, s = absmax(row) / 127
          One scale a row: the weight half of LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339).
    nf4   w = code[q] * a    code: 16 quantiles of a normal distribution, a = absmax of 64 neighbours in a row
          QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314); its appendix E gives the code. Weights are
          nearly normal, so quantiles make each code about equally frequent. The absmaxes are quantised again (double
          quantisation: 0.52 bytes a weight), here linearly to 8 bits with an fp32 scale a row, there to FP8.

Rows stand alone in both, so any number of ranks can hold some of them, and read and quantise just those. Weights are
made whole again in the dtype of the input whenever they are multiplied with, one linear at a time.
"""

from abc import ABC, abstractmethod
from functools import cache

import torch
from torch import Tensor, nn

from llama.boundary.errors import UserError

BLOCK = 64  # weights that share an absmax
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
MIDPOINTS = (NF4[1:] + NF4[:-1]) / 2


class QuantizedLinear(nn.Linear, ABC):
    """y = x W^T + b, with W frozen and packed. Its parameters are integers, which no mixed-precision policy rounds."""

    def __init__(self, linear: nn.Linear):
        """Takes the place of `linear`, on its device and without values: `quantize_rows` makes those."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        for name, (width, dtype) in self.packed(self.in_features).items():
            packed = torch.empty(self.out_features, width, dtype=dtype, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(packed, requires_grad=False))

    @staticmethod
    @abstractmethod
    def packed(in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        """Name, width and dtype of what stands for a row; fp32 scales are kept as their 4 bytes."""

    @staticmethod
    @abstractmethod
    def quantize_rows(rows: Tensor) -> dict[str, Tensor]:
        """rows (n, in_features), any float -> the packed tensors, n rows each."""

    @staticmethod
    @abstractmethod
    def dequantize_rows(*packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The packed tensors in their order -> rows (n, in_features)."""

    @staticmethod
    def check(name: str, linear: nn.Linear) -> None:
        """Raises UserError for a linear that cannot be packed."""

    def packed_weight(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.packed(self.in_features)}

    def base_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out_features, in_features), made whole."""
        return self.dequantize_rows(*self.packed_weight().values(), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenProduct.apply(x, self.dequantize_rows, *self.packed_weight().values())
        return y if self.bias is None else y + self.bias


class _FrozenProduct(torch.autograd.Function):
    """x W^T, keeping only the packed W for the backward, which needs d_x = d_y W and no d_W."""

    @staticmethod
    def forward(ctx, x: Tensor, dequantize, *packed: Tensor) -> Tensor:
        ctx.dequantize = dequantize
        ctx.save_for_backward(*packed)
        return x @ dequantize(*packed, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx, d_y: Tensor):
        packed = ctx.saved_tensors
        d_x = d_y @ ctx.dequantize(*packed, dtype=d_y.dtype) if ctx.needs_input_grad[0] else None
        return d_x, None, *(None for _ in packed)


class Int8Linear(QuantizedLinear):
    @staticmethod
    def packed(in_features):
        return {"weight": (in_features, torch.int8), "weight_scale": (4, torch.uint8)}

    @staticmethod
    def quantize_rows(rows):
        rows = rows.float()
        scale = rows.abs().amax(1, keepdim=True) / 127
        codes = (rows / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
        return {"weight": codes.to(torch.int8), "weight_scale": _bytes(scale)}

    @staticmethod
    def dequantize_rows(weight, scale, *, dtype):
        return weight.to(dtype) * scale.view(torch.float32).to(dtype)


class NF4Linear(QuantizedLinear):
    """Two codes a byte, the first of them in the upper four bits, as bitsandbytes packs them."""

    @staticmethod
    def check(name, linear):
        if linear.in_features % BLOCK:
            raise UserError(f"--quantize nf4: {name} has {linear.in_features} columns, expected a multiple of {BLOCK}")

    @staticmethod
    def packed(in_features):
        return {"weight": (in_features // 2, torch.uint8), "weight_absmax": (in_features // BLOCK, torch.uint8),
                "weight_scale": (4, torch.uint8)}

    @staticmethod
    def quantize_rows(rows):
        blocks = rows.float().unflatten(1, (-1, BLOCK))
        absmax = blocks.abs().amax(-1)
        normalised = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        # Halfway between two codes the lower one is taken.
        codes = torch.bucketize(normalised, MIDPOINTS.to(rows.device), out_int32=True).flatten(1).to(torch.uint8)
        scale = absmax.amax(1, keepdim=True) / 255
        coarse = (absmax / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
        # Only a block that is all zeros may get an absmax of 0.
        coarse = coarse.clamp_(min=1).where(absmax > 0, torch.zeros(()))
        return {"weight": codes[:, ::2] << 4 | codes[:, 1::2], "weight_absmax": coarse.to(torch.uint8),
                "weight_scale": _bytes(scale)}

    @staticmethod
    def dequantize_rows(weight, absmax, scale, *, dtype):
        pairs = _code_pairs(dtype, weight.device).index_select(0, weight.flatten().int()).view(dtype)
        scales = (absmax.float() * scale.view(torch.float32)).to(dtype)
        return (pairs.view(*scales.shape, BLOCK) * scales[..., None]).flatten(1)


@cache
def _code_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256): the two weights that each byte stands for, side by side in one integer: looked up at once, which is seven
    times as fast as one by one."""
    code = NF4.to(device, dtype)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()


def _bytes(scale: Tensor) -> Tensor:
    """(n, 1) fp32 -> (n, 4) uint8; n may be 0, on a rank that has no row."""
    return scale.reshape(-1).view(torch.uint8).view(-1, 4)


KINDS = {"int8": Int8Linear, "nf4": NF4Linear}


def quantize(model: nn.Module, kind: str) -> None:
    """Put quantised linears in the place of all in the decoder layers; embedding and lm_head stay as they are.

    Raises UserError for a width that does not divide into blocks.
    """
    for layer in model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                KINDS[kind].check(name, linear)
                layer.set_submodule(name, KINDS[kind](linear))


def bytes_per_weight(model: nn.Module) -> float:
    """Of the quantised linears, scales included; 0 where there are none."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    held = sum(p.numel() * p.itemsize for linear in linears for p in linear.packed_weight().values())
    return held / max(1, sum(linear.in_features * linear.out_features for linear in linears))
