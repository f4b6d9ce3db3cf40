"""This process among the others: joining them, its device, and the dtype that the device computes in best."""

import ctypes
import os
import resource
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama.boundary.errors import UserError, one_line
from llama.boundary.launch import TORCHRUN, Launch, launch
from llama.parallel.collectives import fail_together, gather
from llama.parallel.mesh import DIMENSIONS, MeshShape, mesh_shape

# A rank that waits longer than this gives up. A slower node may still be encoding its data when others have joined.
TIMEOUT = timedelta(minutes=30)
# torchrun makes its store before it starts processes: one that cannot reach it will not later. PyTorch tries it twice.
TIMEOUT_STORE = timedelta(minutes=1)
PATIENCE = 60.0  # seconds until rank 0 says that it waits
CONNECTED_AT_ONCE = 128  # more ranks than these are connected one by one
GROUPS = 8  # process groups of a run, at most; in each of them a process has an open file for each other process
OTHER_FILES = 1024  # that a process opens


@dataclass(frozen=True)
class Process:
    """This process: its rank from 0 to world_size - 1, its device, and the mesh of all processes (mesh.py)."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    # torchrun's key-value store. It survives a restart of the processes, so a restarted run finds its own notes there.
    store: dist.Store | None = None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def tensor_ranks(self) -> int:
        """How many ranks compute each layer together, on the same data."""
        return self.mesh.shape[-1]

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_ranks

    @property
    def data_ranks(self) -> int:
        """How many shares the data are dealt into: one for each group of tensor ranks."""
        return self.world_size // self.tensor_ranks

    @property
    def data_rank(self) -> int:
        """Which of these shares is this rank's."""
        return self.rank // self.tensor_ranks

    @property
    def described(self) -> str:
        """For a line on the screen: how many ranks there are, on what, and how they are arranged."""
        ranks = f"{self.world_size} ({self.device.type})"
        if self.world_size == 1:
            return ranks
        arranged = [f"{count} {name}" for count, name in zip(self.mesh.shape, DIMENSIONS, strict=True)]
        ranks += f" = {' x '.join(arranged)}"
        if self.tensor_ranks > 1:
            ranks += f"; each {self.tensor_ranks} compute every layer together, on the same examples"
        return ranks

    def sum_over_data_ranks(self, tensor: Tensor) -> None:
        """Replace what each rank has found on its share of the data by the sum of all shares. Collective."""
        if self.tensor_rank > 0:  # all ranks of a tensor group have found the same on the same share: it counts once
            tensor.zero_()
        dist.all_reduce(tensor)


@contextmanager
def join(sharding: str = "full", tensor_parallel: int = 1) -> Iterator[Process]:
    """Join the other processes that torchrun started, or stand alone where there is no torchrun. The arguments say how
    the processes are arranged (mesh.py).

    CUDA and NCCL where there are GPUs, CPU and gloo where there are none. Says so when some of torchrun's variables are
    set although torchrun has not started this. Raises UserError when a node has more processes than GPUs, and when the
    processes cannot be arranged so.
    """
    launched = launch()
    device = _own_device(launched)
    if launched.by_torchrun:
        with _store_that_may_go():
            timeout = TIMEOUT_STORE if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else TIMEOUT
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            store.set_timeout(TIMEOUT)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
        if launched.ignored:
            expected = f"torchrun sets {', '.join(TORCHRUN)} together, and to numbers that fit"
            print(f"{', '.join(launched.ignored)}: ignored, so this is one process alone; {expected}", file=sys.stderr)
    prepare_connections(world_size)
    with _store_that_may_go():
        own_keys = dist.PrefixStore(name_of_attempt(store, rank, world_size), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=own_keys, rank=rank, world_size=world_size, timeout=TIMEOUT)
    leave = True
    try:
        with fail_together("the mesh"):  # the flags of another node may be others
            shape = mesh_shape(sharding, tensor_parallel, world_size, launched.local_world_size)
        yield Process(rank, world_size, device, _mesh(device, shape), store)
    except (Exception, KeyboardInterrupt) as error:
        # Only a UserError is known to have reached all ranks. After any other error this process just ends: the others
        # notice that it is gone, and by then its traceback has been printed, before theirs.
        leave = isinstance(error, UserError)
        raise
    finally:
        if leave:
            dist.destroy_process_group()
            # gloo's threads may still hold tensors of the last collective, and a process that ends at this moment is
            # aborted ("terminate called without an active exception"): 5 of 8 short runs on 4 ranks, none with this.
            time.sleep(0.2)


