"""Requests to stop: SIGTERM, or SIGUSR1, which SLURM can send before a job ends. Both mean: save, then end."""

import os
import signal
import time

import torch
import torch.distributed as dist

STOPPED = 75  # exit status of a run that was asked to stop and can be resumed; EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Inside its `with` block, records signals that ask for a stop; `agreed` makes all ranks stop at the same step.

    A second SIGTERM ends the process at once, with status 143. One that follows within a second is ignored: torchrun
    passes signals on to processes that SLURM may already have sent them to.
    """

    def __init__(self):
        self.received = 0
        self.since = 0.0
        self.handlers_before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        self.handlers_before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _receive(self, number: int, frame) -> None:
        if self.received == number == signal.SIGTERM and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if self.received != signal.SIGTERM:
            self.received = number
            self.since = time.monotonic()

    def agreed(self, failed: bool) -> tuple[str | None, bool]:
        """The name of a signal that any rank has received, and whether any rank has `failed`. Collective: all ranks
        stop after the same step, or none does."""
        state = torch.tensor([self.received, failed])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(state, dist.ReduceOp.MAX)
        number, any_failed = state.tolist()
        return signal.Signals(number).name if number else None, bool(any_failed)
