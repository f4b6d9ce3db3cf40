"""After each step, what all ranks do next: stop, because somebody has asked for it; save; or just go on.

To stop means to save, and then to end. It is asked for by Ctrl-C (SIGINT), by a closed terminal (SIGHUP), by SIGTERM,
and by SIGUSR1, which SLURM can send before a job ends.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from llama.boundary.launch import is_local_rank_zero, launch

STOPPED = 75  # exit status of a run that was asked to stop and can be resumed; EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
INSISTENT = (signal.SIGINT, signal.SIGTERM)  # a second one of these ends the process at once
STDERR = 2


class Next(NamedTuple):
    """What all ranks have agreed on."""

    stop: str | None  # the name of a signal that any rank has received
    failed: bool  # whether any rank has failed
    save: bool


class StopRequests:
    """Inside its `with` block, records signals that ask for a stop; `agreed` makes all ranks stop at the same step.

    A second SIGINT or SIGTERM ends the process at once, with status 128 + its number. One that follows within a second
    is ignored: torchrun passes signals on to processes that a terminal or SLURM may already have sent them to.

    Also keeps the time, and has a checkpoint saved when the last one is `save_minutes` old (0: never).
    """

    def __init__(self, save_minutes: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self.save_minutes = save_minutes
        self.clock = clock
        self.speaks = is_local_rank_zero()
        self.received = 0
        self.insisted: float | None = None  # when the first SIGINT or SIGTERM came
        self.saved = 0.0
        self.handlers_before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopRequests":
        by_torchrun = launch().by_torchrun
        self.saved = self.clock()
        for number in SIGNALS:
            # nohup has SIGHUP ignored, and a shell SIGINT in its background: so it stays. But torchrun listens to both
            # all the same, passes them on, and kills after 30 seconds whoever has not ended.
            if by_torchrun or signal.getsignal(number) != signal.SIG_IGN:
                self.handlers_before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = self.clock()
        if number in INSISTENT:
            if self.insisted is not None and now - self.insisted > 1:
                self._say(f"{signal.Signals(number).name} again: ended at once, this step is not saved")
                os._exit(128 + number)
            if self.insisted is None:
                self.insisted = now
                self._say(f"{signal.Signals(number).name}: finishing this step, then saving; once more ends at once")
        self.received = max(self.received, number)

    def _say(self, text: str) -> None:
        if self.speaks:
            with suppress(OSError):
                os.write(STDERR, f"\n{text}\n".encode())  # not print, which may be what the signal has interrupted

    def agreed(self, failed: bool, save_is_due: bool = False) -> Next:
        """What to do after a step. Collective: all ranks do the same. Any rank can ask for it."""
        is_old = self.save_minutes > 0 and self.clock() - self.saved >= 60 * self.save_minutes
        state = torch.tensor([self.received, failed, save_is_due or is_old])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(state, dist.ReduceOp.MAX)
        number, any_failed, save = state.tolist()
        save = bool(save or number)
        if save:
            self.saved = self.clock()
        return Next(signal.Signals(number).name if number else None, bool(any_failed), save)
