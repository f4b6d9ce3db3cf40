"""The state of a run as tensors by name: moved to a new model and optimizer, training continues bit for bit."""

import pytest
import torch
from torch import nn

from llama.boundary.errors import UserError
from llama.model import Llama, ModelConfig
from llama.storage.checkpoint import Saver
from llama.storage.manifest import read_manifest
from llama.training.optim import OPTIMIZERS, build_adamw
from llama.training.state import restore, save_state, set_optimizer_step, training_state

CONFIG = ModelConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, attention_bias=True, mlp_bias=True)  # fmt: skip


def set_gradients(model: nn.Module, step: int) -> None:
    for i, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_and_step_moved_to_a_new_optimizer_continue_bitwise(kind, steps):
    """C48: the moments by name and the step's number are all that an optimizer knows; a new one is tested, too."""
    torch.manual_seed(0)
    model, copy = Llama(CONFIG), Llama(CONFIG)
    optimizer = build_adamw(model, 0.01, 0.1, kind=kind)
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
    copy.load_state_dict(model.state_dict())
    fresh = build_adamw(copy, 0.01, 0.1, kind=kind)
    moments = training_state(copy, fresh)["optimizer"]
    assert all((moment == 0).all() for moment in moments.values())
    if steps:
        for name, moment in training_state(model, optimizer)["optimizer"].items():
            moments[name].copy_(moment)
    set_optimizer_step(fresh, steps)
    for step in (8, 9):
        for one, its in ((model, optimizer), (copy, fresh)):
            set_gradients(one, step)
            its.step()
    for a, b in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_what_is_trained_is_in_the_state_and_a_restored_one_is_bit_for_bit_as_it_was(tmp_path):
    """C35, C48: frozen weights come from the base again; both moments of each trained one are there, by its name."""
    model, copy = Llama(CONFIG), Llama(CONFIG)
    for one in (model, copy):
        one.layers[0].requires_grad_(False)
    optimizer = build_adamw(model, 0.01, 0.1)
    set_gradients(model.layers[1], 0)
    optimizer.step()
    saver = Saver(tmp_path, keep=1)
    save_state(saver, 1, model, optimizer, {}, {}, {})
    fresh = build_adamw(copy, 0.01, 0.1)
    path = tmp_path / "step-000001"
    restore(path, read_manifest(path), copy, fresh)
    before, after = training_state(model, optimizer), training_state(copy, fresh)
    trained = {name for name, _ in model.named_parameters() if not name.startswith("layers.0.")}
    assert after["model"].keys() == trained
    assert after["optimizer"].keys() == {f"{name}.{moment}" for name in trained for moment in ("exp_avg", "exp_avg_sq")}
    for part in ("model", "optimizer"):
        assert all(torch.equal(after[part][name], tensor) for name, tensor in before[part].items())
    assert all(float(state["step"]) == 1 for state in fresh.state.values())


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    """C4, R3: such a checkpoint would be useless, and would push out a good one, which the message names."""
    model = Llama(CONFIG)
    optimizer = build_adamw(model, 0.01, 0.1)
    saver = Saver(tmp_path, keep=1)
    save_state(saver, 1, model, optimizer, {}, {}, {})
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(UserError, match="^step 2: a weight is no longer finite, so nothing was saved; .*step-000001$"):
        save_state(saver, 2, model, optimizer, {}, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
