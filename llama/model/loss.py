"""Cross-entropy over the vocabulary without ever holding all the logits."""

import torch
from torch import Tensor

# Rows of logits alive at once; 512 x 128,256 in fp32 are 263 MB, and there are two such. Each chunk adds to the whole
# gradient of the weight; where none is wanted, as under an adapter, smaller ones cost nothing.
CHUNK, CHUNK_FROZEN = 512, 256


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient of a row's loss needs only that row's logits, so both are computed in one visit:

        loss = sum_i logsumexp(z_i) - z_i[target_i]        dz_i = softmax(z_i) - onehot(target_i)

    and the logits of a chunk are dropped before the next is made.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
                           device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=loss.dtype) if need_weight else None
        for start in range(0, len(targets), chunk):
            h, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            log_p = torch.log_softmax((h @ weight.t()).to(loss.dtype), dim=-1)
            loss -= log_p.gather(1, target).sum()
            if need_hidden or need_weight:
                d_logits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=loss.dtype))
                d_logits = d_logits.to(hidden.dtype)
                if need_hidden:
                    d_hidden[start : start + chunk] = d_logits @ weight
                if need_weight:
                    d_weight += d_logits.t() @ h
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = (None if d is None else d * d_loss for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight^T)[target], in nats.

    hidden (R, D), weight (V, D), targets (R) in 0..V-1. Matrix products run in the dtype of the inputs, softmax and
    sum in fp32 (fp64 for fp64 inputs). Returns a scalar of that dtype; R = 0 gives 0 and zero gradients.
    """
    if not torch.is_grad_enabled():  # needs_input_grad looks at the inputs alone, and would have gradients computed
        hidden, weight = hidden.detach(), weight.detach()
    chunk = chunk or (CHUNK if weight.requires_grad else CHUNK_FROZEN)
    return _SummedCrossEntropy.apply(hidden, weight, targets, chunk)
