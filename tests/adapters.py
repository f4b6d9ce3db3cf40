"""What tests of adapters share: small bases on disk, models with an adapter on them, and what PEFT computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sharded import build, this_process, whole
from torch import nn

from llama.boundary.untrusted import read_json
from llama.model import Llama, ModelConfig, PackedDocuments
from llama.parallel.shards import local_slice, region, whole_shape
from llama.storage import pretrained
from llama.storage.base import config_from_json, config_to_json
from llama.storage.peft import Adapter, load_adapter, read_adapter, save_adapter
from lora import Changes, apply_adapter, initialize_adapter

# Odd sizes: neither 2 nor 4 ranks divide 10, 30 or 97 rows evenly.
ODD = ModelConfig(vocab_size=97, hidden_size=30, intermediate_size=42, num_hidden_layers=2, num_attention_heads=3,
                  num_key_value_heads=1, head_dim=10, initializer_range=0.2)  # fmt: skip
BIASED = replace(ODD, attention_bias=True, mlp_bias=True)
# Widths that NF4 can pack.
BLOCKS = replace(ODD, hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16)
CONFIGS = {"odd": ODD, "biased": BIASED, "blocks": BLOCKS}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The fast tests take the variant that has the most parts.
ONE_VARIANT_FAST = [pytest.param(variant, marks=pytest.mark.slow) for variant in ("lora", "rslora")] + ["dora"]
BIASED_FAST = [pytest.param("odd", marks=pytest.mark.slow), "biased"]
TOKENS = torch.randint(97, (23,), generator=torch.Generator().manual_seed(3))


def write_bases(parent: Path) -> dict[str, Path]:
    """Pretrained folders in fp32, by the names of CONFIGS; biases are not zero, as `initialize_weights` leaves them."""
    folders = {}
    for name, config in CONFIGS.items():
        model = Llama(config)
        generator = torch.Generator().manual_seed(1)
        pretrained.initialize_weights(model, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += torch.randn(parameter.shape, generator=generator) / 4
        folders[name] = parent / name
        pretrained.export_model(model, folders[name], config_to_json(config), dtype=torch.float32)
    return folders


def config_of(folder: Path) -> ModelConfig:
    return config_from_json(read_json(folder, "config.json"), folder)


def opened(folder: Path, adapter: Adapter | None = None, kind: str | None = None, dtype=torch.float32, **how) -> Llama:
    """A sharded model from a folder, quantised or not, with an adapter as it is at the start of a run."""
    changes = Changes(kind or "none", adapter)
    model = build(config_of(folder), this_process(), dtype, change=changes.apply, **how)
    pretrained.load_weights(model, folder)
    if adapter:
        initialize_adapter(model, seed=0)
    return model


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Make the trained weights such that they change what the model computes, alike on any number of ranks."""
    generator = torch.Generator().manual_seed(7)
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        local, start = local_slice(parameter)
        noise = torch.randn(whole_shape(parameter), generator=generator)[region(start, local)]
        local.add_(noise / 10 if parameter.ndim == 2 else noise * local / 5)


@torch.no_grad()
def logits(model: Llama, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model.logits(tokens, PackedDocuments([len(tokens)])).float()


def loss(model: Llama, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens, PackedDocuments([len(tokens)]), torch.arange(len(tokens) - 1), tokens[1:])


def write_adapter(base: Path, folder: Path, adapter: Adapter, kind: str | None = None) -> dict:
    """Save an adapter that is not trivial. Returns what the model then computes, and the adapter's values."""
    model = opened(base, adapter, kind)
    shake(model)
    save_adapter(model, folder, adapter, str(base))
    return {"logits": logits(model.eval()), "values": trained_values(model)}


def read_back(base: Path, folder: Path, kind: str | None = None) -> dict:
    """The same of an adapter that is on disk."""
    model = opened(base, read_adapter(folder), kind)
    load_adapter(model, folder)
    return {"logits": logits(model.eval()), "values": trained_values(model)}


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def transformers_model(folder: Path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def their_logits(model) -> torch.Tensor:
    return model(TOKENS[None]).logits[0].float()


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def write_dora(folder: Path) -> Path:
    """An adapter over the base `odd`, as a single process writes it."""
    adapter = Adapter(4, 8.0, variant="dora")
    model = Llama(ODD)
    apply_adapter(model, adapter)
    initialize_adapter(model, 0)
    shake(model)
    save_adapter(model, folder, adapter, "odd")
    return folder
