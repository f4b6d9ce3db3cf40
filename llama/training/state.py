"""The state of a run, as tensors: what a checkpoint must hold, and how a run continues from it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llama.boundary.errors import UserError
from llama.parallel.shards import all_finite, cut_as, sharded_parameters
from llama.parallel.zero1 import ZeRO1
from llama.storage.checkpoint import Saver, load_checkpoint
from llama.storage.manifest import Manifest, verify
from llama.training.adamw8bit import AdamW8bit

Optimizer = torch.optim.Optimizer | ZeRO1


def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Mapping[str, Tensor]]:
    """All tensors that a resumed run needs, as a checkpoint keeps them: {"model": ..., "optimizer": ...}.

    Only trained weights are kept; frozen ones come from the base again. The data order, dropout and learning rate are
    functions of the step, so they need no state. With ZeRO-1 a rank saves and reads only the rows that it updates.
    """
    trained: Mapping[str, Tensor] = trained_parameters(model)
    if isinstance(optimizer, ZeRO1):
        trained = {name: optimizer.rows[parameter] for name, parameter in trained.items()}
        optimizer = optimizer.inner
    return {"model": trained, "optimizer": optimizer_tensors(trained, optimizer)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in sharded_parameters(model).items() if p.requires_grad}


def optimizer_tensors(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Both moments of every trained parameter under the parameter's name, sharded as it is.

    A new optimizer has no moments yet: it gets zeros, so that a checkpoint can be read into them.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if isinstance(optimizer, AdamW8bit):
            moments = optimizer.moments(parameter)
        else:
            moments = optimizer.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in moments:
                    moments[moment] = torch.zeros_like(parameter, requires_grad=False)
            moments = {moment: cut_as(moments[moment], parameter) for moment in ("exp_avg", "exp_avg_sq")}
        tensors |= {f"{name}.{key}": tensor for key, tensor in moments.items()}
    return tensors


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell AdamW how many updates its moments have seen: the bias correction depends on it."""
    on_device = not isinstance(optimizer, AdamW8bit)  # the fused kernel reads it there
    for parameter, state in optimizer.state.items():
        state["step"] = torch.tensor(float(step), device=parameter.device if on_device else "cpu")


def restore(saved: Path, manifest: Manifest, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill model and optimizer from a checkpoint, after reading every byte of it for damage. Collective.

    Raises UserError, on every rank, for a checkpoint that is not as it was written.
    """
    verify(saved, manifest)
    load_checkpoint(saved, training_state(model, optimizer))
    if isinstance(optimizer, ZeRO1):
        optimizer.gather_updated_rows()
        optimizer = optimizer.inner
    set_optimizer_step(optimizer, manifest.step)


def save_state(
    saver: Saver,
    done: int,
    model: nn.Module,
    optimizer: Optimizer,
    identity: dict,
    totals: dict,
    held_out: dict,
) -> None:
    """Save a checkpoint after step `done`. Collective. Raises UserError, on every rank, when a weight is not finite: a
    checkpoint that holds it would be useless, and would push out a good one."""
    if not all_finite(model):
        raise UserError(
            f"step {done}: a weight is no longer finite, so nothing was saved; whole checkpoints: {saver.newest}"
        )
    saver.save(done, training_state(model, optimizer), identity, totals, held_out)
