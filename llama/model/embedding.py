"""The token embedding. Its gradient is summed in fp64, whatever the weight is in."""

import torch
from torch import Tensor, nn

SUMMED_AT_ONCE = 1 << 20  # numbers; as fp64 they take 8 MB


class _Lookup(torch.autograd.Function):
    """weight[tokens], whose gradient adds up the occurrences of each token in fp64 and rounds once, at the end.

    On CPU, PyTorch itself adds in the dtype of the weight. In bf16, 256 + 1 is 256, so a token that occurs 3,000 times
    with a gradient of 1 would get 256 instead of 3,000. A prompt that is repeated in every example has such tokens.
    In fp32 such a sum is off by 1e-5.
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
        d_weight = torch.zeros(ctx.weight_shape, dtype=ctx.weight_dtype, device=d_out.device)
        at_once = max(1, SUMMED_AT_ONCE // max(1, len(tokens)))
        for first in range(0, d_out.shape[1], at_once):
            columns = slice(first, first + at_once)
            terms = d_out[:, columns].double()
            sums = torch.zeros(len(seen), terms.shape[1], dtype=terms.dtype, device=terms.device)
            d_weight[seen, columns] = sums.index_add_(0, index_in_seen, terms).to(ctx.weight_dtype)
        return d_weight, None


class Embedding(nn.Embedding):
    """The row of `weight (V, D)` for each of `tokens (T)`: (T, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return _Lookup.apply(self.weight, tokens)
