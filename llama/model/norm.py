"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.Module):
    """Scale the features of every token to a root mean square of 1, then multiply them by a learned weight:

        y = weight * x / sqrt(mean(x^2) + eps)

    x (T, D) of any dtype; the mean over D is taken in fp32. Returns (T, D).
    Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)
