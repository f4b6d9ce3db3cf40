"""The learning rate as a function of the step, what decays, AdamW against a hand-written one."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import get_linear_schedule_with_warmup

from llama.boundary.choices import SCHEDULES
from llama.model import Llama, ModelConfig
from llama.training.optim import (
    COSINE_END,
    build_adamw,
    clip_gradients,
    gradient_norm,
    learning_rate,
)

CONFIG = ModelConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, attention_bias=True, mlp_bias=True)


def rates(steps: int, schedule: str, warmup_ratio: float, peak: float = 1.0) -> list[float]:
    return [learning_rate(step, steps, peak, schedule, warmup_ratio) for step in range(steps)]


@settings(deadline=None)
@given(st.integers(1, 300), st.sampled_from(SCHEDULES), st.floats(0, 1))
@example(1, "cosine", 0.0)
@example(1, "linear", 1.0)
@example(2, "cosine", 0.5)
def test_the_rate_rises_to_the_peak_and_never_rises_again(steps, schedule, warmup_ratio):
    """C6: any number of steps; never 0, never above the peak, which the last step of the warm-up reaches."""
    curve, warmup = rates(steps, schedule, warmup_ratio), math.ceil(warmup_ratio * steps)
    assert all(0 < rate <= 1 for rate in curve)
    rise, fall = curve[:warmup], curve[warmup:]
    assert all(a < b for a, b in zip(rise, rise[1:], strict=False))
    assert all(a >= b for a, b in zip(fall, fall[1:], strict=False))
    assert rise[-1:] in ([], [1.0]) and fall[:1] in ([], [1.0])


@pytest.mark.parametrize("steps, warmup_ratio", [(2, 0.0), (100, 0.0), (100, 0.05), (7, 0.5), (1000, 0.98)])
def test_a_cosine_ends_at_exactly_a_tenth_of_the_peak(steps, warmup_ratio):
    """C6: at the last step itself, not one step after it; half-way down is half-way between."""
    assert rates(steps, "cosine", warmup_ratio, peak=3e-4)[-1] == COSINE_END * 3e-4 == 0.1 * 3e-4
    assert rates(101, "cosine", 0.0)[50] == pytest.approx((1 + COSINE_END) / 2)


@pytest.mark.parametrize("steps, warmup_ratio", [(1, 0.0), (10, 0.0), (40, 0.1), (7, 0.5), (5, 1.0)])
def test_linear_falls_as_in_transformers(steps, warmup_ratio):
    """C6: equal rate for rate, but that transformers wastes its first step of a warm-up on a rate of 0."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    warmup = math.ceil(warmup_ratio * steps)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    theirs = []
    for _ in range(steps + 1):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    expected = theirs[1 : warmup + 1] + theirs[warmup:steps]
    if warmup == steps:
        expected[-1] = 1.0  # theirs is at its end, 0, already
    assert rates(steps, "linear", warmup_ratio) == pytest.approx(expected, abs=1e-12)


def test_constant_stays_and_a_whole_run_may_be_warm_up():
    """C6: warmup_ratio 0 starts at the peak, 1 ends there."""
    assert rates(5, "constant", 0.0, 0.25) == [0.25] * 5
    for schedule in SCHEDULES:
        assert rates(4, schedule, 1.0) == [0.25, 0.5, 0.75, 1.0]
        assert rates(1, schedule, 0.0) == rates(1, schedule, 1.0) == [1.0]


def test_the_rate_of_a_step_needs_no_history():
    """C6: asked backwards, or for one step alone after a resume, the answer is the same."""
    forwards = rates(50, "cosine", 0.1)
    backwards = [learning_rate(step, 50, 1.0, "cosine", 0.1) for step in reversed(range(50))]
    assert backwards[::-1] == forwards


def test_norms_and_biases_never_decay():
    """C9: with zero gradients only the matrices shrink, each by lr x decay."""
    model = Llama(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    build_adamw(model, learning_rate=0.1, weight_decay=0.5).step()
    for name, p in model.named_parameters():
        is_vector = "norm" in name or name.endswith(".bias")
        assert is_vector == (p.ndim == 1)
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1.0 if is_vector else 0.95))


