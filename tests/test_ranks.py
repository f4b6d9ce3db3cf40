"""The pool of ranks that other tests run on. C47: its ranks are processes on the CPU, joined by gloo."""

import os
import threading

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed


def add_up(value: float) -> tuple[int, float]:
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def misbehave(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("only rank 1 is at fault")
        if how == "die":
            os._exit(7)
        if how == "hang":
            threading.Event().wait()
    dist.barrier()


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_rank_is_in_one_group_and_returns_its_result(ranks, size):
    assert ranks(size, add_up, 2.0) == [(rank, size * (size + 1.0)) for rank in range(size)]


@pytest.mark.parametrize("how, message, timeout", [
    ("raise", "ValueError: only rank 1", 120),
    pytest.param("die", "exit code 7", 120, marks=pytest.mark.slow),
    ("hang", "no answer after 3 s(.|\\n)*misbehave", 3),  # the time-out itself is what is tested
])  # fmt: skip
@pytest.mark.slow
def test_a_failed_call_says_what_happened_where_and_the_next_call_works(ranks, how, message, timeout):
    assert ranks(2, add_up, 1.0) == [(0, 3.0), (1, 3.0)]  # from here on the ranks are ready to be called
    with pytest.raises(RankFailed, match=message):
        ranks(2, misbehave, how, timeout=timeout)
    assert ranks(2, add_up, 1.0) == [(0, 3.0), (1, 3.0)]


def test_a_function_that_cannot_be_sent_is_an_error_not_a_hang(ranks):
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        ranks(2, lambda: None)
