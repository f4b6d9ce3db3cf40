"""How the ranks are arranged: in a block of three dimensions, replicate x shard x tensor.

    replicate   each of these holds the same weights; gradients are summed over them
    shard       each of these holds a slice of every weight; a layer is gathered from them while it computes
    tensor      each of these computes a part of every layer, on the same data

Neighbouring ranks differ in `tensor`, which sends the most messages and needs the fastest link. Distant ones differ in
`replicate`, which sends the fewest. This file imports no torch: a launch that cannot be is refused before all else.
"""

from typing import NamedTuple

from llama.boundary.errors import UserError

DIMENSIONS = ("replicate", "shard", "tensor")


class MeshShape(NamedTuple):
    """How many ranks there are in each dimension.

    rank = (replicate_rank * shard + shard_rank) * tensor + tensor_rank
    """

    replicate: int
    shard: int
    tensor: int

    @property
    def data_ranks(self) -> int:
        """How many ranks, or groups of tensor ranks, train on different examples at the same time."""
        return self.replicate * self.shard


def mesh_shape(sharding: str | None, tensor_parallel: int, world_size: int, local_world_size: int) -> MeshShape:
    """The mesh of W = `world_size` ranks, L = `local_world_size` of them on each node; t = `tensor_parallel`.

                      (replicate, shard, tensor)
        full, grad    (1, W / t, t)             ZeRO-3 and ZeRO-2: slices over all ranks. None is one of these two
        hybrid        (nodes, L / t, t)         slices inside a node; each node has a copy
        zero1, none   (W / t, 1, t)             no slices: every rank has whole weights, or its tensor part of them

    Raises UserError for ranks that cannot be arranged so.
    """
    asked = f"--tensor_parallel {tensor_parallel}"
    if world_size % tensor_parallel:
        expected = f"a multiple of {tensor_parallel}"
        raise UserError(f"{asked}: the number of processes is {world_size}, expected {expected}")
    nodes = world_size // local_world_size
    if nodes > 1 and local_world_size % tensor_parallel:
        raise UserError(
            f"{asked}: the number of processes on a node is {local_world_size}, expected a multiple of "
            f"{tensor_parallel}, so that those which compute a layer together are on one node"
        )
    data_ranks = world_size // tensor_parallel
    if sharding in ("zero1", "none"):
        return MeshShape(data_ranks, 1, tensor_parallel)
    if sharding != "hybrid":
        return MeshShape(1, data_ranks, tensor_parallel)
    if nodes * local_world_size != world_size:
        raise UserError(
            f"--sharding hybrid: {local_world_size} of {world_size} processes are on this node, expected as many on "
            "every node"
        )
    if nodes == 1:
        problem = "all processes are on one node, expected several nodes"
        raise UserError(f"--sharding hybrid: {problem}; on one node --sharding full does the same")
    return MeshShape(nodes, data_ranks // nodes, tensor_parallel)
