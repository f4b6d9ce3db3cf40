"""Activation checkpointing: what the forward does not keep, the backward computes again.

    none       all that the backward reads is kept
    full       only each layer's input is kept (Chen et al. 2016, https://arxiv.org/abs/1604.06174)
    selective  what is dear to compute again is kept, too: products with weights, and attention. Norms, rotations and
               silu(gate) * up are computed again (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198)

The gradients are the same bit for bit: the same operations compute the same numbers again. A part of a layer that
was compiled is one piece here, and is computed again as a whole; attention is not compiled, so it can be kept.
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llama.model.attention import AttentionContext
from llama.model.packed import PackedDocuments, _BlockedAttention

aten = torch.ops.aten


def recompute_activations(layer: nn.Module, kind: str) -> None:
    """Checkpoint the activations of a layer as `kind` says: none, full or selective.

    Replacing `forward` on the instance, instead of wrapping the module, keeps the parameters' names.
    """
    if kind == "full":
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if kind == "selective":
        forward = partial(with_attention_as_one_operation, layer.forward)
        contexts = partial(create_selective_checkpoint_contexts, what_to_keep)
        layer.forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def what_to_keep(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """The policy of `selective`: keep what this operation returns, or compute it again."""
    is_product = operation is aten.mm.default
    # A linear adds its bias, a vector, to the product. A matrix is added only by adapters: that product is cheap, as
    # its inner size is the adapter's rank, and DoRA's is as large as the weight.
    is_product_with_bias = operation is aten.addmm.default and args[0].dim() == 1
    if is_product or is_product_with_bias or operation in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# On a CPU attention is many small operations, of which none can be kept instead of the whole. So it becomes one.


def with_attention_as_one_operation(forward, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
    if isinstance(context, PackedDocuments) and not x.is_cuda:
        context = _OneOperation(context)
    return forward(x, cos, sin, context)


class _OneOperation:
    """An attention context that computes what `documents` computes, in one operation of PyTorch's dispatcher."""

    def __init__(self, documents: PackedDocuments):
        self.documents = documents
        self.positions = documents.positions

    @torch.compiler.disable
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = self.documents.masked_blocks(q.dtype)
        places = [place for block in blocks for place in block[:3]]
        masks = [block[3] for block in blocks]
        return attend_blocks(q, k, v, places, masks)


@torch.library.custom_op("llama::attend_blocks", mutates_args=())
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, places: list[int], masks: list[Tensor]) -> Tensor:
    """PackedDocuments.attend_blocks. `places`: start, end and first key of each block, one after another."""
    keeps_nothing = SimpleNamespace(save_for_backward=lambda *tensors: None)
    return _BlockedAttention.forward(keeps_nothing, q, k, v, _blocks(places, masks))


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    q, k, v, places, masks = inputs
    ctx.save_for_backward(q, k, v)
    ctx.blocks = _blocks(places, masks)


def _backward(ctx, d_out: Tensor) -> tuple:
    d_q, d_k, d_v, _ = _BlockedAttention.backward(ctx, d_out)
    return d_q, d_k, d_v, None, [None] * len(ctx.blocks)


def _blocks(places: list[int], masks: list[Tensor]) -> list[tuple[int, int, int, Tensor]]:
    return [(*places[3 * i : 3 * i + 3], mask) for i, mask in enumerate(masks)]  # type: ignore[misc]


attend_blocks.register_autograd(_backward, setup_context=_keep)

# What attention is called depends on the device and the dtype.
ATTENTION = (
    torch.ops.torch_attn._varlen_attn.default,  # CUDA in half precision
    aten._scaled_dot_product_efficient_attention.default,  # CUDA otherwise
    torch.ops.llama.attend_blocks.default,  # CPU
)
