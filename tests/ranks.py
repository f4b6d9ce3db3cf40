"""Run a function on several ranks from a test.

    def test_x(ranks):
        results = ranks(2, function, *args, **kwargs)

Starting processes, importing torch and joining a process group takes seconds; so each size of group is a
pool of processes that outlives the test, and a call takes 0.06 s. They are forked from a server that has
imported torch and this project and done nothing else, so no running thread is ever forked.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds a call may take
GRACE = 2  # seconds the other ranks have to report, too, once one has failed
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "pytest",
    "hypothesis",
    "fsdp_train",  # and with it nearly all of the product
]


class RankFailed(AssertionError):
    """What went wrong on which rank, the first failure first, each with the traceback of its own process."""


class Pool:
    """`size` processes inside one gloo process group, each waiting for functions to call."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.processes, self.pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, theirs, self.folder.name), daemon=True)
            process.start()
            theirs.close()  # or the end of that process would not end the pipe
            self.processes.append(process)
            self.pipes.append(ours)

    def call(self, function: Callable, args: tuple, kwargs: dict, timeout: float) -> list[Any]:
        """function(*args, **kwargs) on every rank; results by rank. RankFailed leaves the pool useless."""
        job = pickle.dumps((function, args, kwargs))
        for pipe in self.pipes:
            pipe.send_bytes(job)
        results, failures = {}, []
        waiting, deadline = dict(enumerate(self.pipes)), time.monotonic() + timeout
        while waiting:
            ready = wait(waiting.values(), max(0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    returned, value = pickle.loads(waiting.pop(rank).recv_bytes())
                except EOFError:
                    self.processes[rank].join(1)
                    returned, value = False, f"died with exit code {self.processes[rank].exitcode}"
                if returned:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {len(self.pipes)}: {value}")
                    deadline = min(deadline, time.monotonic() + GRACE)
        if waiting and not failures:
            failures.append(f"no answer after {timeout} s from {len(waiting)} of {len(self.pipes)} ranks")
        if failures:
            raise RankFailed("\n\n".join(failures + self._stacks(waiting)))
        return [results[rank] for rank in range(len(self.pipes))]

    def _stacks(self, ranks) -> list[str]:
        """Where each of these ranks is now: most often, waiting for another one."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGUSR2)
        time.sleep(0.3 if ranks else 0)
        files = {rank: _stack_file(self.folder.name, rank) for rank in ranks}
        return [f"rank {rank} is still in:\n{file.read_text()}" for rank, file in files.items()]

    def close(self, kill: bool = False) -> None:
        """End every process, at once if `kill` or if it does not end by itself."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            if not kill:
                process.join(5)
            process.kill()
            process.join()
        self.folder.cleanup()


class RankPools:
    """The fixture `ranks`: a pool for each number of ranks, made at the first call, and made again after a failure."""

    def __init__(self):
        self.pools: dict[int, Pool] = {}

    def __call__(self, size: int, function: Callable, *args, timeout: float = TIMEOUT, **kwargs) -> list[Any]:
        """Call a top-level function of an importable module on `size` ranks. Returns their results by rank.

        Every rank is inside an initialised gloo group, has one thread and torch's random seed 0. Results
        travel by pickle: return numbers, plain tensors and the like. Raises RankFailed if any rank raises,
        dies or is late.
        """
        if size not in self.pools:
            self.pools[size] = Pool(size)
        try:
            return self.pools[size].call(function, args, kwargs, timeout)
        except BaseException:  # KeyboardInterrupt, too: ranks may wait for each other for ever
            self.pools.pop(size).close(kill=True)
            raise

    def close(self) -> None:
        while self.pools:
            self.pools.popitem()[1].close()


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stack-{rank}.txt"


def _work(rank: int, size: int, pipe, folder: str) -> None:
    """The life of one rank: join the group, then call what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the pools
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stack_file = _stack_file(folder, rank).open("w")
    faulthandler.register(signal.SIGUSR2, stack_file)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=4 * TIMEOUT),  # the pool is killed before
    )
    gc.freeze()  # what lives now stays: collections after each call then take a millisecond
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            function, args, kwargs = pickle.loads(job)
            answer = pickle.dumps((True, function(*args, **kwargs)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        function = args = kwargs = None
        gc.collect()  # sharded models hold themselves in cycles
        try:
            pipe.send_bytes(answer)
        except BrokenPipeError:
            break
    os._exit(0)  # not through Python's own end, which gloo's threads may abort: they still hold tensors


def _die_with_parent() -> None:
    """However pytest ends, no rank outlives it, not even one stuck in a collective."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
