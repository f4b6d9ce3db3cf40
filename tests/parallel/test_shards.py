"""What a rank of a tensor group holds: loaded, drawn, updated, saved and exported as one process does it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sharded import build_shared
from test_parallel import slow

from llama.boundary.errors import UserError
from llama.model import Llama, ModelConfig
from llama.parallel.shards import draw, sharded_parameters
from llama.storage.base import config_to_json
from llama.storage.peft import Adapter
from llama.storage.pretrained import export_model, initialize_weights, load_weights
from llama.storage.slices import read_tensors, write_tensors
from llama.training.optim import build_adamw
from llama.training.state import training_state
from lora import Changes

# 3 groups of heads on 2 ranks; 97 ids, 50 features and 9 norm weights are shared unevenly by every number of ranks.
UNEVEN = ModelConfig(vocab_size=97, hidden_size=9, intermediate_size=50, num_hidden_layers=2, num_attention_heads=9,
                     num_key_value_heads=3, head_dim=2, attention_bias=True, mlp_bias=True)
TIED = replace(UNEVEN, tie_word_embeddings=True)
# Every block of 256 columns is on one of 2 ranks; matrices are large enough for moments of 8 bits.
BLOCKS = replace(UNEVEN, hidden_size=16, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=128)
CONFIGS = {"untied": UNEVEN, "tied": TIED, "blocks": BLOCKS}
WORLDS = [(2, 2), slow(4, 2)]  # ranks, and how many of them are a tensor group


def fill(model: Llama) -> None:
    """Values that differ everywhere, in parameters of every kind."""
    for name, parameter in sharded_parameters(model).items():
        draw(parameter, name, 1, lambda whole, generator: whole.normal_(generator=generator))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Weights


def load_and_export(source: Path, target: Path, config: ModelConfig, tensor_ranks: int, trained: str) -> bool:
    model = build_shared(config, tensor_ranks, torch.float32, Changes(train_layers=trained).apply)
    load_weights(model, source)
    export_model(model, target, config_to_json(config), dtype=torch.float32)
    return model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("world, tensor_ranks", [*WORLDS, slow(3, 3)])
@pytest.mark.parametrize("kind", [slow("untied"), "tied"])
@pytest.mark.parametrize("trained", ["all", slow("last:1")])
def test_a_folder_that_a_tensor_group_loads_and_exports_has_not_changed(
    ranks, tmp_path, kind, world, tensor_ranks, trained
):
    """C31, C42: a tied weight stays one parameter, and each part lies where it belongs. On 2 ranks FSDP leaves frozen
    weights as they are: plain tensors that carry the mark of tensor parallelism alone."""
    model = Llama(CONFIGS[kind])
    fill(model)
    export_model(model, tmp_path / "source", config_to_json(CONFIGS[kind]), dtype=torch.float32)
    source, target = tmp_path / "source", tmp_path / "target"
    is_one = ranks(world, load_and_export, source, target, CONFIGS[kind], tensor_ranks, trained)
    assert is_one == [kind == "tied"] * world
    assert files_in(target) == files_in(source)


def initialize_and_export(target: Path, config: ModelConfig, tensor_ranks: int) -> list[str]:
    model = build_shared(config, tensor_ranks, torch.float32)
    initialize_weights(model, seed=3)
    export_model(model, target, config_to_json(config), dtype=torch.float32)
    return list(sharded_parameters(model))


@pytest.mark.parametrize("world, tensor_ranks", [slow(2, 2), slow(4, 2)])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_random_weights_and_names_are_those_of_one_process(ranks, tmp_path, kind, world, tensor_ranks):
    model = Llama(CONFIGS[kind])
    initialize_weights(model, seed=3)
    export_model(model, tmp_path / "source", config_to_json(CONFIGS[kind]), dtype=torch.float32)
    names = ranks(world, initialize_and_export, tmp_path / "target", CONFIGS[kind], tensor_ranks)
    assert names == [[name for name, _ in model.named_parameters()]] * world
    assert files_in(tmp_path / "target") == files_in(tmp_path / "source")


# The state of a run


def update_and_save(model: Llama, folder: Path, optimizer_name: str, source: Path | None = None) -> None:
    """One update by gradients that are drawn, and its weights and moments on disk; or those of `source`, copied."""
    optimizer = build_adamw(model, 1e-3, 0.1, kind=optimizer_name)
    if source:
        for stem, tensors in training_state(model, optimizer).items():
            read_tensors(tensors, source, stem)
    else:
        for name, parameter in sharded_parameters(model).items():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter)
                gradient.tensor_cut = getattr(parameter, "tensor_cut", None)
                draw(gradient, name, 2, lambda whole, generator: whole.normal_(generator=generator))
                parameter.grad = gradient
        optimizer.step()
    for stem, tensors in training_state(model, optimizer).items():
        write_tensors(tensors, folder, stem)


def state_of_group(folder: Path, config: ModelConfig, tensor_ranks: int, optimizer: str, lora: bool, source=None):
    changes = Changes(adapter=Adapter(4, 8.0, variant="dora") if lora else None)
    model = build_shared(config, tensor_ranks, torch.float32, changes.apply)
    fill(model)
    update_and_save(model, folder, optimizer, source)


@pytest.mark.parametrize("world, tensor_ranks", WORLDS)
@pytest.mark.parametrize("kind, optimizer, lora", [
    ("tied", "adamw", True),
    slow("untied", "adamw", False),
    slow("blocks", "adamw8bit", False),
    slow("blocks", "adamw8bit", True),
])
def test_a_checkpoint_has_the_same_bytes_from_any_mesh_and_is_read_back_by_any(
    ranks, tmp_path, kind, optimizer, lora, world, tensor_ranks
):
    """C5, R24."""
    for name in ("one", "group", "copy"):
        (tmp_path / name).mkdir()
    model = Llama(CONFIGS[kind])
    Changes(adapter=Adapter(4, 8.0, variant="dora") if lora else None).apply(model)
    fill(model)
    update_and_save(model, tmp_path / "one", optimizer)
    ranks(world, state_of_group, tmp_path / "group", CONFIGS[kind], tensor_ranks, optimizer, lora)
    assert files_in(tmp_path / "group") == files_in(tmp_path / "one")
    ranks(world, state_of_group, tmp_path / "copy", CONFIGS[kind], tensor_ranks, optimizer, lora, tmp_path / "one")
    assert files_in(tmp_path / "copy") == files_in(tmp_path / "one")


def refused_optimizer(config: ModelConfig, tensor_ranks: int) -> str:
    model = build_shared(config, tensor_ranks, torch.float32)
    with pytest.raises(UserError) as caught:
        build_adamw(model, 1e-3, 0.1, kind="adamw8bit")
    return str(caught.value)


@pytest.mark.slow
def test_8_bit_moments_whose_block_would_be_cut_are_refused_by_name_on_every_rank(ranks):
    """C40. 768 columns on 4 ranks: rank 1 begins at 192, rank 2 at 384, rank 3 at 576."""
    config = replace(BLOCKS, intermediate_size=768, num_attention_heads=8, num_key_value_heads=4)
    messages = ranks(4, refused_optimizer, config, 4)
    assert len(set(messages)) == 1
    assert messages[0].startswith("--optimizer adamw8bit: --tensor_parallel 4 cuts layers.0.mlp.down_proj.weight at "
                                  "column 192, expected a multiple of 256")


def accepted_optimizer(config: ModelConfig, tensor_ranks: int) -> int:
    model = build_shared(config, tensor_ranks, torch.float32, Changes(adapter=Adapter(4, 8.0)).apply)
    return len(build_adamw(model, 1e-3, 0.1, kind="adamw8bit").param_groups)


def test_matrices_too_small_for_8_bit_moments_may_be_cut_anywhere(ranks):
    """C40. Here each half of an adapter has fewer than 4,096 numbers, and no blocks."""
    assert ranks(2, accepted_optimizer, CONFIGS["tied"], 2) == [2, 2]
