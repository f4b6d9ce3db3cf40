"""Embedding, logits and loss of a vocabulary that the ranks of a group share."""

import pytest
import torch
from sharded import build_shared, tensor_process
from test_parallel import slow
from test_tensor import CONFIGS, LENGTHS, set_biases
from torch.nn import functional as F

from llama.model import Llama, PackedDocuments
from llama.parallel.vocabulary import split_cross_entropy
from llama.storage.pretrained import initialize_weights

TOKENS = torch.randint(97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
HUGE = 1e4  # exp of it is infinite


def own_ids(whole: int, rank: int, ranks: int) -> slice:
    return slice(rank * whole // ranks, (rank + 1) * whole // ranks)


def split_loss(rows: int, dtype: torch.dtype, scale: float, chunk: int) -> dict:
    """Loss and gradients from each rank's part of a weight of 11 ids."""
    process = tensor_process(torch.distributed.get_world_size())
    group = process.mesh["tensor"].get_group()
    hidden, weight, targets = case(rows, dtype, scale)
    ids = own_ids(len(weight), process.tensor_rank, process.tensor_ranks)
    own = weight[ids].clone().requires_grad_()
    hidden.requires_grad_()
    is_mine = (targets >= ids.start) & (targets < ids.stop)
    loss = split_cross_entropy(hidden, own, (targets - ids.start) * is_mine, is_mine, chunk, group)
    (loss * 0.5).backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": own.grad}


def case(rows: int, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64) * scale
    return hidden.to(dtype), weight.to(dtype), torch.randint(11, (rows,), generator=generator)


@pytest.mark.parametrize("world", [2, slow(4)])
@pytest.mark.parametrize("rows, dtype, scale, chunk, tolerance", [
    (9, torch.float64, 1.0, 4, 1e-12),
    slow(9, torch.float64, HUGE, 512, 1e-12),
    slow(0, torch.float64, 1.0, 4, 1e-12),
    slow(9, torch.float32, 1.0, 4, 1e-6),
    slow(9, torch.bfloat16, 1.0, 4, 2e-2),
])
def test_the_loss_of_a_split_vocabulary_is_that_of_all_logits(ranks, world, rows, dtype, scale, chunk, tolerance):
    hidden, weight, targets = (x.requires_grad_() if x.is_floating_point() else x for x in case(rows, dtype, scale))
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum")
    (exact * 0.5).backward()
    results = ranks(world, split_loss, rows, dtype, scale, chunk)
    d_hidden = sum(result["hidden"].double() for result in results)  # each rank has the term of its own ids
    d_weight = torch.cat([result["weight"] for result in results])
    largest = max(1.0, float(hidden.grad.abs().max()) if rows else 0.0)
    assert (d_hidden - hidden.grad).abs().amax() <= tolerance * largest if rows else len(d_hidden) == 0
    assert (d_weight - weight.grad).abs().max() <= tolerance * max(1.0, float(weight.grad.abs().max()))
    for result in results:
        assert result["loss"] == pytest.approx(float(exact.detach()), rel=tolerance)
        assert result["loss"].dtype == torch.promote_types(dtype, torch.float32)


def shared_logits(kind: str, tensor_ranks: int, rows: list[int] | None) -> torch.Tensor:
    model = build_shared(CONFIGS[kind], tensor_ranks, torch.float64, change=lambda model: model.double())
    initialize_weights(model, seed=0)
    set_biases(model)
    logits = model.logits(TOKENS, PackedDocuments(LENGTHS), None if rows is None else torch.tensor(rows).long())
    return logits.detach()


@pytest.mark.parametrize("world, tensor_ranks", [(2, 2), slow(4, 4), slow(4, 2)])
@pytest.mark.parametrize("kind", [slow("untied"), "tied"])
@pytest.mark.parametrize("rows", [slow(None), [0, 7, 22], []])
def test_every_rank_gets_all_logits_that_are_asked_for(ranks, kind, world, tensor_ranks, rows):
    model = Llama(CONFIGS[kind]).double()
    initialize_weights(model, seed=0)
    set_biases(model)
    indices = None if rows is None else torch.tensor(rows).long()
    with torch.no_grad():
        theirs = model.logits(TOKENS, PackedDocuments(LENGTHS), indices)
    for logits in ranks(world, shared_logits, kind, tensor_ranks, rows):
        assert logits.shape == theirs.shape
        assert torch.allclose(logits, theirs, rtol=1e-12, atol=1e-12)
