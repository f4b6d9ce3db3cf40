"""A model shared by the ranks of a tensor group against the same model in one process."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from sharded import build_shared, tensor_process
from test_parallel import slow

from llama.boundary.errors import UserError
from llama.boundary.untrusted import read_json
from llama.generation.decode import generate
from llama.generation.request import Request
from llama.generation.settings import GenerationSettings
from llama.generation.step import lay_out
from llama.model import Llama, ModelConfig, PackedDocuments
from llama.parallel.collectives import any_rank, gather
from llama.parallel.distribute import on_meta
from llama.parallel.gradients import sum_over_tensor_ranks
from llama.parallel.shards import Part, cut_as, local_slice, region, whole_shape
from llama.parallel.tensor import cut, mark
from llama.storage.config_json import config_from_json
from llama.storage.pretrained import initialize_weights, load_weights
from lora import Changes

# Neither 2 nor 4 ranks divide 97 ids, 42 features or 23 tokens; 5 groups of heads are shared 2 + 3 and 1 + 1 + 1 + 2.
UNTIED = ModelConfig(vocab_size=97, hidden_size=30, intermediate_size=42, num_hidden_layers=2, num_attention_heads=10,
                     num_key_value_heads=5, head_dim=6, attention_bias=True, mlp_bias=True, initializer_range=0.2)
TIED = replace(UNTIED, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)
CONFIGS = {"untied": UNTIED, "tied": TIED}
LENGTHS = [9, 3, 11]


def set_biases(model: Llama) -> None:
    """Biases that are not 0, as initialize_weights leaves them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                local, start = local_slice(parameter)
                values = torch.linspace(-1, 1, whole_shape(parameter)[0], dtype=parameter.dtype)
                local.copy_(values[region(start, local)])


