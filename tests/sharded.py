"""What tests that run on several ranks share: this process of the test's own group, sharded models, whole tensors."""

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama.boundary.launch import Launch
from llama.model import Llama, ModelConfig
from llama.parallel.distribute import distribute, on_meta
from llama.parallel.mesh import DIMENSIONS, MeshShape, mesh_shape
from llama.parallel.processes import Process
from llama.parallel.shards import whole_tensor


def this_launch(sharding: str | None = "full") -> Launch:
    """As torchrun would have started the ranks of a pool: on one node, and for hybrid on two."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    on_each_node = world_size // 2 if sharding == "hybrid" else world_size
    return Launch(True, world_size, rank % on_each_node, on_each_node)


def this_process(sharding: str = "full", tensor_parallel: int = 1) -> Process:
    """As `join` makes it of `this_launch`."""
    launched = this_launch(sharding)
    shape = mesh_shape(sharding, tensor_parallel, launched.world_size, launched.local_world_size)
    return Process(dist.get_rank(), launched.world_size, torch.device("cpu"), _mesh(shape))


@cache
def _mesh(shape: MeshShape) -> DeviceMesh:
    """One mesh for all tests that this rank takes part in: each new one would open new connections."""
    return init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)


def build(
    config: ModelConfig,
    process: Process,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Llama], object] = lambda model: None,
    **how,
) -> Llama:
    """A sharded model with memory but without values; `change` is applied to its shapes first."""
    model = on_meta(config)
    change(model)
    distribute(model, process, dtype, **how)
    return model


def whole(tensor: torch.Tensor | nn.Parameter) -> torch.Tensor:
    return whole_tensor(tensor).detach().clone()


def tensor_process(tensor_ranks: int) -> Process:
    """This process in a mesh whose innermost dimension is a tensor group of so many ranks; the others shard."""
    return this_process("full", tensor_ranks)


def build_shared(
    config: ModelConfig, tensor_ranks: int, dtype: torch.dtype, change: Callable[[Llama], object] = lambda model: None
) -> Llama:
    """As `build`, by tensor groups of so many ranks; FSDP shards what each of them has over the others."""
    return build(config, tensor_process(tensor_ranks), dtype, change)
