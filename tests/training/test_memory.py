"""The planner's bytes: states against what real ranks hold, activations against autograd, peaks against one H200."""

import json
from pathlib import Path

import pytest
import torch
from sharded import build, this_process

from llama.model import ModelConfig
from llama.parallel.distribute import keep_frozen_in, on_meta
from llama.parallel.mesh import MeshShape
from llama.parallel.scheme import Scheme, fullest_tensor_rank
from llama.parallel.shards import local_slice
from llama.storage.named_shapes import NAMED_SHAPES
from llama.storage.peft import Adapter
from llama.training import activations
from llama.training.activations import Batch, of_layers
from llama.training.memory import Shapes, peak, size, states
from llama.training.optim import build_adamw
from llama.training.state import training_state
from lora import Changes

ROOT = Path(__file__).resolve().parents[2]
LORA = Adapter(8, 16.0)
ODD = ModelConfig(vocab_size=77, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, attention_bias=True, tie_word_embeddings=True)


def shapes_of(config: ModelConfig, changes: Changes, optimizer: str, batch: Batch, tensor_ranks: int = 1) -> Shapes:
    model = on_meta(fullest_tensor_rank(config, tensor_ranks))
    changes.apply(model)
    keep_frozen_in(batch.dtype, model)
    return Shapes(model, optimizer, tensor_ranks, batch)


def held_by_a_rank(changes: Changes, optimizer: str) -> list[int]:
    """Bytes of weights, gradients and moments of a rank of a real model."""
    model = build(ODD, this_process(), torch.bfloat16, changes.apply)
    update = build_adamw(model, 1e-4, 0.0, kind=optimizer)
    moments = training_state(model, update)["optimizer"].values()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [size(local_slice(tensor)[0] for tensor in tensors) for tensors in (model.parameters(), trained, moments)]


@pytest.mark.parametrize("changes, optimizer", [
    (Changes(), "adamw"), (Changes(), "adamw8bit"), (Changes("int8", LORA), "adamw"), (Changes("nf4", LORA), "adamw"),
    (Changes(train_layers="last:1,norm"), "adamw"),
], ids=str)  # fmt: skip
def test_states_are_those_of_a_real_rank_to_the_byte(ranks, changes, optimizer):
    """77 rows on 4 ranks are 20, 20, 20 and 17: the planner says what the first rank holds."""
    found = states(shapes_of(ODD, changes, optimizer, Batch(64)), Scheme("full", MeshShape(1, 4, 1)))
    first, *others = ranks(4, held_by_a_rank, changes, optimizer)
    assert [found.weights, found.gradients, found.moments] == first
    assert all(sum(other) <= sum(first) for other in others)


def test_zero1_divides_the_moments_only():
    whole = states(shapes_of(ODD, Changes(), "adamw", Batch(64)), Scheme("none", MeshShape(4, 1, 1)))
    shared = states(shapes_of(ODD, Changes(), "adamw", Batch(64)), Scheme("zero1", MeshShape(4, 1, 1)))
    assert (shared.weights, shared.gradients) == (whole.weights, whole.gradients)
    assert whole.moments / 4 < shared.moments < whole.moments / 3


@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_a_layer_keeps_what_the_paper_s_count_says(tensor_ranks, monkeypatch):
    """By hand, numbers a token: both norms keep their input; q, k, v with the output of attention; the input of each
    half; gate, silu(gate), up and their product. https://arxiv.org/abs/2205.05198, section 4, for our layer."""
    monkeypatch.setattr(activations, "VARLEN_OPTIONS", {"enable_gqa"})
    c = NAMED_SHAPES["8b"]
    D, F = c.hidden_size, c.intermediate_size // tensor_ranks
    q, k = c.num_attention_heads * c.head_dim // tensor_ranks, c.num_key_value_heads * c.head_dim // tensor_ranks
    numbers = 2 * D / tensor_ranks + (D + q + 2 * k + q) + (D + 4 * F) + c.head_dim / 2  # a table of angles
    floats = 2 / tensor_ranks + c.num_attention_heads / tensor_ranks  # a factor a row in each norm; log-sums
    shapes = shapes_of(c, Changes(), "adamw", Batch(4096), tensor_ranks)
    assert shapes.layers[0][0] == 4096 * (2 * numbers + 4 * floats)
    assert len(shapes.layers) == c.num_hidden_layers


def test_an_adapter_adds_what_it_computes_and_dropout_a_mask_and_a_copy():
    batch = Batch(64)
    plain, low, dropped = (
        of_layers(shapes_of(ODD, changes, "adamw", batch).model, 1, batch)[0][0]
        for changes in (Changes(), Changes(adapter=LORA), Changes(adapter=Adapter(8, 16.0, 0.1)))
    )
    assert plain < low <= plain + 64 * 7 * 8 * 2 < dropped


def test_frozen_layers_below_the_trained_ones_keep_nothing():
    batch = Batch(64)
    assert len(shapes_of(ODD, Changes(train_layers="last:1"), "adamw", batch).layers) == 1
    assert shapes_of(ODD, Changes(train_layers="norm"), "adamw", batch).layers == []


MEASURED = {  # jobs of benchmarks/results/gpu_h200.json, and how far off the count may be
    "1b-full": ("1b", Changes(), "adamw", "none", 0.03),
    "1b-full-adamw8bit-ckpt": ("1b", Changes(), "adamw8bit", "full", 0.03),
    "1b-full-fp32": ("1b", Changes(), "adamw", "none", 0.1),  # fp32 attention keeps masks
    "8b-lora": ("8b", Changes(adapter=LORA), "adamw", "none", 0.03),
    "8b-lora-ckpt": ("8b", Changes(adapter=LORA), "adamw", "full", 0.03),
    "8b-lora-nf4-ckpt": ("8b", Changes("nf4", LORA), "adamw", "full", 0.08),
}


@pytest.mark.parametrize("job", MEASURED)
def test_the_peak_is_what_was_measured_on_a_gpu(job, monkeypatch):
    """One H200 with torch 2.11, whose attention kernel reads each head's own keys and values; 4,096 tokens a step."""
    monkeypatch.setattr(activations, "VARLEN_OPTIONS", {"is_causal"})
    name, changes, optimizer, checkpointing, tolerance = MEASURED[job]
    jobs = json.loads((ROOT / "benchmarks/results/gpu_h200.json").read_text())["jobs"]
    (measured,) = (found["peak_gb"] for found in jobs if found["job"] == job)
    batch = Batch(4096, torch.float32 if "fp32" in job else torch.bfloat16)
    shapes = shapes_of(NAMED_SHAPES[name], changes, optimizer, batch)
    scheme = Scheme("full", MeshShape(1, 1, 1), checkpointing)
    kept = activations.activations(shapes.model, scheme, batch, shapes.layers)
    assert peak(shapes, scheme, states(shapes, scheme), kept) / 1e9 == pytest.approx(measured, rel=tolerance)
