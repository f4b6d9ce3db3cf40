"""Cross-entropy over the vocabulary that never holds the logits of all rows at once."""

import torch
from torch import Tensor

# Rows whose logits exist at the same time: 512 x 128,256 in fp32 are 263 MB, and there are two such tensors.
CHUNK = 512
# Each chunk updates the whole gradient (V, D) of the weight: use few, large chunks. If frozen, small ones save memory.
CHUNK_FROZEN = 256


class _SummedCrossEntropy(torch.autograd.Function):
    """Loss and gradient of a chunk of rows, computed from the same logits z:

        loss = sum_i logsumexp(z_i) - z_i[target_i]        dz_i = softmax(z_i) - onehot(target_i)

    The gradient of a row needs only the logits of that row. So the forward computes the gradient as well, and then
    frees the logits before the next chunk. The backward multiplies the stored gradient by that of the loss.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss_dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=loss_dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=loss_dtype) if need_weight else None
        for start in range(0, len(targets), chunk):
            rows = hidden[start : start + chunk]
            target = targets[start : start + chunk, None]
            # From the logits to their gradient in place. (log_softmax adds V numbers one by one on a CPU: 1e-5 off.)
            z = (rows @ weight.t()).to(loss_dtype)
            z -= z.amax(dim=-1, keepdim=True)  # so that exp cannot overflow
            z_target = z.gather(1, target)
            sums = z.exp_().sum(dim=-1, keepdim=True)
            loss += (sums.log() - z_target).sum()
            if not (need_hidden or need_weight):
                continue
            minus_one = -torch.ones_like(target, dtype=loss_dtype)
            d_logits = z.div_(sums).scatter_add_(1, target, minus_one).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[start : start + chunk] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.t() @ rows
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * d_loss
        d_weight = None if d_weight is None else d_weight * d_loss
        return d_hidden, d_weight, None, None


def summed_cross_entropy(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R) in 0..V-1
    chunk: int | None = None,  # rows whose logits exist at the same time
) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight^T)[target], in nats.

    Matrix products run in the dtype of the inputs, softmax and sum in fp32 (fp64 for fp64 inputs). Returns a scalar of
    that dtype; R = 0 gives 0 and zero gradients.
    """
    # Under no_grad, ctx.needs_input_grad is still True for a trainable tensor; detach() avoids a useless gradient.
    if not torch.is_grad_enabled():
        hidden = hidden.detach()
        weight = weight.detach()
    if chunk is None:
        chunk = CHUNK if weight.requires_grad else CHUNK_FROZEN
    return _SummedCrossEntropy.apply(hidden, weight, targets, chunk)
