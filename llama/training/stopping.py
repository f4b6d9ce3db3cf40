"""Being asked to stop: SIGTERM and SIGUSR1, which SLURM sends before its time limit, mean "save, and end"."""

import os
import signal
import time

import torch
import torch.distributed as dist

STOPPED = 75  # exit status of a run that was asked to stop and can be resumed; EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Hears, inside its block, the signals that ask for a stop, and lets all ranks agree on it.

    A second SIGTERM ends the process at once, with status 143. Within a second of the first it is taken for the same:
    torchrun passes on to its processes what SLURM may have sent them, too.
    """

    def __init__(self):
        self.heard: int = 0
        self.since = 0.0
        self.before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        self.before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _hear(self, number: int, frame) -> None:
        if self.heard == number == signal.SIGTERM and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if self.heard != signal.SIGTERM:
            self.heard, self.since = number, time.monotonic()

    def agreed(self, failed: bool) -> tuple[str | None, bool]:
        """The name of the signal that any rank has heard, and whether any rank has `failed`. Collective: all ranks
        stop after the same step or none does."""
        heard = torch.tensor([self.heard, failed])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(heard, dist.ReduceOp.MAX)
        number, failed = heard.tolist()
        return signal.Signals(number).name if number else None, bool(failed)
