"""The token embedding, with a gradient that survives half precision."""

import torch
from torch import Tensor, nn


class _Lookup(torch.autograd.Function):
    """weight[tokens], whose gradient sums the occurrences of each token in fp32 and rounds once.

    Summed in bf16, as PyTorch does on CPU, a token that comes 3,000 times with gradient 1 gets 256: adding 1 to 256
    no longer changes it. A prompt repeated in every example does that to all of its tokens.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.like_weight = weight.new_empty(0), weight.shape
        return weight[tokens]

    @staticmethod
    def backward(ctx, d_out: Tensor):
        (tokens,), (like, shape) = ctx.saved_tensors, ctx.like_weight
        seen, which = tokens.unique(return_inverse=True)
        wide = torch.promote_types(d_out.dtype, torch.float32)
        sums = torch.zeros(len(seen), shape[1], dtype=wide, device=d_out.device).index_add_(0, which, d_out.to(wide))
        d_weight = like.new_zeros(shape)
        d_weight[seen] = sums.to(like.dtype)
        return d_weight, None


class Embedding(nn.Embedding):
    """The row of `weight (V, D)` for each of `tokens (T)`: (T, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return _Lookup.apply(self.weight, tokens)
