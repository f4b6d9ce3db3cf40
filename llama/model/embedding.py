"""The token embedding. Its gradient is summed in fp32, also when the weight is bf16."""

import torch
from torch import Tensor, nn


class _Lookup(torch.autograd.Function):
    """weight[tokens], whose gradient adds up the occurrences of each token in fp32 and rounds once, at the end.

    On CPU, PyTorch itself adds in the dtype of the weight. In bf16, 256 + 1 is 256, so a token that occurs 3,000 times
    with a gradient of 1 would get 256 instead of 3,000. A prompt that is repeated in every example has such tokens.
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
        # One fp32 row for each token that occurs: there are far fewer of them than rows of the weight.
        seen, index_in_seen = tokens.unique(return_inverse=True)
        sum_dtype = torch.promote_types(d_out.dtype, torch.float32)
        sums = torch.zeros(len(seen), d_out.shape[1], dtype=sum_dtype, device=d_out.device)
        sums.index_add_(0, index_in_seen, d_out.to(sum_dtype))
        d_weight = torch.zeros(ctx.weight_shape, dtype=ctx.weight_dtype, device=d_out.device)
        d_weight[seen] = sums.to(ctx.weight_dtype)
        return d_weight, None


class Embedding(nn.Embedding):
    """The row of `weight (V, D)` for each of `tokens (T)`: (T, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return _Lookup.apply(self.weight, tokens)
