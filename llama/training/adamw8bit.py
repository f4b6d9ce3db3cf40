"""AdamW whose two moments take one byte a number each instead of four.

Dettmers et al. 2022, https://arxiv.org/abs/2110.02861: the numbers of a block share their absmax, and each is one of
256 values of a "dynamic" code that spans seven powers of ten, as moments do: within 1% near 1, a decade near 1e-7.
Blocks are of 256 numbers, as in newer bitsandbytes (the paper's had 2,048), and end with their row. So a moment is cut
among ranks as its parameter is and reads back on any number of them; rows much shorter than a block cost more than a
byte a number.
"""

from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

BLOCK = 256
SMALL = 4096  # numbers: smaller parameters, and all but matrices, keep fp32 moments: they cost little
PIECE = 1 << 22  # numbers that are fp32 at a time


@cache
def dynamic_code(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values in ascending order: 0, 1, and for e = 0..6 the middles of 2^(6 - e) equal parts of 0.1..1, times
    10^-e and with both signs; without a sign of twice as many parts."""
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e + (not signed)) + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**-e
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _nearest_code(signed: bool, device: torch.device | str) -> Tensor:
    """(65536) uint8: the nearest code of each fp16 number, by its bits. Looking it up is 10 times as fast as a search.

    Without a sign nothing becomes 0: a second moment that vanished would be divided by.
    """
    code = dynamic_code(signed)
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float().nan_to_num(0.0)
    nearest = torch.bucketize(numbers, (code[1:] + code[:-1]) / 2)
    return (nearest if signed else nearest.clamp(min=1)).to(torch.uint8).to(device)


class Moment:
    """One moment of one parameter: code (as the parameter's shape) uint8 and absmax (rows, blocks in a row) fp32, both
    sharded as the parameter is."""

    def __init__(self, parameter: Tensor, signed: bool):
        self.code = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
        blocks = -(-parameter.shape[1] // BLOCK)
        absmax = torch.zeros(len(_local(parameter)), blocks, device=_local(parameter).device)
        if isinstance(parameter, DTensor):
            shape = (parameter.shape[0], blocks)
            absmax = DTensor.from_local(absmax, parameter.device_mesh, parameter.placements, run_check=False,
                                        shape=torch.Size(shape), stride=(blocks, 1))
        self.absmax = absmax
        self.signed = signed

    def read(self, rows: slice) -> Tensor:
        """fp32 values of some of this rank's rows."""
        code, absmax = _local(self.code)[rows], _local(self.absmax)[rows]
        values = dynamic_code(self.signed, code.device).index_select(0, code.flatten().int()).view(code.shape)
        return (_in_blocks(values) * absmax[..., None]).flatten(1)[:, : code.shape[1]]

    def write(self, rows: slice, values: Tensor) -> None:
        """Round to the nearest codes."""
        blocks = _in_blocks(values)
        absmax = blocks.abs().amax(-1)
        normalised = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        bits = normalised.half().view(torch.int16).flatten().int() & 0xFFFF
        code = _nearest_code(self.signed, values.device).index_select(0, bits).view(*absmax.shape[:1], -1)
        _local(self.code)[rows] = code[:, : values.shape[1]]
        _local(self.absmax)[rows] = absmax


class AdamW8bit(torch.optim.Optimizer):
    """AdamW, its moments rounded to 8 bits between steps; a step itself is computed in fp32:

        m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
        w = w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """What a checkpoint has to keep of a parameter, by name; zeros before its first step."""
        state = self.state[parameter]
        if not state:
            small = parameter.ndim != 2 or parameter.numel() < SMALL
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                state[name] = torch.zeros_like(parameter, requires_grad=False) if small else Moment(parameter, signed)
            state["step"] = torch.tensor(0.0)
        named = {}
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            named |= {name: moment} if isinstance(moment, Tensor) else \
                {f"{name}.code": moment.code, f"{name}.absmax": moment.absmax}
        return named

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.moments(parameter)
                    self._update(parameter, group, self.state[parameter])

    def _update(self, parameter: Tensor, group: dict, state: dict) -> None:
        state["step"] += 1
        (beta1, beta2), step = group["betas"], float(state["step"])
        weight, gradient = _local(parameter), _local(parameter.grad)
        per_row = max(1, weight[0].numel()) if len(weight) else 1
        for first in range(0, len(weight), max(1, PIECE // per_row)):
            rows = slice(first, first + max(1, PIECE // per_row))
            w, g = weight[rows], gradient[rows].float()
            mean, square = (_local(m)[rows] if isinstance(m, Tensor) else m.read(rows)
                            for m in (state["exp_avg"], state["exp_avg_sq"]))
            mean.lerp_(g, 1 - beta1)
            square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.mul_(1 - group["lr"] * group["weight_decay"])
            denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            w.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
            for name, values in (("exp_avg", mean), ("exp_avg_sq", square)):
                if isinstance(state[name], Moment):
                    state[name].write(rows, values)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _in_blocks(values: Tensor) -> Tensor:
    """(rows, columns) -> (rows, blocks, 256), the last block of a row filled up with zeros."""
    return F.pad(values, (0, -values.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
