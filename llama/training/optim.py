"""The optimizer: its parameter groups, the learning rate as a pure function of the step, and the gradient's norm."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from llama.parallel.shards import cut_as, sum_of_squares_over_ranks
from llama.training.adamw8bit import AdamW8bit, refuse_cut_blocks

COSINE_END = 0.1  # a cosine schedule ends at this part of its peak


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`.

    It rises linearly to `peak` over the first warmup_ratio * steps. Then `constant` stays there, `linear` falls so that
    it would reach 0 one step after the last, and `cosine` falls to 0.1 * peak at the last step.
    It depends on nothing else, so a resumed run needs only its step number to continue the schedule.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "linear":
        return peak * (steps - step) / (steps - warmup)
    if schedule == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return peak * (COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * done)) / 2)
    return peak


OPTIMIZERS: dict[str, Callable] = {"adamw": partial(torch.optim.AdamW, fused=True), "adamw8bit": AdamW8bit}


def build_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, beta2: float = 0.999, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) over the trainable parameters.

    Weight decay pulls matrices towards 0. Norm scales and biases need not be small, so they do not decay. Call this
    after sharding, before any forward: only then are model.parameters() the fp32 shards that AdamW must update.
    """
    if kind == "adamw8bit":
        refuse_cut_blocks(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[kind](groups, lr=learning_rate, betas=(0.9, beta2), eps=1e-8)


def gradient_norm(model: nn.Module) -> Tensor:
    """sqrt of the sum of all squared gradients over all shards, a scalar in their dtype, the same on every rank."""
    gradients = [cut_as(p.grad, p) for p in model.parameters() if p.grad is not None]  # a tied weight is one of them
    return sum_of_squares_over_ranks(gradients).sqrt().to(gradients[0].dtype)


def clip_gradients(model: nn.Module, norm: Tensor, max_norm: float) -> None:
    """If norm > max_norm, multiply all gradients by max_norm / norm. max_norm = 0 switches clipping off."""
    if max_norm > 0:
        trained = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
