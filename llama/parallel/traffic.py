"""What a rank sends in one optimizer step, by formula. benchmarks/scaling.py holds these against counted bytes.

With n ranks and the ring algorithms, a rank sends (n - 1) / n of what an all-gather or a reduce-scatter moves, and
twice that for an all-reduce, which is one of each. So with Psi weights and a large n:

    ZeRO paper (https://arxiv.org/abs/1910.02054, section 7)      none, zero1, grad: 2 Psi      full: 3 Psi
    here, in bytes: gathered in bf16, reduced in fp32             none (4 + 4) Psi, grad (2 + 4) Psi,
                                                                  full (2 + 2 + 4) Psi

zero1 here all-reduces and then gathers the updated weights: (4 + 4 + 4) Psi, because its gradients stay whole.

Tensor parallelism (https://arxiv.org/abs/1909.08053, with the stream split by tokens as in
https://arxiv.org/abs/2205.05198) moves the residual stream of each layer 4 times by all-gather and 4 times by
reduce-scatter: before and after attention and MLP, in the forward and in the backward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llama.model import Llama
from llama.parallel.scheme import Scheme
from llama.parallel.shards import largest_share
from llama.parallel.tensor import WHOLE, dimension_of_cut

ONE_NUMBER = 8  # bytes of an fp64 sum


@dataclass(frozen=True)
class Message:
    """A collective that every rank enters `times` times a step, in groups of `ranks` along one mesh dimension.

    `payload`: bytes of the whole that is gathered, reduced and scattered, or reduced, each time.
    """

    kind: str  # all_gather, reduce_scatter or all_reduce
    over: str  # replicate, shard, tensor or world
    ranks: int
    payload: float
    times: float
    what: str

    @property
    def moved(self) -> float:
        return self.payload * self.times

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in a step, by a ring."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * self.moved * (self.ranks - 1) / self.ranks


def units_of(model: Llama) -> list[list[nn.Parameter]]:
    """The parameters that FSDP gathers together: embedding, last norm and lm_head, and then each layer's."""
    root = [p for name, p in model.named_parameters() if not name.startswith("layers.")]
    return [root, *(list(layer.parameters()) for layer in model.layers)]


def padded(parameter: torch.Tensor, ranks: int) -> int:
    """Numbers of a parameter once its rows are filled up to equal shares for all ranks."""
    rows = parameter.shape[0]
    return parameter.numel() // rows * largest_share(rows, ranks) * ranks


def gathered_bytes(unit: Sequence[torch.Tensor], ranks: int, dtype: torch.dtype) -> int:
    """Of a whole unit. Weights are gathered in the compute dtype, packed ones as their bytes."""
    return sum(padded(p, ranks) * (dtype if p.is_floating_point() else p.dtype).itemsize for p in unit)


def messages(model: Llama, scheme: Scheme, tokens: int, dtype: torch.dtype, rows: int | None = None) -> list[Message]:
    """All that a rank sends in one step. `model`: the shapes of the fullest tensor rank, its frozen parts frozen.
    `tokens`: of a micro-batch. `rows`: how many of them have a label; None: all."""
    found = [*_of_weights(model, scheme, dtype)]
    found.append(Message("all_reduce", "world", scheme.world_size, ONE_NUMBER, 2, "loss and gradient norm"))
    if scheme.sharding == "zero1":
        found += _of_updated_weights(model, scheme)
    if scheme.mesh.tensor > 1:
        found += _of_stream(model, scheme, tokens, dtype)
        found.append(_of_whole_parameters(model, scheme))
        each = 3 * 4 * (tokens if rows is None else rows)  # the largest logit, the sum of exponentials, the target's
        found.append(Message("all_reduce", "tensor", scheme.mesh.tensor, each, scheme.micro_batches, "loss"))
    return [message for message in found if message.ranks > 1 and message.moved]


