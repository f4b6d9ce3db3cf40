"""RMSNorm in half precision; the decoder's tests compare it with transformers'."""

import torch

from llama.model.norm import RMSNorm


def test_a_bf16_norm_takes_its_mean_in_fp32():
    """RMSNorm of bf16 input differs from the float64 value by the rounding of the result alone."""
    norm = RMSNorm(4096, 1e-5).bfloat16()
    x = (3 * torch.randn(8, 4096) + 1).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert ((norm(x).double() - exact).abs() <= 2**-8 * exact.abs()).all()
