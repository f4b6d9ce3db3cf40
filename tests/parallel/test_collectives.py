"""Ranks that collect, decide and fail together: no rank waits for one that has stopped."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llama.boundary.errors import UserError
from llama.parallel.collectives import fail_together, from_rank_zero, gather, is_rank_zero, wait_until_visible


def outcome(attempt: Callable) -> tuple:
    """(what came back, the type and message of what was raised); then a barrier, which no rank may miss."""
    try:
        found = attempt(), None, ""
    except Exception as error:
        found = None, type(error), str(error)
    dist.barrier()
    return found


# Collecting


def gather_on_a_rank() -> tuple[list, bool]:
    return gather({"rank": dist.get_rank(), "tensor": torch.tensor([dist.get_rank()])}), is_rank_zero()


def test_gather_returns_the_value_of_every_rank_in_order_on_every_rank(ranks):
    for rank, (values, first) in enumerate(ranks(2, gather_on_a_rank)):
        assert [value["rank"] for value in values] == [0, 1] and first == (rank == 0)
        assert [int(value["tensor"]) for value in values] == [0, 1]


def test_one_process_is_its_own_group():
    """The same calls serve a single process without a process group."""
    assert gather(3) == [3] and from_rank_zero(lambda: 4) == 4 and is_rank_zero()
    with fail_together("nowhere"):
        pass
    with pytest.raises(UserError, match="^/x: Permission denied$"), fail_together("nowhere"):
        raise PermissionError(13, "Permission denied", "/x")
    with pytest.raises(UserError, match="^nowhere: No space left on device$"), fail_together("nowhere"):
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="^/no/folder: No such file or directory$"):
        from_rank_zero(lambda: os.listdir("/no/folder"))


# Deciding


def decide_on_ranks(error: Exception | None) -> tuple:
    calls = []

    def decide() -> dict:
        calls.append(dist.get_rank())
        if error:
            raise error
        return {"folder": Path("runs/x"), "rank": dist.get_rank()}

    return outcome(lambda: from_rank_zero(decide)), calls


def test_what_rank_0_decides_every_rank_gets_and_only_rank_0_looks(ranks):
    """R2: two ranks that look at a disk might see different things."""
    answer = {"folder": Path("runs/x"), "rank": 0}
    assert ranks(2, decide_on_ranks, None) == [((answer, None, ""), [0]), ((answer, None, ""), [])]


@pytest.mark.parametrize("error, message", [
    (UserError("runs/x: exists already"), "runs/x: exists already"),
    (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied"),
    (OSError(28, "No space left on device"), "No space left on device"),
], ids=repr)  # fmt: skip
def test_an_error_of_rank_0_in_deciding_is_raised_on_every_rank(ranks, error, message):
    """R3: also what the system says; one that names no file has no place."""
    failed = (None, UserError, message)
    assert ranks(2, decide_on_ranks, error) == [(failed, [0]), (failed, [])]


# Failing


def fail_on(failing: dict[int, Exception]) -> tuple:
    def attempt() -> None:
        with fail_together(Path("runs/x")):
            if dist.get_rank() in failing:
                raise failing[dist.get_rank()]

    return outcome(attempt)


def test_a_block_that_fails_nowhere_fails_nowhere(ranks):
    assert ranks(2, fail_on, {}) == [(None, None, "")] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_an_error_of_all(ranks, rank):
    """R3: the rank that had it raises it as it is, with its traceback; the others say the same in one line."""
    results = ranks(2, fail_on, {rank: ValueError("two\nlines")})
    assert results[rank] == (None, ValueError, "two\nlines")
    assert results[1 - rank] == (None, UserError, "two lines")


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device"), "runs/x: No space left on device"),
    (FileNotFoundError(2, "No such file or directory", "/a/b"), "/a/b: No such file or directory"),
    (OSError("without a number"), "runs/x: without a number"),
], ids=repr)  # fmt: skip
def test_an_error_of_the_system_becomes_a_user_error_that_names_the_path_on_every_rank(ranks, error, message):
    """R3: the file that it is about, or else the place that the block is about."""
    assert ranks(2, fail_on, {1: error}) == [(None, UserError, message)] * 2


def test_where_several_ranks_fail_each_has_its_own_error_and_no_rank_waits(ranks):
    """The message of the lowest rank is the one that ranks without an error of their own repeat."""
    errors = {0: UserError("first"), 1: KeyError("second")}
    assert ranks(2, fail_on, errors) == [(None, UserError, "first"), (None, KeyError, "'second'")]
    assert ranks(4, fail_on, {1: UserError("one"), 3: OSError(5, "I/O error", "/z")}) == [
        (None, UserError, "one"), (None, UserError, "one"), (None, UserError, "one"), (None, UserError, "one")]


def fail_in_a_group_of_its_own() -> tuple:
    group = dist.new_group(backend="gloo")

    def attempt() -> None:
        with fail_together("runs/x", group):
            if dist.get_rank() == 1:
                raise UserError("only here")

    found = outcome(attempt)
    return found, gather(dist.get_rank(), group)


def test_a_group_of_its_own_can_be_used(ranks):
    """A thread that saves needs one: collectives of two threads in one group would receive each other's messages."""
    assert ranks(2, fail_in_a_group_of_its_own) == [((None, UserError, "only here"), [0, 1])] * 2


def test_a_file_that_is_there_is_not_waited_for(tmp_path):
    """A link that points nowhere counts: the name is there."""
    (tmp_path / "x").symlink_to("nowhere")
    wait_until_visible(tmp_path / "x")
