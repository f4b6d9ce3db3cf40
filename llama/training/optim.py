"""What is optimised how: parameter groups, the learning rate as a pure function of the step, gradient norm."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama.training.adamw8bit import AdamW8bit

SCHEDULES = ("constant", "linear", "cosine")
COSINE_END = 0.1  # of the peak: where a cosine ends, at the last step


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`.

    Rises linearly to `peak` over the first warmup_ratio * steps. Then `constant`: stays; `linear`: falls so that it
    would reach 0 one step after the last; `cosine`: falls to 0.1 * peak at the last step.
    No state, no number of ranks, no micro-batches: resuming needs only the step.
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


OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True), "adamw8bit": AdamW8bit}


def build_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, beta2: float = 0.999, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) over the trainable parameters.

    Weight decay pulls matrices towards 0; a norm's scale or a bias has no reason to be small and is left out.
    Build it after sharding and before any forward, while the parameters are the shards.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[kind](groups, lr=learning_rate, betas=(0.9, beta2), eps=1e-8)


def gradient_norm(model: nn.Module) -> Tensor:
    """sqrt of the sum of all squared gradients over all shards, an fp32 scalar, the same on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where the norm is larger than that. 0 leaves them as they are."""
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], max_norm, norm)


def optimizer_tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is kept of both moments of every trained parameter under the parameter's name, sharded as it is.

    A fresh optimizer gets zero moments here, so that there is something to read a checkpoint into.
    """
    tensors = {}
    for name, parameter in parameters.items():
        if isinstance(optimizer, AdamW8bit):
            tensors |= {f"{name}.{key}": tensor for key, tensor in optimizer.moments(parameter).items()}
            continue
        state = optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(parameter, requires_grad=False)
            tensors[f"{name}.{moment}"] = state[moment]
    return tensors


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell AdamW how many updates its moments have seen; the bias correction depends on it."""
    on_device = not isinstance(optimizer, AdamW8bit)  # the fused kernel reads it there
    for parameter, state in optimizer.state.items():
        state["step"] = torch.tensor(float(step), device=parameter.device if on_device else "cpu")