@contextmanager
def _store_that_may_go() -> Iterator[None]:
    """torchrun keeps its store on the first node. When the run ends there before all have joined, the store is gone."""
    try:
        yield
    except dist.DistError as error:
        raise UserError(
            f"not all processes have joined, and the first node does not answer: {one_line(error)}; see what the first "
            "node prints, and whether it can be reached"
        ) from error


def _mesh(device: torch.device, shape: MeshShape) -> DeviceMesh:
    """All ranks in this shape. Raises UserError, on every rank, where they do not agree on it. Collective."""
    shapes = gather(shape)
    for rank, other in enumerate(shapes):
        if other != shapes[0]:
            raise UserError(
                f"ranks 0 and {rank} would form meshes of {tuple(shapes[0])} and {tuple(other)} ranks; expected the "
                "same flags, and as many processes, on every node"
            )
    return init_device_mesh(device.type, shape, mesh_dim_names=DIMENSIONS)


def _own_device(launched: Launch) -> torch.device:
    """The GPU of this process, chosen by its local rank; the CPU where there are no GPUs."""
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if launched.local_world_size > gpus:
        wrong = f"--nproc_per_node {launched.local_world_size}: this node has {gpus} GPUs"
        raise UserError(f"{wrong}, expected one for each process")
    # The local rank, not the rank: on the second of two 8-GPU nodes ranks 8-15 own devices 0-7.
    device = torch.device("cuda", launched.local_rank)
    torch.cuda.set_device(device)
    return device


def name_of_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that no earlier attempt had, the same on every rank: a prefix for this attempt's keys. Collective.

    When torchrun starts the processes again, the store still holds the addresses of dead processes, and torchrun's
    count of restarts may differ from node to node. So every process asks for a name under a random key of its own, and
    rank 0 answers everyone who has ever asked, until all living processes have received their answer.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asked/{store.add('asked', 1)}", name)
        name = store.get(f"answer/{name}").decode()
        store.add(f"{name}/heard", 1)
        return name
    answered: set[int] = set()
    began = time.monotonic()
    has_told = False
    while (heard := store.add(f"{name}/heard", 0)) < world_size - 1:
        for number in set(range(1, store.add("asked", 0) + 1)) - answered:
            if store.check([f"asked/{number}"]):
                store.set(f"answer/{store.get(f'asked/{number}').decode()}", name)
                answered.add(number)
        waited = time.monotonic() - began
        if waited > TIMEOUT.total_seconds():
            raise UserError(f"only {heard + 1} of {world_size} processes have joined after {TIMEOUT}")
        if waited > PATIENCE and not has_told:
            has_told = True
            print(
                f"{heard + 1} of {world_size} processes have joined; the others may still be reading, or have failed: "
                "see what their nodes print",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.01)
    return name


def prepare_connections(world_size: int) -> None:
    """Make room for the connections of a large job.

    When a group is made, gloo connects each rank with every other one: three groups of 512 ranks are 1,536 open files
    of each process, and a process may often have 1,024. So the limit is raised as far as a user may raise it. Among
    many ranks gloo connects two of them only when one has something to send to the other: a dozen instead of thousands.
    """
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OTHER_FILES + GROUPS * world_size
    if highest != resource.RLIM_INFINITY:
        wanted = min(wanted, highest)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, highest))
    if world_size > CONNECTED_AT_ONCE:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for reuse. By default it returns each block to the system and gets the next one
    page by page, which takes 7 to 13% of a training step on CPU. See mallopt(3). Does nothing without glibc."""
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name. Without a name: bf16 where the device has instructions for it, else fp32, because
    emulated bf16 is several times slower."""
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capable: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capable.get("avx512_bf16") or capable.get("amx_bf16") else torch.float32
