"""What one rank holds of a tensor: which slice, where it lies in the whole, and how to fill it.

    whole   the tensor as one process would have it
    slice   what this rank holds of it: its rows or columns under tensor parallelism, and of these its rows under FSDP
    part    what this rank counts and writes of its slice, where other ranks hold the same slice: some of its rows
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llama.model.sums import sum_of_squares
from llama.parallel.collectives import gather


@dataclass(frozen=True)
class TensorCut:
    """What tensor parallelism has left of a parameter to this rank: `parameter.tensor_cut`. FSDP then shards the rest.

    dim: the dimension that was cut, 0 for rows, 1 for columns; None: every rank of the tensor group holds the whole.
    start, whole: where the rest starts in this dimension, and how long the whole is in it.
    rank, ranks: this rank in its tensor group, and how many ranks that has.
    """

    dim: int | None
    start: int
    whole: int
    rank: int
    ranks: int


def tensor_cut(tensor: Tensor) -> TensorCut | None:
    """None where there is no tensor parallelism."""
    return getattr(tensor, "tensor_cut", None)


def cut_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Mark a gradient or moment as a slice of a whole, as its parameter is."""
    tensor.tensor_cut = tensor_cut(parameter)  # type: ignore[attr-defined]
    return tensor


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole of which this rank holds a slice."""
    shape = list(tensor.shape)
    cut = tensor_cut(tensor)
    if cut and cut.dim is not None:
        shape[cut.dim] = cut.whole
    return tuple(shape)


def largest_share(count: int, ranks: int) -> int:
    """How many of `count` rows, heads or tokens the fullest of `ranks` gets: count / ranks, rounded up."""
    return -(-count // ranks)


def what_is_left(shape: Sequence[int], cuts: Iterable[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    """Where a slice of a tensor starts, and its size, after one cut after the other. Pure arithmetic: no process group.

    A cut (dim, ranks, rank) divides one dimension into as many chunks as there are ranks, all of the same size, rounded
    up, and keeps the chunk of this rank: as `torch.chunk`, so the last chunks can be smaller or empty.
    """
    start, size = [0] * len(shape), list(shape)
    for dim, ranks, rank in cuts:
        chunk = largest_share(size[dim], ranks)
        before = min(rank * chunk, size[dim])
        start[dim] += before
        size[dim] = min(chunk, size[dim] - before)
    return start, size


def local_slice(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """This rank's slice of a tensor, to read or change in place, and the index in the whole at which it starts."""
    cuts: list[tuple[int, int, int]] = []
    local = tensor.detach()
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for i, placement in enumerate(tensor.placements):
            if hasattr(placement, "split_factor"):
                raise ValueError(f"{placement}: expected tensor parallelism by llama.parallel.tensor, not by DTensor")
            if hasattr(placement, "dim"):
                cuts.append((placement.dim, mesh.size(i), mesh.get_local_rank(i)))
        with torch.no_grad():
            local = tensor.to_local().detach()
    start, size = what_is_left(tensor.shape, cuts)
    if list(local.shape) != size:
        raise ValueError(f"a part of {list(tensor.shape)} is {list(local.shape)}, not {size}")
    cut = tensor_cut(tensor)
    if cut and cut.dim is not None:
        start[cut.dim] += cut.start
    return local, start


def region(start: Sequence[int], part: Tensor) -> tuple[slice, ...]:
    """The index of a slice or part that starts at `start` of the whole: whole[region(start, part)] has its shape."""
    return tuple(slice(s, s + n) for s, n in zip(start, part.shape, strict=True))


@dataclass(frozen=True)
class Part:
    """What this rank answers for of a tensor of that whole shape: `local`, which starts at `start` of the whole.

    The parts of all ranks are the whole, each number once. Ranks that hold the same slice share its rows, so that all
    of them, and all nodes, write at the same time.
    """

    shape: tuple[int, ...]
    local: Tensor
    start: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Part":
        local, start = local_slice(tensor)
        rank, ranks = _among_holders(tensor)
        if local.ndim:
            first, rows = what_is_left(local.shape[:1], [(0, ranks, rank)])
            local = local.narrow(0, first[0], rows[0])
            start[0] += first[0]
        elif rank > 0:
            local = local.flatten()[:0]
        return cls(whole_shape(tensor), local, tuple(start))

    def copied(self) -> "Part":
        """The same in host memory of its own, so that training may change the original."""
        return replace(self, local=self.local.to("cpu", copy=True))


def _among_holders(tensor: Tensor) -> tuple[int, int]:
    """This rank's number among the ranks that hold the same slice, in the order of ranks, and how many these are."""
    cut = tensor_cut(tensor)
    number, holders = 0, 1
    if isinstance(tensor, DTensor):
        for i, placement in enumerate(tensor.placements):
            if placement.is_replicate():
                number = number * tensor.device_mesh.size(i) + tensor.device_mesh.get_local_rank(i)
                holders *= tensor.device_mesh.size(i)
    elif dist.is_initialized():  # ranks of a tensor group are neighbours; all groups hold the same
        tensor_ranks = cut.ranks if cut else 1
        number = dist.get_rank() // tensor_ranks
        holders = dist.get_world_size() // tensor_ranks
    if cut and cut.dim is None:
        number = number * cut.ranks + cut.rank
        holders *= cut.ranks
    return number, holders


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by name, as the shards that are trained.

    After a forward without backward FSDP still holds gathered copies, rounded to bf16, that the optimizer does not
    know: reshard drops them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def all_finite(model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether no weight on any rank is infinite or NaN, also after conversion to `dtype`. Collective."""
    finite = True
    for parameter in sharded_parameters(model).values():
        if parameter.is_floating_point():
            local, _ = local_slice(parameter)
            finite = finite and bool(local.to(dtype or parameter.dtype).isfinite().all())
    return all(gather(finite))


@torch.no_grad()
def sum_of_squares_over_ranks(tensors: Sequence[Tensor]) -> Tensor:
    """Of all numbers of all tensors: an fp64 scalar, the same on every rank. Collective."""
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for part in map(Part.of, tensors):  # what several ranks hold counts once
        total += sum_of_squares(part.local)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def draw(parameter: Tensor, name: str, seed: int, fill: Callable[[Tensor, torch.Generator], object]) -> None:
    """Fill this rank's slice with random numbers that do not depend on the number of ranks.

    Every rank lets `fill` write the whole tensor in fp32, from a generator seeded by `seed` and `name`, and keeps its
    own slice.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    whole = torch.empty(whole_shape(parameter), dtype=torch.float32)
    fill(whole, generator)
    local, start = local_slice(parameter)
    local.copy_(whole[region(start, local)])


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered where it is sharded. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
