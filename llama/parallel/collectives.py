"""Ranks that fail together, so that nobody waits for one that is gone, and see what another has written."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from llama.boundary.errors import WeightsError, one_line

PATIENCE = 60.0  # seconds to wait for what another machine wrote to show on a shared disk


def first_rank() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def together(where: Path, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What fails on one rank inside this block fails on all. Collective; leaving the block is a barrier.

    An error stays what it is on the rank that had it, but an OSError becomes a WeightsError that names the path; the
    other ranks raise a WeightsError with its message. A thread of its own needs a process group of its own.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    message = error and one_line(error)
    if isinstance(error, OSError):
        message = f"{error.filename or where}: {error.strerror or one_line(error)}"
    messages = [message]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message, group=group)
    if error and not isinstance(error, OSError):
        raise error
    if failed := next(filter(None, messages), None):
        raise WeightsError(failed)


def wait_until_visible(path: Path) -> None:
    """On a disk shared by machines a name can show late. Raises WeightsError when it has not after PATIENCE."""
    give_up = time.monotonic() + PATIENCE
    while not os.path.lexists(path):
        if time.monotonic() > give_up:
            raise WeightsError(f"{path}: written by another rank, but not to be seen here after {PATIENCE:.0f} s; "
                               "expected one disk that all machines share")
        time.sleep(0.1)
