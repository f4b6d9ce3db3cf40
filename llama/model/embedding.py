"""The token embedding. Its gradient is summed in fp64, whatever the weight is in."""

import torch
from torch import Tensor, nn

from llama.model.sums import sums_by_index


class _Lookup(torch.autograd.Function):
    """weight[tokens], whose gradient adds up the occurrences of each token in fp64 and rounds once, at the end.

    On CPU, PyTorch itself adds in the dtype of the weight. In bf16, 256 + 1 is 256, so a token that occurs 3,000 times
    with a gradient of 1 would get 256 instead of 3,000; in fp32 such a sum is 1e-5 off.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight_shape = weight.shape  # all that the backward needs of the weight, with its dtype
        ctx.weight_dtype = weight.dtype
        return weight[tokens]

    @staticmethod
    def backward(ctx, d_out: Tensor):
        (tokens,) = ctx.saved_tensors
        # Sums only of tokens that occur: there are far fewer of them than rows of the weight.
        seen, index_in_seen = tokens.unique(return_inverse=True)
        sums = sums_by_index(d_out, index_in_seen, len(seen))
        d_weight = torch.zeros(ctx.weight_shape, dtype=ctx.weight_dtype, device=d_out.device)
        d_weight[seen] = sums.to(ctx.weight_dtype)
        return d_weight, None


class Embedding(nn.Embedding):
    """The row of `weight (V, D)` for each of `tokens (T)`: (T, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return _Lookup.apply(self.weight, tokens)
