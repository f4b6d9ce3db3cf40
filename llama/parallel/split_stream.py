"""The residual stream of T tokens, split over the ranks of a tensor group: each has ceil(T / ranks) of its rows.

    rank 0   row 0  row 1  row 2              T = 5 on 2 ranks
    rank 1   row 3  row 4  (padding)          padding is cut off again when the stream is gathered

Two operations lead from the split stream to the whole one and back. Each is the other's backward:

    gather_rows   every rank gets all rows (all-gather)
    sum_rows      every rank has a partial sum of all rows, and gets the whole sum of its own rows (reduce-scatter)

Behind `gather_rows` each rank uses the whole stream for its own heads or features. So the gradient there is a partial
sum, one term on each rank, and the backward adds the terms.
Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, call this sequence parallelism.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from llama.parallel.collectives import all_gather_tensor, reduce_scatter_tensor


@torch.compiler.disable
def gather_rows(own: Tensor, group: dist.ProcessGroup, count: int | None = None) -> Tensor:
    """(ceil(T / ranks), D) on each rank -> (count, D), the first rows of the whole stream. Without `count` all of them,
    with the padding. Collective, as is its backward."""
    return _GatherRows.apply(own, group, count)


@torch.compiler.disable
def sum_rows(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(T, D), a term on each rank -> this rank's ceil(T / ranks) rows of the sum. Collective, as is its backward."""
    return _SumRows.apply(partial, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup, count: int | None) -> Tensor:
        ctx.group = group
        whole = all_gather(own, group)
        # Shortened in place, because FSDP warns of a layer that returns a view.
        return whole if count is None else whole.resize_(count, *own.shape[1:])

    @staticmethod
    def backward(ctx, d_whole: Tensor):
        return reduce_scatter(d_whole, ctx.group), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.count = len(partial)
        return reduce_scatter(partial, group)

    @staticmethod
    def backward(ctx, d_own: Tensor):
        return all_gather(d_own, ctx.group)[: ctx.count], None


def all_gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of each rank, below each other: (n, ...) -> (ranks * n, ...), for the same n on each rank."""
    whole = own.new_empty(group.size() * len(own), *own.shape[1:])
    all_gather_tensor(whole, own.contiguous(), group)
    return whole


def reduce_scatter(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the sum over ranks: (T, D) -> (ceil(T / ranks), D), with zeros as padding."""
    ranks = group.size()
    missing = -len(partial) % ranks
    padded = F.pad(partial, (0, 0, 0, missing)).contiguous()
    own = partial.new_empty(len(padded) // ranks, *partial.shape[1:])
    reduce_scatter_tensor(own, padded, group=group)
    return own
