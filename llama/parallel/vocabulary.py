"""Vocabulary parallelism: each rank of a tensor group has some rows of the embedding and of lm_head, one for each id.

    ids of       0 1 2 3 4 5 | 6 7 8 9 10 11
                 rank 0        rank 1

    embedding    a rank looks its own ids up and gives zeros for the others; the sum over ranks is the embedding
    logits z     a rank has those of its own ids; they are gathered only where a caller asks for them
    loss         logsumexp(z) - z[target], from three numbers a row: the largest z, the sum of exp(z), z[target]

So no rank holds all logits of a row in training. Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from llama.model import Llama
from llama.model.attention import AttentionContext
from llama.model.embedding import Embedding
from llama.model.loss import CHUNK, CHUNK_FROZEN, _SummedCrossEntropy
from llama.parallel.shards import TensorCut
from llama.parallel.split_stream import all_gather, sum_rows


class SplitEmbedding(Embedding):
    """(T) ids -> this rank's rows of the embedded stream (ceil(T / ranks), D)."""

    tensor_group: dist.ProcessGroup
    own: range  # the ids of this rank

    def forward(self, tokens: Tensor) -> Tensor:
        local, is_mine = local_ids(tokens, self.own)
        embedded = super().forward(local) * is_mine[:, None]
        return sum_rows(embedded, self.tensor_group)


class SplitHead(nn.Linear):
    """(R, D) -> the logits of all ids (R, V), gathered."""

    tensor_group: dist.ProcessGroup
    own: range  # the ids of this rank
    whole_size: int  # how many ids there are

    def forward(self, x: Tensor) -> Tensor:
        return gather_columns(super().forward(x), self.tensor_group, self.own.start, self.whole_size)


class SplitLlama(Llama):
    """A Llama whose loss is computed from the logits of each rank's own ids."""

    tensor_group: dist.ProcessGroup
    tensor_cuts: dict[str, TensorCut]  # of each parameter
    key_value_heads: int  # of this rank
    lm_head: SplitHead

    def forward(self, tokens: Tensor, context: AttentionContext, rows: Tensor, targets: Tensor) -> Tensor:
        x = self._hidden_states(tokens, context, rows)
        weight = self.lm_head.weight
        local, is_mine = local_ids(targets, self.lm_head.own)
        if not torch.is_grad_enabled():  # as in llama/model/loss.py, which says why
            x, weight = x.detach(), weight.detach()
        chunk = CHUNK if weight.requires_grad else CHUNK_FROZEN
        return split_cross_entropy(x, weight, local, is_mine, chunk, self.tensor_group)


def local_ids(ids: Tensor, own: range) -> tuple[Tensor, Tensor]:
    """Each id counted from the first one of this rank: its row in this rank's weight. And whether it is one of this
    rank's ids; for all others the row is 0, and what is read there must not count."""
    local = ids - own.start
    is_mine = (local >= 0) & (local < len(own))
    return local * is_mine, is_mine


@torch.compiler.disable
def gather_columns(own: Tensor, group: dist.ProcessGroup, start: int, whole: int) -> Tensor:
    """(R, this rank's ids) on each rank -> (R, V) on every rank. V is `whole`. Collective."""
    return _GatherColumns.apply(own, group, start, whole)


class _GatherColumns(torch.autograd.Function):
    """Every rank goes on with the same logits, so each has the whole gradient, and takes that of its own columns."""

    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup, start: int, whole: int) -> Tensor:
        ctx.columns = slice(start, start + own.shape[1])
        ranks = group.size()
        widths = [(i + 1) * whole // ranks - i * whole // ranks for i in range(ranks)]
        padded = F.pad(own, (0, max(widths) - own.shape[1]))
        parts = all_gather(padded, group).split(len(own)) if len(own) else [padded] * ranks
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    @staticmethod
    def backward(ctx, d_all: Tensor):
        return d_all[:, ctx.columns], None, None, None


@torch.compiler.disable
def split_cross_entropy(
    hidden: Tensor,  # (R, D), the same on every rank
    weight: Tensor,  # (this rank's ids, D)
    local: Tensor,  # (R): the target's row in `weight`
    is_mine: Tensor,  # (R): whether the target is one of this rank's ids
    chunk: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """The sum of -log softmax(hidden weight^T)[target] over all rows, the same on every rank: a scalar, at least fp32.

    The gradient of `hidden` is a partial sum, the term of this rank's ids. Collective; its backward is not.
    """
    return _SplitCrossEntropy.apply(hidden, weight, local, is_mine, chunk, group)


class _SplitCrossEntropy(torch.autograd.Function):
    """As _SummedCrossEntropy of llama/model/loss.py, which explains it, with two all-reduces for each chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, local, is_mine, chunk, group):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss_dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=loss_dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=loss_dtype) if need_weight else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            z = (hidden[rows] @ weight.t()).to(loss_dtype)
            counts = is_mine[rows, None].to(loss_dtype)
            losses, d_logits = _losses_of_rows(z, local[rows, None], counts, group)
            loss += losses.sum()
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.t() @ hidden[rows]
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        return *_SummedCrossEntropy.backward(ctx, d_loss), None, None


def _losses_of_rows(z: Tensor, local: Tensor, counts: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The loss of each row (rows, 1) and, in the memory of z, its gradient softmax(z) - onehot(target), both from the
    logits z (rows, this rank's ids). `counts` (rows, 1): 1 where the target is one of this rank's ids, else 0."""
    largest = z.amax(dim=-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    z -= largest  # so that exp cannot overflow
    z_target = z.gather(1, local) * counts
    z.exp_()
    sums = torch.cat([z.sum(dim=-1, keepdim=True), z_target], dim=1)
    dist.all_reduce(sums, group=group)
    exp_sum, z_target = sums.split(1, dim=1)
    d_logits = z.div_(exp_sum).scatter_add_(1, local, -counts)
    return exp_sum.log() - z_target, d_logits
