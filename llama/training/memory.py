"""Bytes on the fullest rank, counted on the meta device: no weights and no process group are needed.

States are counted to the byte: the rank's slices of weights, gradients and the optimizer's moments. What else a step
needs comes and goes; `peak` adds it up at each point of a step where it can be most. (A moment here is AdamW's.)
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.model import Llama
from llama.model.loss import CHUNK, CHUNK_FROZEN
from llama.model.quantize import QuantizedLinear
from llama.parallel.scheme import Scheme
from llama.parallel.shards import largest_share
from llama.parallel.traffic import gathered_bytes, units_of
from llama.training.activations import Activations, Batch, of_layers
from llama.training.optim import build_adamw
from llama.training.state import training_state

FP32 = 4  # bytes


@dataclass(frozen=True)
class States:
    """Bytes that a rank holds in every step."""

    weights: int  # trained ones in fp32, frozen ones in the compute dtype or packed
    gradients: int  # fp32
    moments: int
    root_gradients: int  # those of embedding, last norm and lm_head, among the gradients

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def slice_bytes(tensor: Tensor, ranks: int) -> int:
    """Bytes of the first rank's rows; FSDP gives it the most of them."""
    if tensor.ndim == 0:
        return tensor.itemsize
    return size([tensor]) // tensor.shape[0] * largest_share(tensor.shape[0], ranks)


class Shapes:
    """The fullest tensor rank's model, as it is before FSDP shards it, and what is counted on it once for all schemes:
    the optimizer's moments, and what its layers keep."""

    def __init__(self, model: Llama, optimizer: str, tensor_ranks: int, batch: Batch):
        self.model = model
        self.batch = batch
        state = training_state(model, build_adamw(model, 1e-4, 0.0, kind=optimizer))
        self.moments = list(state["optimizer"].values())
        self.layers = of_layers(model, tensor_ranks, batch)


def states(shapes: Shapes, scheme: Scheme) -> States:
    """Of the fullest rank."""
    updated_by = scheme.mesh.replicate if scheme.sharding == "zero1" else scheme.mesh.shard
    parameters = list(shapes.model.parameters())
    root = units_of(shapes.model)[0]
    return States(
        weights=sum(slice_bytes(p, scheme.mesh.shard) for p in parameters),
        gradients=sum(slice_bytes(p, scheme.mesh.shard) for p in parameters if p.requires_grad),
        moments=sum(slice_bytes(moment, updated_by) for moment in shapes.moments),
        root_gradients=sum(slice_bytes(p, scheme.mesh.shard) for p in root if p.requires_grad),
    )


def peak(shapes: Shapes, scheme: Scheme, held: States, activations: Activations) -> float:
    """Bytes at the fullest point of a step: the largest of four sums.

    1. the end of the forward: all activations, and the loss
    2. the backward of the last layer: all activations are still there
    3. the backward of the first layer: nearly all gradients are there
    4. the gradients of embedding and head are reduced: the last ones

    With several micro-batches, gradients of earlier ones are there in all four.
    """
    model, batch = shapes.model, shapes.batch
    gathered, whole_root = _gathered(model, scheme, batch.dtype)
    unreduced = _unreduced(model, scheme, batch.dtype)
    waiting = 0  # gradients in fp32 that wait, whole, to be reduced once a step
    if scheme.micro_batches > 1 and scheme.defer_gradient_sync:
        waiting = FP32 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    earlier = max(held.gradients, waiting) if scheme.micro_batches > 1 else 0
    head = model.lm_head.weight
    of_head = head.numel() * batch.dtype.itemsize if head.requires_grad else 0
    inside = max(unreduced[1:]) + activations.inside + _unpacked(model, batch.dtype)
    all_activations = activations.kept + activations.last
    points = (
        gathered + earlier + all_activations + _loss(model, batch),
        gathered + earlier + all_activations + of_head + inside,
        gathered + max(earlier, held.gradients - held.root_gradients + waiting) + of_head + inside,
        whole_root + held.gradients + waiting + unreduced[0],
    )
    return held.weights + held.moments + max(points)


def _gathered(model: Llama, scheme: Scheme, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of weights that are whole in the compute dtype, and those of embedding and head among them. Of all layers,
    or, where they are freed after their forward, of two: one computes, one is fetched."""
    # FSDP copies and casts what it gathers, also on one rank; but what is frozen there it leaves alone.
    units = [[p for p in unit if scheme.mesh.shard > 1 or p.requires_grad] for unit in units_of(model)]
    root, *layers = [gathered_bytes(unit, scheme.mesh.shard, dtype) for unit in units]
    together = sorted(layers)[-2:] if scheme.resharded else layers
    return root + sum(together), root


def _unreduced(model: Llama, scheme: Scheme, dtype: torch.dtype) -> list[int]:
    """Bytes of each unit's gradients before they are reduced: in the compute dtype, and copied to fp32. On one rank
    that copy is what is kept."""
    number = dtype.itemsize + FP32 * (scheme.mesh.data_ranks > 1)
    return [number * sum(p.numel() for p in unit if p.requires_grad) for unit in units_of(model)]


def _unpacked(model: Llama, dtype: torch.dtype) -> int:
    """Bytes of the largest weight of 8 or 4 bits, made whole."""
    packed = [module for module in model.layers[0].modules() if isinstance(module, QuantizedLinear)]
    return max((linear.in_features * linear.out_features for linear in packed), default=0) * dtype.itemsize


def _loss(model: Llama, batch: Batch) -> int:
    """Bytes of the logits in the loss and, where lm_head is trained, of its gradient: in fp32 and in the compute dtype.
    The logits of one chunk are freed only when those of the next one are there."""
    head = model.lm_head.weight
    chunk = CHUNK if head.requires_grad else CHUNK_FROZEN
    logits = min(2 * chunk, batch.tokens) * head.shape[0]
    copies = FP32 if batch.dtype == torch.float32 else FP32 + batch.dtype.itemsize
    return logits * copies + (head.numel() * (FP32 + batch.dtype.itemsize) if head.requires_grad else 0)
