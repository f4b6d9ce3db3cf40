"""What the planner says that a rank sends is what it sends: counted on real ranks, and as the papers have it."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from benchmarks import scaling
from llama.parallel.distribute import on_meta
from llama.parallel.mesh import MeshShape
from llama.parallel.scheme import Scheme, fullest_tensor_rank
from llama.parallel.split_stream import sum_rows
from llama.parallel.traffic import messages
from llama.storage.named_shapes import NAMED_SHAPES

LARGE = 512  # ranks: (n - 1) / n is nearly 1


def counted_by_hand() -> dict:
    """Three collectives, one of which only the backward sends; all of fp32."""
    with scaling.Counted() as counted:
        dist.all_reduce(torch.ones(10))
        stream = torch.ones(6, 5, requires_grad=True)
        sum_rows(stream, dist.group.WORLD).sum().backward()
        dist.all_gather([torch.empty(3) for _ in range(2)], torch.ones(3))
    return dict(counted.bytes)


def test_the_counter_sees_forward_and_backward(ranks):
    """40 bytes reduced; 6 x 5 numbers scattered, and in the backward gathered; 2 x 3 numbers gathered."""
    pair = (0, 1)
    expected = {("all_reduce", pair): 40, ("reduce_scatter", pair): 120, ("all_gather", pair): 120 + 24}
    assert ranks(2, counted_by_hand) == [expected, expected]


def test_a_step_sends_what_the_formula_says(ranks):
    for found in ranks(2, scaling.measure, {"sharding": "full", "tensor_parallel": 2}, 0):
        assert found["differences"] == {} and found["sent"] == found["sent_by_formula"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("size, given", [(size, given) for size in (2, 4) for given in scaling.SETTINGS[size]],
                         ids=str)  # fmt: skip
def test_each_setting_sends_what_the_formula_says(ranks, size, given):
    """To the byte, on every rank and in every group: sharding x tensor parallel x what is trained x accumulation."""
    for found in ranks(size, scaling.measure, given, 0):
        assert found["differences"] == {} and found["sent"] > 0


@pytest.mark.parametrize("sharding, mesh, bytes_a_weight", [
    ("none", (LARGE, 1, 1), 4 + 4),  # 2 Psi of the paper, in fp32
    ("grad", (1, LARGE, 1), 2 + 4),  # 2 Psi: weights in bf16, gradients in fp32
    ("full", (1, LARGE, 1), 2 + 2 + 4),  # 3 Psi
    ("zero1", (LARGE, 1, 1), 4 + 4 + 4),  # gradients are all-reduced, and then the weights gathered
])  # fmt: skip
def test_sharding_sends_as_many_bytes_a_weight_as_the_zero_paper(sharding, mesh, bytes_a_weight):
    """https://arxiv.org/abs/1910.02054, section 7; a rank of n sends (n - 1) / n of it, and rows are filled up."""
    model = on_meta(NAMED_SHAPES["8b"])
    weights = sum(p.numel() for p in model.parameters())
    found = messages(model, Scheme(sharding, MeshShape(*mesh)), 4096, torch.bfloat16)
    assert sum(message.sent for message in found) / weights == pytest.approx(bytes_a_weight, rel=0.01)


def test_accumulation_repeats_what_it_must_and_reduces_between_replicas_once():
    model = on_meta(NAMED_SHAPES["1b"])

    def moved(sharding: str, mesh: MeshShape, micro_batches: int, defer: bool = False) -> Counter:
        found = Counter()
        scheme = Scheme(sharding, mesh, "none", micro_batches, defer)
        for message in messages(model, scheme, 64, torch.bfloat16):
            found[message.kind] += message.moved if message.over != "world" else 0
        return found

    everywhere, in_nodes = MeshShape(1, 8, 1), MeshShape(2, 4, 1)
    once, four = moved("full", everywhere, 1), moved("full", everywhere, 4)
    deferred = moved("full", everywhere, 4, defer=True)
    assert four["all_gather"] == deferred["all_gather"] == 4 * once["all_gather"]
    assert four["reduce_scatter"] == 4 * once["reduce_scatter"] and deferred["reduce_scatter"] == once["reduce_scatter"]
    assert moved("hybrid", in_nodes, 4)["all_reduce"] == moved("hybrid", in_nodes, 1)["all_reduce"] > 0


@pytest.mark.parametrize("checkpointing, gathers, scatters", [("none", 4, 4), ("full", 6, 5)])
def test_tensor_parallelism_moves_the_stream_of_each_layer_eight_times(checkpointing, gathers, scatters):
    """https://arxiv.org/abs/2205.05198: 4 all-gathers and 4 reduce-scatters a layer; recomputing adds to both."""
    config = NAMED_SHAPES["8b"]
    model = on_meta(fullest_tensor_rank(config, 8))
    stream, ends = 4096 * config.hidden_size * 2, 2
    for kind, each in (("all_gather", gathers), ("reduce_scatter", scatters)):
        found = messages(model, Scheme("full", MeshShape(1, 1, 8), checkpointing), 4096, torch.bfloat16)
        moved = sum(message.moved for message in found if message.kind == kind)
        assert moved == stream * (each * config.num_hidden_layers + ends)
