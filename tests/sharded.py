"""What tests that run on several ranks share: this process of the test's own group, sharded models, whole tensors."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from llama.model import Llama, ModelConfig
from llama.parallel.distribute import distribute, on_meta
from llama.parallel.processes import Process
from llama.parallel.shards import whole_tensor


def this_process() -> Process:
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))
    return Process(dist.get_rank(), world_size, torch.device("cpu"), mesh)


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


def tensor_process(tensor_ranks: int):
    """This process in a mesh whose innermost dimension is a tensor group of so many ranks; the others shard."""
    world_size = dist.get_world_size()
    shape = (1, world_size // tensor_ranks, tensor_ranks)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tensor"))
    data_rank, tensor_rank = divmod(dist.get_rank(), tensor_ranks)
    return SimpleNamespace(tensor_ranks=tensor_ranks, tensor_rank=tensor_rank, mesh=mesh, device=torch.device("cpu"))
