"""What tests that run on several ranks share: this process of the test's own group, sharded models, whole tensors."""

from collections.abc import Callable

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