def loss_of(model: Llama, lengths: list[int] = LENGTHS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(97, (sum(lengths),), generator=generator)
    rows = torch.tensor([0, 1, 5, 10, 11, 18, 19, 20])
    return model(tokens, PackedDocuments(lengths), rows, tokens[rows + 1]) / 8


def assembled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole of every tensor from the parts that ranks would write. Collective."""
    whole: dict[str, torch.Tensor] = {}
    for parts in gather({name: Part.of(tensor) for name, tensor in tensors.items()}):
        for name, part in parts.items():
            target = whole.setdefault(name, torch.full(part.shape, torch.nan, dtype=part.local.dtype))
            target[region(part.start, part.local)] = part.local
    return whole


def gradients_of(model: Llama) -> dict[str, torch.Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = cut_as(parameter.grad, parameter)
    return assembled(gradients)


def step(config: ModelConfig, dtype: torch.dtype, tensor_ranks: int) -> tuple[float, dict]:
    """Loss and gradients. Without FSDP, so that nothing but tensor parallelism can go wrong."""
    process = tensor_process(tensor_ranks)
    model = on_meta(config)
    cut(model, process)
    model.to_empty(device="cpu")
    mark(model)
    initialize_weights(model, seed=0)
    set_biases(model)
    model.to(dtype)
    mark(model)
    loss = loss_of(model)
    loss.backward()
    sum_over_tensor_ranks(model, process)
    return float(loss.detach()), gradients_of(model)


@cache
def expected(config: ModelConfig) -> tuple[float, dict]:
    model = Llama(config)
    initialize_weights(model, seed=0)
    set_biases(model)
    loss = loss_of(model.double())
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("ranks_of_group", [2, slow(4)])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), slow(torch.float32, 2e-6), slow(torch.bfloat16, 3e-2),
])
def test_a_tensor_group_computes_the_loss_and_gradients_of_one_process(ranks, kind, dtype, tolerance, ranks_of_group):
    their_loss, their_gradients = expected(CONFIGS[kind])
    largest = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    for loss, gradients in ranks(ranks_of_group, step, CONFIGS[kind], dtype, ranks_of_group):
        assert loss == pytest.approx(their_loss, rel=tolerance)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            error = (gradient - their_gradients[name]).abs().max()
            assert error <= tolerance * largest, (name, error)


def answers_of(tensor_ranks: int, num_beams: int) -> list[list[int]]:
    model = build_shared(TIED, tensor_ranks, torch.float32)
    initialize_weights(model, seed=0)
    return answers(model, num_beams, any_rank)


def answers(model: Llama, num_beams: int, together=bool) -> list[list[int]]:
    """What follows prompts of several lengths, of which two are read at a time."""
    settings = GenerationSettings(max_new_tokens=7, num_beams=num_beams)
    prompts = [[3], [1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [8, 2, 8, 1]]
    requests = [Request(prompt, settings, frozenset()) for prompt in prompts]
    found = dict(generate(lay_out(model, 1), requests, 2, together))
    return [found[i].ids for i in range(len(prompts))]


@pytest.mark.parametrize("world, tensor_ranks", [(2, 2), slow(4, 4), slow(4, 2)])
@pytest.mark.parametrize("num_beams", [1, slow(3)])
def test_a_tensor_group_writes_what_one_process_writes(ranks, world, tensor_ranks, num_beams):
    """Each rank caches its own key/value heads. A step of one token is a stream that is shorter than the group."""
    model = Llama(TIED)
    initialize_weights(model, seed=0)
    expected = answers(model, num_beams)
    assert ranks(world, answers_of, tensor_ranks, num_beams) == [expected] * world


def smollm2_loss(folder: Path, dtype: torch.dtype) -> tuple[float, tuple[int, ...]]:
    model = build_shared(config_from_json(read_json(folder, "config.json"), folder), 2, dtype)
    load_weights(model, folder)
    shape = tuple(model.layers[0].self_attn.q_proj.weight.shape)
    return float(loss_of(model).detach()), shape


@pytest.mark.slow
def test_smollm2_is_shared_by_2_ranks_with_3_and_6_of_its_9_heads(ranks, smollm2):
    """C42: its 3 key/value heads are not cut in the middle."""
    model = Llama(config_from_json(read_json(smollm2, "config.json"), smollm2))
    load_weights(model, smollm2)
    with torch.no_grad():
        expected = float(loss_of(model))
    results = ranks(2, smollm2_loss, smollm2, torch.float32)
    assert [shape for _, shape in results] == [(3 * 64, 576), (6 * 64, 576)]
    for loss, _ in results:
        assert loss == pytest.approx(expected, rel=1e-6)


def refused(config: ModelConfig, quantize: str) -> str:
    model = on_meta(config)
    Changes(quantize).apply(model)
    with pytest.raises(UserError) as caught:
        cut(model, tensor_process(4))
    return str(caught.value)


SHAREABLE = replace(UNTIED, hidden_size=64, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4,
                    head_dim=64)


@pytest.mark.parametrize("change, quantize, message", [
    ({"num_attention_heads": 9, "num_key_value_heads": 3}, "none",
     "--tensor_parallel 4: the model has 3 key/value heads, expected at least 4, one for each rank"),
    ({"intermediate_size": 3}, "none",
     "--tensor_parallel 4: the model has 3 features, expected at least 4, one for each rank"),
    ({"vocab_size": 3}, "none",
     "--tensor_parallel 4: the model has 3 token ids, expected at least 4, one for each rank"),
    ({"intermediate_size": 192}, "nf4",
     "--tensor_parallel 4: the model has 3 blocks of 64 features, expected at least 4, one for each rank"),
    ({"head_dim": 16}, "nf4", "--tensor_parallel 4 --quantize nf4: o_proj has 32 columns for each key/value head, "
                              "expected a multiple of 64; use --quantize int8"),
])
def test_a_model_that_a_tensor_group_cannot_share_is_refused_by_name(ranks, change, quantize, message):
    """C40."""
    results = ranks(4, refused, replace(SHAREABLE, **change), quantize)
    assert results == [message] * 4
