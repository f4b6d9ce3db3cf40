"""Frozen linears in 8 or 4 bits a weight: under trainable adapters, a model fits where it would not in bf16.

    int8  w = q * s          q = round(w / s) in -127..127, s = absmax(row) / 127
          One scale a row: the weight half of LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339).
    nf4   w = code[q] * a    code: 16 quantiles of a normal distribution, a = absmax of 64 neighbours in a row
          QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314); its appendix E gives the code. Weights are
          nearly normal, so with quantiles each code is about equally frequent. The absmaxes are quantised as well
          (double quantisation, 0.52 bytes a weight): here linearly to 8 bits with an fp32 scale a row, in QLoRA to FP8.

absmax is the largest absolute value. Each row is quantised by itself, so a rank can read and quantise just the rows it
keeps. A linear makes its weight whole again, in the dtype of its input, each time it multiplies.
"""

from abc import ABC, abstractmethod
from functools import cache

import torch
from torch import Tensor, nn

from llama.model.decoder import Llama

WEIGHTS_PER_SCALE = 64  # neighbours in a row that share an absmax in nf4
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
MIDPOINTS = (NF4[1:] + NF4[:-1]) / 2
SMALLEST = torch.finfo(torch.float32).tiny  # the divisor where all weights are zeros


class QuantizedLinear(nn.Linear, ABC):
    """y = x W^T + b, with W frozen and packed. Its parameters are integers, which mixed precision never rounds."""

    def __init__(self, linear: nn.Linear):
        """Take the place of `linear`, on its device; the packed tensors wait for what `quantize_rows` returns."""
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the whole weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        for name, (width, dtype) in self.packed(self.in_features).items():
            packed = torch.empty(self.out_features, width, dtype=dtype, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(packed, requires_grad=False))

    @staticmethod
    @abstractmethod
    def packed(in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        """Name, width and dtype of the tensors that replace a weight. An fp32 scale is stored as its 4 bytes."""

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
        """Raises ValueError for a linear that cannot be packed."""

    def packed_weight(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.packed(self.in_features)}

    def base_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out_features, in_features), made whole."""
        return self.dequantize_rows(*self.packed_weight().values(), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in_features) -> (T, out_features)."""
        y = _FrozenProduct.apply(x, self.dequantize_rows, *self.packed_weight().values())
        return y if self.bias is None else y + self.bias


class _FrozenProduct(torch.autograd.Function):
    """x W^T. For the backward, d_x = d_y W, only the packed W is kept and made whole again. W has no gradient."""

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
    """One byte a weight and one scale a row."""

    @staticmethod
    def packed(in_features):
        return {"weight": (in_features, torch.int8), "weight_scale": (4, torch.uint8)}

    @staticmethod
    def quantize_rows(rows):
        rows = rows.float()
        scale = rows.abs().amax(1, keepdim=True) / 127
        codes = (rows / scale.clamp(min=SMALLEST)).round_()
        return {"weight": codes.to(torch.int8), "weight_scale": _bytes(scale)}

    @staticmethod
    def dequantize_rows(*packed, dtype):
        weight, scale = packed
        return weight.to(dtype) * scale.view(torch.float32).to(dtype)


class NF4Linear(QuantizedLinear):
    """Two weights a byte, the first of them in the upper four bits, as bitsandbytes packs them."""

    @staticmethod
    def check(name, linear):
        if linear.in_features % WEIGHTS_PER_SCALE:
            raise ValueError(f"{name} has {linear.in_features} columns, expected a multiple of {WEIGHTS_PER_SCALE}")

    @staticmethod
    def packed(in_features):
        return {
            "weight": (in_features // 2, torch.uint8),
            "weight_absmax": (in_features // WEIGHTS_PER_SCALE, torch.uint8),
            "weight_scale": (4, torch.uint8),
        }

    @staticmethod
    def quantize_rows(rows):
        blocks = rows.float().unflatten(1, (-1, WEIGHTS_PER_SCALE))  # (n, in_features / 64, 64)
        absmax = blocks.abs().amax(-1)
        normalised = blocks / absmax.clamp(min=SMALLEST)[..., None]
        # The nearest code is the number of midpoints below; exactly between two codes it is the lower one.
        codes = torch.bucketize(normalised, MIDPOINTS.to(rows.device), out_int32=True)
        codes = codes.flatten(1).to(torch.uint8)
        scale = absmax.amax(1, keepdim=True) / 255
        coarse = (absmax / scale.clamp(min=SMALLEST)).round_()
        # An absmax that is rounded to 0 would erase its block: only a block of zeros may have it.
        coarse = coarse.clamp_(min=1).where(absmax > 0, torch.zeros(()))
        return {
            "weight": codes[:, ::2] << 4 | codes[:, 1::2],
            "weight_absmax": coarse.to(torch.uint8),
            "weight_scale": _bytes(scale),
        }

    @staticmethod
    def dequantize_rows(*packed, dtype):
        weight, absmax, scale = packed
        pairs = _code_pairs(dtype, weight.device).index_select(0, weight.flatten().int()).view(dtype)
        scales = (absmax.float() * scale.view(torch.float32)).to(dtype)
        return (pairs.view(*scales.shape, WEIGHTS_PER_SCALE) * scales[..., None]).flatten(1)


@cache
def _code_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256): the two codes of each possible byte, side by side in the bits of one integer. One look-up then gives two
    weights, which is seven times as fast as taking the byte apart."""
    code = NF4.to(device, dtype)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()


def _bytes(scale: Tensor) -> Tensor:
    """(n, 1) fp32 -> (n, 4) uint8; n is 0 on a rank that has no row."""
    return scale.reshape(-1).view(torch.uint8).view(-1, 4)


KINDS = {"int8": Int8Linear, "nf4": NF4Linear}


def quantize(model: Llama, kind: str) -> None:
    """Replace each linear of the decoder layers by a quantised one, without values. Embedding and lm_head stay.

    Raises ValueError for a linear that cannot be packed: its name, its columns, what was expected.
    """
    for layer in model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                KINDS[kind].check(name, linear)
                layer.set_submodule(name, KINDS[kind](linear))


def bytes_per_weight(model: nn.Module) -> float:
    """Bytes that a weight of the quantised linears takes, scales included; 0 where no linear is quantised."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    packed = [tensor for linear in linears for tensor in linear.packed_weight().values()]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    held = sum(tensor.numel() * tensor.itemsize for tensor in packed)
    return held / max(1, weights)