def _of_weights(model: Llama, scheme: Scheme, dtype: torch.dtype) -> Iterator[Message]:
    """FSDP's: weights gathered before each unit computes, gradients reduced after its backward."""
    lowest = lowest_trained_layer(model)
    replicate, shard, _ = scheme.mesh
    for i, unit in enumerate(units_of(model)):
        what = "layers" if i else "embedding and head"
        trained = [p for p in unit if p.requires_grad]
        # For the backward again: also the layer below the lowest trained one, because FSDP fetches one layer ahead.
        gathers = 2 if scheme.resharded and (i == 0 or i >= lowest) else 1
        payload = gathered_bytes(unit, shard, dtype)
        yield Message("all_gather", "shard", shard, payload, gathers * scheme.micro_batches, f"weights: {what}")
        reduced = 4 * sum(padded(p, shard) for p in trained)
        times = 1 if scheme.defer_gradient_sync else scheme.micro_batches
        yield Message("reduce_scatter", "shard", shard, reduced, times, f"gradients: {what}")
        # Between replicas, each rank's slice of the sum; only after the last micro-batch.
        yield Message("all_reduce", "replicate", replicate, reduced / shard, 1, f"gradients: {what}")



def lowest_trained_layer(model: Llama) -> int:
    """The index of the first layer whose output gets a gradient: autograd computes nothing below it. The number of
    layers where only the norm or lm_head is trained."""
    if model.embed_tokens.weight.requires_grad:
        return 0
    trained = [i for i, layer in enumerate(model.layers) if is_trained(layer)]
    return min(trained, default=len(model.layers))


def _of_updated_weights(model: Llama, scheme: Scheme) -> Iterator[Message]:
    """ZeRO-1's: each rank sends the rows that it has updated."""
    ranks = scheme.mesh.replicate
    for i, unit in enumerate(units_of(model)):
        what = "layers" if i else "embedding and head"
        updated = 4 * sum(padded(p, ranks) for p in unit if p.requires_grad)
        yield Message("all_gather", "replicate", ranks, updated, 1, f"updated weights: {what}")


def _of_whole_parameters(model: Llama, scheme: Scheme) -> Message:
    """Tensor parallelism's: gradients of the parameters that it does not cut (`sum_over_tensor_ranks`)."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = [p for name, p in trained.items() if dimension_of_cut(name) is WHOLE]
    held = 4 * sum(padded(p, scheme.mesh.shard) for p in whole) / scheme.mesh.shard
    return Message("all_reduce", "tensor", scheme.mesh.tensor, held, 1, "gradients of what every tensor rank has whole")


def _of_stream(model: Llama, scheme: Scheme, tokens: int, dtype: torch.dtype) -> Iterator[Message]:
    """Tensor parallelism's: the residual stream is gathered before attention and MLP, and scattered after them.

    The backward of a gather is a reduce-scatter and the reverse. Autograd leaves out what leads to no trained weight.
    """
    per_rank = largest_share(tokens, scheme.mesh.tensor)
    stream = per_rank * scheme.mesh.tensor * model.config.hidden_size * dtype.itemsize
    recomputes = scheme.activation_checkpointing == "full"
    # The embedding's parts are added up and scattered; the last layer's output is gathered.
    gathers = scatters = 1
    flows = is_trained(model.embed_tokens)  # whether a gradient must get down to here
    gathers += flows
    for layer in model.layers:
        for norm, part in (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")):
            into = flows or is_trained(layer.get_submodule(norm))
            flows = into or is_trained(layer.get_submodule(part))
            gathers += 1 + flows
            scatters += 1 + into
        if recomputes and flows:  # all but the scattering after the MLP, whose result no backward needs
            gathers += 2
            scatters += 1
    scatters += flows
    for kind, times in (("all_gather", gathers), ("reduce_scatter", scatters)):
        yield Message(kind, "tensor", scheme.mesh.tensor, stream, times * scheme.micro_batches, "stream")


def is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
