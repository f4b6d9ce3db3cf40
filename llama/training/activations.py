"""Bytes of activations: what autograd keeps of each layer for its backward, counted by running the layer's own code.

It runs on the meta device, where tensors have shapes and no memory. So an adapter, its dropout or a quantised base
counts as what it is. Which tensors are kept, and which are computed again: Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from llama.model import Llama
from llama.model.decoder import DecoderLayer
from llama.model.packed import VARLEN_OPTIONS
from llama.parallel.scheme import Scheme
from llama.parallel.shards import largest_share
from llama.parallel.traffic import lowest_trained_layer

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of so many tokens, all with labels, and what computes it."""

    tokens: int
    dtype: torch.dtype = torch.bfloat16
    on_gpu: bool = True  # whether a GPU's fused kernels do


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank."""

    kept: float  # of all layers, from the forward to the backward
    inside: float  # of the one layer whose backward runs: what it computes again, and its gradients
    last: float  # of what follows the layers: the rows with labels, normalised, and their gradient


def activations(model: Llama, scheme: Scheme, batch: Batch, layers: list[tuple[int, int]]) -> Activations:
    """`model`: the shapes of the fullest tensor rank, with all that is done to it before FSDP shards it.
    `layers`: what `of_layers` says of it."""
    c = model.config
    width = batch.dtype.itemsize
    stream = largest_share(batch.tokens, scheme.mesh.tensor) * c.hidden_size * width
    backward = batch.tokens * (3 * c.intermediate_size + 2 * c.hidden_size) * width  # what flows back through an MLP
    last = norm_bytes(batch.tokens, c.hidden_size, batch) + 2 * batch.tokens * c.hidden_size * width
    if scheme.activation_checkpointing == "none":
        return Activations(sum(kept for kept, _ in layers), backward, last)
    again = max((kept for kept, _ in layers), default=0)
    kept = len(layers) * stream
    if scheme.activation_checkpointing == "selective":
        kept += sum(products for _, products in layers)
    return Activations(kept, again + backward, last)


def of_layers(model: Llama, tensor_ranks: int, batch: Batch) -> list[tuple[int, int]]:
    """For each layer that a gradient reaches: bytes that autograd keeps, and bytes of the outputs of its matrix
    products and attention. Layers in which the same is trained are counted once."""
    norm_rows = largest_share(batch.tokens, tensor_ranks)  # the stream between layers is split over tensor ranks
    counted: dict[tuple[bool, ...], tuple[int, int]] = {}
    found = []
    for layer in model.layers[lowest_trained_layer(model) :]:
        trained = tuple(parameter.requires_grad for parameter in layer.parameters())
        if trained not in counted:
            counted[trained] = _of_layer(cast(DecoderLayer, layer), batch, norm_rows)
        found.append(counted[trained])
    return found


def norm_bytes(rows: int, width: int, batch: Batch) -> int:
    """What RMSNorm keeps: a GPU's kernel its input and a factor a row; on a CPU PyTorch keeps two fp32 copies."""
    of_row = width * batch.dtype.itemsize if batch.on_gpu else 2 * 4 * width
    return rows * (of_row + 4)


def _of_layer(layer: DecoderLayer, batch: Batch, norm_rows: int) -> tuple[int, int]:
    layer = deepcopy(layer).to(batch.dtype)  # as FSDP gathers it; packed weights stay as they are
    hidden = layer.input_layernorm.weight.numel()
    half = layer.self_attn.head_dim // 2
    x = torch.empty(batch.tokens, hidden, dtype=batch.dtype, device="meta", requires_grad=True)
    table = torch.empty(batch.tokens, 1, half, dtype=batch.dtype, device="meta")
    kept = 2 * norm_bytes(norm_rows, hidden, batch)
    with _Products() as products:
        for part in (lambda: layer.self_attn(x, table, table, _FusedAttention(batch)), lambda: layer.mlp(x)):
            kept += kept_bytes(part, list(layer.parameters()))
    return kept, products.bytes


def kept_bytes(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes of all tensors, each once, that autograd keeps during `forward`; the parameters do not count."""
    weights = {p.untyped_storage()._cdata for p in parameters}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


class _Products(TorchDispatchMode):
    """Adds up the bytes of what matrix products and attention give: selective checkpointing keeps these."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.bytes += out.numel() * out.itemsize
        return out


class _FusedAttention:
    """In place of packed documents: q, k, v and the output are kept, as every fused attention does, and on a GPU the
    logarithm of each row's sum."""

    def __init__(self, batch: Batch):
        self.positions = torch.arange(batch.tokens, device="meta")
        self.on_gpu = batch.on_gpu

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if self.on_gpu and "enable_gqa" not in VARLEN_OPTIONS:  # older kernels read each head's own keys and values
            k = k.repeat_interleave(group, dim=1)
            v = v.repeat_interleave(group, dim=1)
        log_sums = q.new_empty(q.shape[:2] if self.on_gpu else (0,), dtype=torch.float32)
        return _Kept.apply(q, k, v, log_sums)


class _Kept(torch.autograd.Function):
    """Keeps its inputs and its output."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out
