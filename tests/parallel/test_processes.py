"""Joining the other processes, and leaving them: devices, names of attempts, and who says goodbye."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from llama.boundary.errors import UserError
from llama.parallel import processes
from llama.parallel.processes import join, name_of_attempt


@pytest.fixture
def left(monkeypatch) -> list[str]:
    """Rank 9 of two 8-GPU nodes, without any of them; who has left the group."""
    said = []
    for name, value in (("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "here"),
                        ("MASTER_PORT", "29500"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 9, 16)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: said.append("goodbye"))
    monkeypatch.setattr(processes, "name_of_attempt", lambda *_: "first")
    monkeypatch.setattr(processes, "_mesh", lambda *_: None)
    return said


def test_devices_come_from_the_local_rank(left, monkeypatch):
    """C46: rank 9 of two 8-GPU nodes computes on the second GPU of its own node."""
    chosen = []
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 8), ("set_device", chosen.append)):
        monkeypatch.setattr(torch.cuda, name, value)
    with join() as process:
        assert process.device == torch.device("cuda", 1) and process.rank == 9
    assert chosen == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(UserError, match="9: this node has 8 GPUs"), join():
        pass


@pytest.mark.parametrize("error, says_goodbye", [(UserError, True), (SystemExit, True), (RuntimeError, False)])
def test_a_rank_that_fails_alone_does_not_wait_for_the_others_to_leave(left, monkeypatch, error, says_goodbye):
    """R9: they may be in a collective that it will never join. A mistake of the user has ended all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error), join():
        raise error("the first of all")
    assert left == (["goodbye"] if says_goodbye else [])


def test_an_attempt_has_one_name_whatever_dead_ones_left_in_the_store():
    """R10: counts of restarts may differ from node to node; some of the dead had asked, one without a name."""
    store = dist.HashStore()
    store.set(f"asked/{store.add('asked', 1)}", "dead")
    store.add("asked", 1)
    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            names = list(threads.map(lambda rank: name_of_attempt(store, rank, 4), range(4), timeout=240))
        assert len(set(names)) == 1 and not store.check([f"{names[0]}/seen"])
        store.set(f"{names[0]}/seen", "")
    assert name_of_attempt(store, 0, 1) != names[0]


def test_rank_0_says_once_that_it_waits_for_the_others(monkeypatch, capsys):
    """R9: they may have failed where nobody looks."""
    monkeypatch.setattr(processes, "PATIENCE", 0)
    monkeypatch.setattr(processes, "TIMEOUT", timedelta(seconds=0.05))
    with pytest.raises(UserError, match="only 1 of 2 processes have joined after 0:00:00.05"):
        name_of_attempt(dist.HashStore(), 0, 2)
    assert capsys.readouterr().err == ("1 of 2 processes have joined; the others may still be reading, or have failed: "
                                       "see what their nodes print\n")


def test_a_first_node_that_has_ended_already_is_one_line_on_the_others(left, monkeypatch):
    """R9, C43: torchrun's store ends with it."""
    def gone(*_):
        raise dist.DistNetworkError("Failed to recv\ngot 0 bytes")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processes, "name_of_attempt", gone)
    with pytest.raises(UserError, match="the first node does not answer: Failed to recv got 0 bytes; see what"), join():
        pass


@pytest.mark.parametrize("made_by_torchrun, minutes", [("True", 1), ("False", 30)])
def test_a_store_that_torchrun_has_made_is_not_waited_for_as_long_as_one_of_rank_0(
    left, monkeypatch, made_by_torchrun, minutes
):
    """R9: rank 0 may still be encoding its data; what torchrun has made and cannot be reached is gone."""
    waits = []

    def rendezvous(address, timeout):
        waits.append(timeout)
        return iter([(dist.HashStore(), 9, 16)])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", made_by_torchrun)
    with join() as process:
        assert process.store.timeout == processes.TIMEOUT
    assert waits == [timedelta(minutes=minutes)]


@pytest.mark.parametrize(
    "ranks, limit, highest, raised_to, one_by_one",
    [(4, 1024, 4096, 1056, False), (4, 2000, 4096, None, False), (512, 1024, 2**20, 5120, True),
     (4096, 1024, 8000, 8000, True), (4096, resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, True)],
)  # fmt: skip
def test_a_large_job_gets_room_for_its_connections(monkeypatch, ranks, limit, highest, raised_to, one_by_one):
    """Three groups of 48 ranks took 171 connections of each process, and failed where 100 files may be open; connected
    one by one they took 17."""
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "")  # so that it is removed again after the test
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT")
    raised = []
    monkeypatch.setattr(processes.resource, "getrlimit", lambda kind: (limit, highest))
    monkeypatch.setattr(processes.resource, "setrlimit", lambda kind, limits: raised.append(limits))
    processes.prepare_connections(ranks)
    assert raised == ([(raised_to, highest)] if raised_to else [])
    assert ("TORCH_GLOO_LAZY_INIT" in os.environ) == one_by_one
