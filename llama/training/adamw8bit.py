"""AdamW whose two moments take one byte a number each instead of four.

Dettmers et al. 2022, https://arxiv.org/abs/2110.02861: the numbers of a block share one scale, their absmax, and each
number is one of 256 values of a "dynamic" code. The code spans seven powers of ten, as moments do: its steps are 1%
near 1 and a factor of ten near 1e-7.

A block is 256 numbers, as in newer bitsandbytes (2,048 in the paper), and it ends with its row. So a moment is sharded
as its parameter is, and any number of ranks can read it back. Rows much shorter than a block cost more than a byte a
number.
"""

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from llama.boundary.errors import UserError
from llama.parallel.collectives import gather
from llama.parallel.shards import cut_as, tensor_cut, whole_shape

NUMBERS_PER_SCALE = 256
SMALL = 4096  # parameters of fewer numbers, and all but matrices, keep fp32 moments: these cost little
UPDATED_AT_ONCE = 1 << 22  # numbers; their moments are fp32 meanwhile


@cache
def dynamic_code(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values, ascending: 0, 1, and for e = 0..6 the midpoints of 2^(6 - e) equal parts of 0.1..1 times 10^-e,
    positive and negative. Unsigned: only positive, of twice as many parts."""
    values = [0.0, 1.0]
    bits = 6 if signed else 7
    for e in range(7):
        parts = 2 ** (bits - e)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2
        scaled = middles * 10.0**-e
        values += scaled.tolist()
        if signed:
            values += (-scaled).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _nearest_code(signed: bool, device: torch.device | str) -> Tensor:
    """(65536) uint8: the nearest code of each fp16 number, indexed by its bits. This is 10 times as fast as a search.

    Without a sign no number becomes 0: the update divides by the root of the second moment.
    """
    code = dynamic_code(signed)
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.float16).float().nan_to_num(0.0)
    borders = (code[1:] + code[:-1]) / 2
    nearest = torch.bucketize(numbers, borders)
    if not signed:
        nearest = nearest.clamp(min=1)
    return nearest.to(torch.uint8).to(device)


class Moment:
    """One moment of one parameter: `code` uint8 in the parameter's shape, and `absmax` (rows, blocks in a row) fp32.
    Both are sharded as the parameter is."""

    def __init__(self, parameter: Tensor, signed: bool):
        code = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
        self.code = cut_as(code, parameter)
        blocks = _blocks(parameter.shape[1])
        local = _local(parameter)
        absmax = torch.zeros(len(local), blocks, device=local.device)
        if isinstance(parameter, DTensor):
            absmax = DTensor.from_local(
                absmax,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=torch.Size((parameter.shape[0], blocks)),
                stride=(blocks, 1),
            )
        self.absmax = cut_as(absmax, parameter)
        self.signed = signed
        cut = tensor_cut(parameter)
        if cut and cut.dim == 1:  # a block is never cut: `refuse_cut_blocks`
            in_blocks = replace(cut, start=cut.start // NUMBERS_PER_SCALE, whole=_blocks(cut.whole))
            self.absmax.tensor_cut = in_blocks  # type: ignore[attr-defined]

    def read(self, rows: slice) -> Tensor:
        """fp32 values of some of this rank's rows."""
        code = _local(self.code)[rows]
        absmax = _local(self.absmax)[rows]
        table = dynamic_code(self.signed, code.device)
        values = table.index_select(0, code.flatten().int())
        blocks = _in_blocks(values.view(code.shape))
        scaled = blocks * absmax[..., None]
        return scaled.flatten(1)[:, : code.shape[1]]

    def write(self, rows: slice, values: Tensor) -> None:
        """Round to the nearest codes."""
        blocks = _in_blocks(values)
        absmax = blocks.abs().amax(-1)
        smallest = torch.finfo(torch.float32).tiny
        divisor = absmax.clamp(min=smallest)
        normalised = blocks / divisor[..., None]
        bits = normalised.half().view(torch.int16)
        index = bits.flatten().int() & 0xFFFF
        table = _nearest_code(self.signed, values.device)
        code = table.index_select(0, index)
        code = code.view(len(absmax), -1)
        _local(self.code)[rows] = code[:, : values.shape[1]]
        _local(self.absmax)[rows] = absmax


class AdamW8bit(torch.optim.Optimizer):
    """AdamW, its moments rounded to 8 bits between steps; a step itself is computed in fp32:

        m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
        w = w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)
    """

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors of a parameter's two moments, by name; zeros before its first step."""
        state = self.state[parameter]
        if not state:
            small = _is_small(parameter)
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                if small:
                    state[name] = cut_as(torch.zeros_like(parameter, requires_grad=False), parameter)
                else:
                    state[name] = Moment(parameter, signed)
            state["step"] = torch.tensor(0.0)
        tensors = {}
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            if isinstance(moment, Moment):
                tensors[f"{name}.code"] = moment.code
                tensors[f"{name}.absmax"] = moment.absmax
            else:
                tensors[name] = moment
        return tensors

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch's can be given a closure, this one cannot
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.moments(parameter)
                    self._update(parameter, parameter.grad, group, self.state[parameter])

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict, state: dict) -> None:
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        weight = _local(parameter)
        gradient = _local(gradient)
        numbers_per_row = max(1, math.prod(weight.shape[1:]))
        rows_at_once = max(1, UPDATED_AT_ONCE // numbers_per_row)
        for first in range(0, len(weight), rows_at_once):
            rows = slice(first, first + rows_at_once)
            w = weight[rows]
            g = gradient[rows].float()
            mean = _read(state["exp_avg"], rows)
            square = _read(state["exp_avg_sq"], rows)
            mean.lerp_(g, 1 - beta1)
            square.mul_(beta2)
            square.addcmul_(g, g, value=1 - beta2)
            w.mul_(1 - lr * group["weight_decay"])
            unbiased = square / (1 - beta2**step)
            denominator = unbiased.sqrt_().add_(group["eps"])
            w.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
            for name, values in (("exp_avg", mean), ("exp_avg_sq", square)):
                if isinstance(state[name], Moment):
                    state[name].write(rows, values)


def refuse_cut_blocks(model: nn.Module) -> None:
    """Raises UserError, on every rank, if tensor parallelism cuts a matrix inside a block of columns. Collective."""
    problems = []
    for name, parameter in model.named_parameters():
        cut = tensor_cut(parameter)
        has_blocks = parameter.requires_grad and not _is_small(parameter)
        if has_blocks and cut and cut.dim == 1 and cut.start % NUMBERS_PER_SCALE:
            where = f"--tensor_parallel {cut.ranks} cuts {name} at column {cut.start}"
            problems.append(f"{where}, expected a multiple of {NUMBERS_PER_SCALE}")
    found = [problem for of_rank in gather(problems) for problem in of_rank]
    if found:
        raise UserError(f"--optimizer adamw8bit: {found[0]}, because so many numbers share a scale; use adamw")


def _is_small(parameter: Tensor) -> bool:
    """Whether its moments are not rounded."""
    return parameter.ndim != 2 or math.prod(whole_shape(parameter)) < SMALL


def _blocks(columns: int) -> int:
    return -(-columns // NUMBERS_PER_SCALE)


def _read(moment: Moment | Tensor, rows: slice) -> Tensor:
    """fp32 values of some of this rank's rows: a view of an fp32 moment, a copy of an 8-bit one."""
    return moment.read(rows) if isinstance(moment, Moment) else _local(moment)[rows]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _in_blocks(values: Tensor) -> Tensor:
    """(rows, columns) -> (rows, blocks, 256), the last block of a row filled up with zeros."""
    missing = -values.shape[1] % NUMBERS_PER_SCALE
    padded = F.pad(values, (0, missing))
    return padded.unflatten(1, (-1, NUMBERS_PER_SCALE))
