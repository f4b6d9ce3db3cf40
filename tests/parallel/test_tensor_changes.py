"""Adapters, packed weights and frozen parts in a tensor group that FSDP shards as well, against one process."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from adapters import shake
from sharded import build_shared, tensor_process
from test_parallel import slow
from test_tensor import gradients_of, loss_of, set_biases

from llama.model import Llama, ModelConfig
from llama.parallel.distribute import on_meta
from llama.parallel.gradients import sum_over_tensor_ranks
from llama.storage.base import config_to_json
from llama.storage.peft import Adapter
from llama.storage.pretrained import export_model, initialize_weights, load_weights
from llama.training.optim import gradient_norm
from lora import Changes, initialize_adapter

# Widths that nf4 can pack, also those of a rank; biases; 2 groups of 4 heads. 22 tokens are shared evenly by 2 ranks.
CONFIG = ModelConfig(vocab_size=97, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8,
                     num_key_value_heads=2, head_dim=16, attention_bias=True, mlp_bias=True, initializer_range=0.2)
TIED = replace(CONFIG, tie_word_embeddings=True)
EVEN = [9, 3, 10]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    model = Llama(CONFIG)
    initialize_weights(model, seed=0)
    set_biases(model)
    folder = tmp_path_factory.mktemp("bases") / "base"
    export_model(model, folder, config_to_json(CONFIG), dtype=torch.float32)
    return folder


def prepared(model: Llama, folder: Path, changes: Changes) -> Llama:
    load_weights(model, folder)
    if changes.adapter:
        initialize_adapter(model, seed=0)
        shake(model)
    return model.train()


def dtype_of(changes: Changes) -> torch.dtype:
    return torch.float32 if changes.quantize == "nf4" else torch.float64  # nf4 has no codes in float64


def step(folder: Path, changes: Changes, tensor_ranks: int) -> tuple[float, float, dict]:
    """Loss, gradient norm and whole gradients. All data ranks have the same data, so their mean is that of one."""
    dtype = dtype_of(changes)

    def change(model: Llama) -> None:
        changes.apply(model)
        model.to(dtype)

    model = prepared(build_shared(CONFIG, tensor_ranks, dtype, change), folder, changes)
    torch.manual_seed(5)
    loss = loss_of(model, EVEN)
    loss.backward()
    sum_over_tensor_ranks(model, tensor_process(tensor_ranks))
    return float(loss.detach()), float(gradient_norm(model)), gradients_of(model)


@cache
def expected(folder: Path, changes: Changes) -> tuple[float, float, dict]:
    model = on_meta(CONFIG)
    changes.apply(model)
    model = prepared(model.to(dtype_of(changes)).to_empty(device="cpu"), folder, changes)
    torch.manual_seed(5)
    loss = loss_of(model, EVEN)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    return float(loss.detach()), norm, gradients


@pytest.mark.parametrize("world, tensor_ranks", [(2, 2), slow(4, 2)])
@pytest.mark.parametrize("changes", [
    Changes("int8", Adapter(4, 8.0, 0.3, "dora")),
    slow(Changes("none", Adapter(4, 8.0, 0.3, "lora"))),
    slow(Changes("none", Adapter(4, 8.0, 0.0, "dora"))),
    slow(Changes("none", Adapter(4, 8.0, 0.0, "rslora", ("q_proj", "down_proj")))),
    slow(Changes("nf4", Adapter(4, 8.0, 0.0, "dora"))),
    slow(Changes("int8", Adapter(4, 8.0, 0.0, "lora"))),
    slow(Changes(train_layers="last:1,norm")),
    slow(Changes(train_layers="embed_tokens")),
    slow(Changes(train_layers="lm_head")),
])
def test_what_is_trained_of_a_changed_model_is_that_of_one_process(ranks, base, changes, world, tensor_ranks):
    their_loss, their_norm, their_gradients = expected(base, changes)
    tolerance = 2e-5 if changes.quantize == "nf4" else 1e-10
    largest = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    for loss, norm, gradients in ranks(world, step, base, changes, tensor_ranks):
        assert loss == pytest.approx(their_loss, rel=tolerance)
        assert norm == pytest.approx(their_norm, rel=tolerance)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            error = (gradient - their_gradients[name]).abs().max()
            assert error <= tolerance * largest, (name, error)
