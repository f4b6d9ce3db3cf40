"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Scale every token's features to unit root mean square, then by a learned weight:

        y = weight * x / sqrt(mean(x^2) + eps)

    The mean is taken over D in fp32 whatever the dtype of `x (T, D)`.
    Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
