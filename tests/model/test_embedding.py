"""The embedding's gradient against torch's own, and against exact sums."""

import torch
from torch.nn import functional as F

from llama.model.embedding import Embedding
from llama.model.sums import SUMMED_AT_ONCE


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


def test_a_token_that_comes_often_gets_its_exact_gradient_in_fp32():
    """3,000 terms added one by one in fp32 are off by 1e-5. There are more columns than are added at once."""
    columns = 2 * (SUMMED_AT_ONCE // 3003) + 1
    embedding = Embedding(7, columns)
    tokens = torch.tensor([3] * 3000 + [5, 0, 5])
    embedding(tokens).backward(torch.full((3003, columns), 0.1))
    term = torch.tensor(0.1).double()
    expected = torch.zeros(7, columns, dtype=torch.float64)
    expected[[0, 3, 5]] = torch.stack([term, 3000 * term, 2 * term])[:, None]
    torch.testing.assert_close(embedding.weight.grad.double(), expected, rtol=1e-7, atol=0)
