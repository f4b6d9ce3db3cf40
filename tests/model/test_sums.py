"""Sums of many fp32 numbers against sums in float64."""

import pytest
import torch

from llama.model.sums import row_lengths, sum_of_squares, sums_by_index

KINDS = {
    "alike": lambda *shape: torch.full(shape, 0.1),  # each rounding of a sum errs to the same side
    "random": lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0)),
    "some large": lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0)) ** 5,
}


@pytest.mark.parametrize("numbers", KINDS.values(), ids=KINDS.keys())
def test_sums_are_exact(numbers):
    """One by one in fp32 they are 1e-6 to 1e-3 off."""
    many = numbers(3001, 1000)
    assert float(sum_of_squares(many)) == pytest.approx(float(many.double().pow(2).sum()), rel=1e-10)
    rows = numbers(3, 28_672)
    torch.testing.assert_close(row_lengths(rows).double(), rows.double().norm(dim=1), rtol=2e-7, atol=0)
    terms, index = numbers(10_000, 300), torch.arange(10_000) % 3 % 2
    expected = torch.stack([terms[index == i].double().sum(0) for i in (0, 1)])
    torch.testing.assert_close(sums_by_index(terms, index, 2).double(), expected, rtol=1e-7, atol=0)


def test_sums_of_nothing_are_zero():
    assert float(sum_of_squares(torch.empty(0))) == 0
    assert row_lengths(torch.empty(2, 0)).tolist() == [0, 0]
    assert sums_by_index(torch.empty(0, 3), torch.empty(0, dtype=torch.long), 2).tolist() == [[0] * 3] * 2
