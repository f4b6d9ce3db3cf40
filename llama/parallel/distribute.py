"""Processes, devices and sharding, applied to a finished model from outside. The model never knows.

The order is fixed: build on the meta device -> quantised linears, adapters -> compile each layer -> let it forget its
activations -> shard per layer, then the rest -> allocate the shards -> load. One code path serves any number of ranks,
one included.
"""

import ctypes
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from llama.boundary.errors import UserError
from llama.model.config import ModelConfig
from llama.model.decoder import Llama

# How long a rank waits for the others before it gives up, in a collective or at the start, while a slower node may
# still be encoding data.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    # What one attempt of torchrun's leaves for the next, when it starts the processes again.
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the other processes that torchrun started, or stand alone where there is no torchrun.

    CUDA and NCCL where there are GPUs, CPU and gloo where there are none. Raises UserError when a node was given more
    processes than it has GPUs.
    """
    launched = {"MASTER_ADDR", "RANK", "WORLD_SIZE"} <= os.environ.keys()
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if launched else 0
    device = torch.device("cpu")
    if torch.cuda.is_available():
        gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        if processes > gpus:
            raise UserError(f"--nproc_per_node {processes}: this node has {gpus} GPUs, expected one for each process")
        # The local rank: on the second of two 8-GPU nodes ranks 8-15 own devices 0-7.
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if launched:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    ours = dist.PrefixStore(name_of_attempt(store, rank, world_size), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=ours, rank=rank, world_size=world_size, timeout=TIMEOUT)
    leave = True
    try:
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
        yield Ranks(rank, world_size, device, mesh, store)
    except Exception as error:
        # What nobody foresaw the others learn when this process is gone: after its traceback, the first of all.
        leave = isinstance(error, UserError)
        raise
    finally:
        if leave:
            dist.destroy_process_group()
            # gloo's threads may still hold tensors of the last collective; a process that ends right now is then
            # aborted ("terminate called without an active exception"): seen in 5 of 8 short runs on 4 ranks, in none
            # with this.
            time.sleep(0.2)


def name_of_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that no earlier attempt had, the same on every rank, to keep this one's keys under. Collective.

    After a restart by torchrun the store still holds the addresses of dead processes, and its count of restarts may
    differ from node to node. So every process asks under a name of its own, and rank 0 answers whoever has ever asked
    until all that live have their answer.
    """
    name, give_up = uuid.uuid4().hex, time.monotonic() + TIMEOUT.total_seconds()
    if rank > 0:
        store.set(f"asked/{store.add('asked', 1)}", name)
        name = store.get(f"answer/{name}").decode()
        store.add(f"{name}/heard", 1)
        return name
    answered = set()
    while (heard := store.add(f"{name}/heard", 0)) < world_size - 1:
        for number in set(range(1, store.add("asked", 0) + 1)) - answered:
            if store.check([f"asked/{number}"]):
                store.set(f"answer/{store.get(f'asked/{number}').decode()}", name)
                answered.add(number)
        if time.monotonic() > give_up:
            raise UserError(f"only {heard + 1} of {world_size} processes have joined after {TIMEOUT}")
        time.sleep(0.01)
    return name


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of giving each back to the system and paging the next one in anew, which
    takes 7 to 13% of a training step on CPU. Elsewhere than on glibc, nothing. See mallopt(3)."""
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name. Without one, bf16 where the device multiplies in it natively, and fp32 where bf16 would
    be emulated, several times slower."""
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capable = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capable.get("avx512_bf16") or capable.get("amx_bf16") else torch.float32


def build(
    config: ModelConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    reshard_after_forward: bool = True,
    activation_checkpointing: bool = False,
    compile: bool = False,
    adapt: Callable[[Llama], None] = lambda model: None,
    cpu_offload: bool = False,
) -> Llama:
    """A sharded Llama whose memory is allocated but not filled: `pretrained.load` or `initialize` comes next.

    Weights, gradients and optimizer state live in fp32, one slice a rank; `dtype` is what is gathered and computed
    in. Small updates survive: bf16 weights would round most of them away. What `adapt` freezes gets no updates, and
    is kept in `dtype` at once. With cpu_offload the slices and what updates them live in the host's memory.
    """
    model = on_meta(config, dtype, adapt)
    for layer in model.layers:
        if compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if activation_checkpointing:
            forget_activations(layer)
    cpu_offload = cpu_offload and ranks.device.type != "cpu"  # else they are there already
    shard(model, ranks.mesh, dtype, reshard_after_forward, cpu_offload)
    model.to_empty(device="cpu" if cpu_offload else ranks.device)
    return model


def on_meta(config: ModelConfig, dtype: torch.dtype, adapt: Callable[[Llama], None] = lambda model: None) -> Llama:
    """The model as shapes without memory: what `adapt` leaves trainable in fp32, what it freezes in `dtype`."""
    with torch.device("meta"):
        model = Llama(config)
        adapt(model)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def forget_activations(layer: nn.Module) -> None:
    """Activation checkpointing: keep only the layer's input and compute the rest again in the backward.

    `forward` is replaced on the instance, so no wrapper module appears in parameter names. Chen et al. 2016,
    https://arxiv.org/abs/1604.06174
    """
    layer.forward = partial(recompute_in_backward, layer.forward, use_reentrant=False)


def shard(
    model: Llama, mesh: DeviceMesh, dtype: torch.dtype, reshard_after_forward: bool, cpu_offload: bool = False
) -> None:
    """FSDP2: each rank keeps a slice of every weight, and a layer is whole only while it computes.

    With reshard_after_forward a layer's weights are dropped again until the backward (ZeRO-3); without, they stay
    gathered in between (ZeRO-2): less to send, more memory. Zhao et al. 2023, https://arxiv.org/abs/2304.11277
    """
    how = {
        "mesh": mesh, "reshard_after_forward": reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    if mesh.size() == 1 and not cpu_offload:
        # Nothing to share, and no other dtype to compute in: FSDP would only copy them, twice a step.
        how["ignored_params"] = {p for p in model.parameters() if not p.requires_grad}
    for layer in model.layers:
        fully_shard(layer, **how)
    # Embedding, last norm and lm_head together: a tied weight must be in one unit to stay one weight.
    fully_shard(model, **how)
