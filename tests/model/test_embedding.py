"""The embedding's gradient against torch's own."""

import torch
from torch.nn import functional as F

from llama.model.embedding import Embedding


def test_a_token_that_comes_often_gets_its_whole_gradient_in_bf16():
    """A sum of ones in bf16 would stop at 256; equal to torch's own embedding in fp32, unseen rows included."""
    embedding = Embedding(7, 4)
    tokens = torch.tensor([3] * 3000 + [5, 0, 5])
    expected = F.embedding(tokens, embedding.weight)
    (exact,) = torch.autograd.grad(expected.sum(), embedding.weight)
    out = embedding.bfloat16()(tokens)
    assert torch.equal(out, expected.bfloat16())
    (gradient,) = torch.autograd.grad(out.sum(), embedding.weight)
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, exact.bfloat16())
