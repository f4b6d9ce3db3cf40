"""Ranks that collect, decide and fail together, so that no rank waits for one that has stopped.

These functions are collective, unless they say otherwise: if one rank does not call them, the others wait forever.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama.boundary.errors import UserError, one_line, reason

# Of tensors of equal size, one on each rank. PyTorch 2.13 has renamed both, and warns of their old names.
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
PATIENCE = 60.0  # seconds until a file that another machine wrote must be visible on a shared disk


def is_rank_zero() -> bool:
    """Whether this is rank 0, or the only process. (The one function here that is not collective.)"""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """The `value` of every rank, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_dict(value: dict, group: dist.ProcessGroup | None = None) -> dict:
    """The entries of every rank's `value` in one dictionary, on every rank."""
    found: dict = {}
    for of_rank in gather(value, group):
        found |= of_rank
    return found


def any_rank(is_so: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether it is so on any rank, of all or of a group."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return is_so
    found = torch.tensor(int(is_so))
    dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return bool(found)


def group_that_waits() -> dist.ProcessGroup:
    """All ranks, for collectives before which one rank may work, or its user think, for days longer than others."""
    return dist.new_group(timeout=timedelta(days=30), backend="gloo")


def from_rank_zero(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on rank 0, on every rank. A UserError or OSError of rank 0 is raised on every rank.

    For decisions that depend on the disk: two ranks that look might see different things.
    """
    answer = error = None
    if is_rank_zero():
        try:
            answer = decide()
        except UserError as caught:
            error = caught
        except OSError as caught:
            place = f"{caught.filename}: " if caught.filename else ""
            error = UserError(place + reason(caught))
    if dist.is_initialized():
        sent = [answer, error]
        dist.broadcast_object_list(sent)
        answer, error = sent
    if error:
        raise error
    return answer


@contextmanager
def fail_together(where: str | Path, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """An error of one rank inside this block becomes an error of all ranks. Leaving the block is a barrier.

    The rank that had the error raises it unchanged, except that an OSError becomes a UserError that names the path;
    the other ranks raise a UserError with the same message. A thread needs a `group` of its own: collectives of two
    threads in one group would receive each other's messages.
    """
    error = message = None
    try:
        yield
    except OSError as caught:
        message = f"{caught.filename or where}: {reason(caught)}"
    except Exception as caught:
        error = caught
        message = one_line(caught)
    messages = gather(message, group)
    if error:
        raise error
    failed = [text for text in messages if text]
    if failed:
        raise UserError(failed[0])


def wait_until_visible(path: Path) -> None:
    """Wait for a name to appear: on a disk that several machines share it can appear late.

    Raises UserError when it has not appeared after PATIENCE. Not collective.
    """
    give_up = time.monotonic() + PATIENCE
    while not os.path.lexists(path):
        if time.monotonic() > give_up:
            problem = f"another rank wrote it, but it is not visible here after {PATIENCE:.0f} s"
            raise UserError(f"{path}: {problem}; expected one disk that all machines share")
        time.sleep(0.1)
