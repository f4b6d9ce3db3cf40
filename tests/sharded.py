"""What tests that run on several ranks share: the mesh of a test's own process group, and whole tensors of shards."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from llama.parallel.distribute import Ranks


def here() -> Ranks:
    world = dist.get_world_size()
    return Ranks(dist.get_rank(), world, torch.device("cpu"), init_device_mesh("cpu", (world,),
                                                                               mesh_dim_names=("shard",)))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
