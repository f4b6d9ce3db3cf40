"""How ranks are arranged, for every number of them, against what the three groups of a rank must be."""

import sys
from itertools import product

import pytest
import torch.distributed as dist
from sharded import this_process

from llama.boundary.choices import SHARDINGS
from llama.boundary.errors import UserError
from llama.parallel.mesh import MeshShape, mesh_shape
from llama.parallel.processes import _mesh

LAUNCHES = [(nodes * local, local) for nodes, local in product(range(1, 6), range(1, 13))]


def groups(shape: MeshShape, dimension: int) -> set[frozenset[int]]:
    """The ranks that differ in this dimension only, if each rank is at its place in a block of this shape."""
    places = list(product(*map(range, shape)))  # the last index changes fastest
    found: dict[tuple, set[int]] = {}
    for rank, place in enumerate(places):
        others = place[:dimension] + place[dimension + 1 :]
        found.setdefault(others, set()).add(rank)
    return set(map(frozenset, found.values()))


def is_on_one_node(ranks: frozenset[int], local: int) -> bool:
    return len({rank // local for rank in ranks}) == 1


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_every_launch_is_arranged_as_promised_or_refused_for_the_reason_that_is_there(sharding):
    """Tensor groups are neighbours on one node; a hybrid run's shards lie on one node, and its copies on different
    ones; other weights are cut into as many slices as there are tensor groups, or not at all."""
    for (world, local), tensor in product(LAUNCHES, range(1, 14)):
        blocks = [frozenset(range(i, i + tensor)) for i in range(0, world, tensor)]
        can_be = world % tensor == 0 and all(is_on_one_node(block, local) for block in blocks)
        if not can_be or (sharding == "hybrid" and world == local):
            with pytest.raises(UserError, match="--sharding hybrid" if can_be else f"--tensor_parallel {tensor}: "):
                mesh_shape(sharding, tensor, world, local)
            continue
        shape = mesh_shape(sharding, tensor, world, local)
        replicate, shard, _ = shape
        assert replicate * shard * tensor == world and shape.data_ranks == world // tensor
        assert groups(shape, 2) == set(blocks)
        if sharding == "hybrid":
            assert all(is_on_one_node(group, local) for group in groups(shape, 1))
            assert all(len({rank // local for rank in group}) == world // local for group in groups(shape, 0))
        else:
            assert (shard if sharding in ("zero1", "none") else replicate) == 1


def test_nodes_with_different_numbers_of_processes_have_no_copy_each():
    with pytest.raises(UserError, match="4 of 6 processes are on this node, expected as many on every node"):
        mesh_shape("hybrid", 1, 6, 4)


def test_the_flag_that_was_left_out_is_arranged_as_both_of_its_defaults():
    assert mesh_shape(None, 2, 8, 8) == mesh_shape("full", 2, 8, 8) == mesh_shape("grad", 2, 8, 8) == (1, 4, 2)


def test_the_mesh_can_be_refused_before_torch_is_imported():
    """A mistyped launch of many processes is refused at once."""
    source = sys.modules[mesh_shape.__module__].__file__
    with open(source) as file:
        assert "torch" not in [line.split()[1] for line in file if line.startswith(("import ", "from "))]


def place(sharding: str, tensor_parallel: int) -> tuple[tuple, list[tuple]]:
    process = this_process(sharding, tensor_parallel)
    coordinate = process.mesh.get_coordinate()
    names = [(process.mesh[name].size(), process.mesh[name].get_local_rank()) for name in process.mesh.mesh_dim_names]
    assert (process.tensor_ranks, process.tensor_rank) == names[2]
    assert process.data_rank == coordinate[0] * process.mesh.shape[1] + coordinate[1]
    return (process.data_rank, process.data_ranks, process.tensor_rank, process.tensor_ranks), names


@pytest.mark.parametrize("sharding, tensor, expected", [
    ("hybrid", 1, [(0, 4, 0, 1), (1, 4, 0, 1), (2, 4, 0, 1), (3, 4, 0, 1)]),
    ("zero1", 2, [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]),
    ("full", 4, [(0, 1, 0, 4), (0, 1, 1, 4), (0, 1, 2, 4), (0, 1, 3, 4)]),
])  # fmt: skip
@pytest.mark.slow
def test_a_tensor_group_shares_one_part_of_the_data(ranks, sharding, tensor, expected):
    assert [found for found, _ in ranks(4, place, sharding, tensor)] == expected


def refused_mesh() -> str:
    """What rank 0 says that was started with another flag than the others."""
    process = this_process()
    try:
        _mesh(process.device, MeshShape(1, 2, 1) if dist.get_rank() == 0 else MeshShape(2, 1, 1))
    except UserError as error:
        return str(error)
    return ""


def test_ranks_with_other_flags_than_rank_0_are_found_before_they_would_wait_forever(ranks):
    (problem,) = set(ranks(2, refused_mesh))
    assert problem == ("ranks 0 and 1 would form meshes of (1, 2, 1) and (2, 1, 1) ranks; expected the same flags, and "
                       "as many processes, on every node")