def test_only_trainable_parameters_are_given_to_the_optimizer_and_each_once():
    """C31, C35: nothing frozen, a tied matrix one time."""
    model = Llama(ModelConfig(**vars(CONFIG) | {"tie_word_embeddings": True}))
    model.layers[0].requires_grad_(False)
    given = [p for group in build_adamw(model, 0.1, 0.5).param_groups for p in group["params"]]
    assert len(given) == len({id(p) for p in given})
    assert {id(p) for p in given} == {id(p) for p in model.parameters() if p.requires_grad}


def set_gradients(model: nn.Module, step: int) -> None:
    for i, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def adamw(w, gradients: list, rates: list[float], decay: float, beta2: float) -> torch.Tensor:
    """Algorithm 2 of Loshchilov & Hutter 2019, with Adam's usual first beta and epsilon."""
    m = v = torch.zeros_like(w)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - beta2**t)
        w = w - rate * (m_hat / (v_hat.sqrt() + 1e-8) + decay * w)
    return w


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_ten_steps_equal_a_hand_written_adamw(beta2, dtype, tolerance):
    """C6, C9: with a rate that changes each step, set as the training loop sets it."""
    torch.manual_seed(0)
    model = Llama(CONFIG).to(dtype)
    start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    optimizer = build_adamw(model, 1.0, 0.1, beta2)
    gradients, curve = {name: [] for name in start}, rates(10, "cosine", 0.3, peak=0.01)
    for step, rate in enumerate(curve):
        set_gradients(model, step)
        for name, p in model.named_parameters():
            gradients[name].append(p.grad.double())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for name, p in model.named_parameters():
        expected = adamw(start[name], gradients[name], curve, 0.1 if p.ndim == 2 else 0.0, beta2)
        assert (p - expected).abs().max() <= tolerance, name


def test_small_updates_move_fp32_weights_and_would_be_lost_in_bf16():
    """C7: at a rate of 1e-5 beside weights near 1, which bf16 spaces 2^-8 to 2^-7 apart."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(8, 8, bias=False, dtype=dtype)
        nn.init.uniform_(layer.weight, 1.01, 1.2)
        before = layer.weight.detach().clone()
        optimizer = build_adamw(layer, learning_rate=1e-5, weight_decay=0.0)
        for _ in range(3):
            x = torch.ones(2, 8, dtype=torch.bfloat16)
            nn.functional.linear(x, layer.weight.bfloat16()).float().sum().backward()  # computed in bf16 either way
            optimizer.step()
            optimizer.zero_grad()
        moved = (layer.weight != before).float().mean()
        assert moved == (1 if dtype == torch.float32 else 0)
        if moved:
            torch.testing.assert_close(before - layer.weight.detach(), torch.full((8, 8), 3e-5), rtol=0.02, atol=0)


def test_the_gradient_norm_is_that_of_all_gradients_and_clipping_scales_them_to_it():
    """C5 in one process: a norm under the limit, or a limit of 0, leaves every gradient as it is."""
    model = Llama(CONFIG).double()
    set_gradients(model, 0)
    model.norm.weight.grad = None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = gradient_norm(model)
    expected = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
    assert float(norm) == pytest.approx(expected, rel=1e-12)
    for limit, scale in ((0.0, 1.0), (2 * expected, 1.0), (expected / 4, 0.25)):
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone() if name in gradients else None
        clip_gradients(model, norm, limit)
        for name, g in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, scale * g, rtol=2e-6, atol=0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_one_gradient_that_is_not_finite_shows_in_the_norm(poison):
    """C4: what the training loop looks at before the weights change."""
    model = Llama(CONFIG)
    set_gradients(model, 0)
    model.layers[1].mlp.up_proj.bias.grad[3] = poison
    assert not gradient_norm(model).isfinite()
