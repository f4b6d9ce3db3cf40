"""Shard an ordinary model over all ranks with FSDP2. The code in llama/model has no parallelism in it.

The order is fixed: shapes on the meta device -> quantised linears, adapters -> frozen weights to `dtype` -> what other
tensor ranks compute is cut away (tensor.py) -> compile each layer -> checkpoint its activations -> shard each layer,
then the rest -> allocate the shards -> load the weights. The same code runs on any number of ranks, also on one.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from llama.model import Llama, ModelConfig
from llama.parallel import tensor
from llama.parallel.processes import Process
from llama.parallel.recompute import recompute_activations


def on_meta(config: ModelConfig) -> Llama:
    """The model as shapes without memory: building a 70B model takes milliseconds, and no rank holds all of it."""
    with torch.device("meta"):
        return Llama(config)


def distribute(
    model: Llama,
    process: Process,
    dtype: torch.dtype,
    sharding: str = "full",
    activation_checkpointing: str = "none",
    compile: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Shard a model on the meta device over all ranks and give it memory, in place. Its weights are not filled yet.

    Each rank stores its slice of trained weights and gradients in fp32; a layer is gathered and computed in `dtype`.
    Trained weights are not stored in bf16, because most updates are too small to change a bf16 number. Frozen weights
    get no updates: they are stored in `dtype`. With cpu_offload, slices and optimizer state are in the host's memory.
    """
    keep_frozen_in(dtype, model)
    tensor.cut(model, process)
    for layer in model.layers:
        if compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        recompute_activations(layer, activation_checkpointing)
    shard(model, process.mesh, dtype, sharding, cpu_offload)
    model.to_empty(device="cpu" if cpu_offload else process.device)
    tensor.mark(model)


def keep_frozen_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Frozen weights get no updates that a narrow dtype could lose."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def shard(model: Llama, mesh: DeviceMesh, dtype: torch.dtype, sharding: str, cpu_offload: bool = False) -> None:
    """FSDP2: each rank keeps a slice of every weight, and a layer is whole only while it computes.

    Before a layer's forward its slices are gathered over the mesh's "shard". In the backward its gradients are averaged
    over "shard" and "replicate", and each rank keeps its slice of them. Gathered weights are freed after the forward
    and gathered again (ZeRO-3), or with "grad" stay until the backward (ZeRO-2): more memory, fewer messages. Where
    "shard" is 1 (zero1, none), a slice is the whole weight. Zhao et al. 2023, https://arxiv.org/abs/2304.11277
    """
    replicate_ranks, shard_ranks, _ = mesh.shape
    how: dict = {
        "mesh": mesh["shard"] if replicate_ranks == 1 else mesh["replicate", "shard"],
        "reshard_after_forward": sharding != "grad",
        # Gradients are summed over ranks in fp32: the sum of many bf16 numbers would lose the small ones.
        "mp_policy": MixedPrecisionPolicy(dtype, torch.promote_types(dtype, torch.float32), cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    if shard_ranks == 1 and not cpu_offload:
        # Whole frozen weights are in `dtype` already and have no gradients: FSDP would only copy them twice a step.
        how["ignored_params"] = {p for p in model.parameters() if not p.requires_grad}
    for layer in model.layers:
        fully_shard(layer, **how)
    # Embedding, last norm and lm_head in one unit: a tied weight must be in one unit to stay one weight.
    fully_shard(model, **how)
    # While one unit computes, the next one is gathered already.
    forward, backward = [model, *model.layers], [model, *model.layers[::-1]]
    for unit, following in zip(forward, forward[1:], strict=False):
        unit.set_modules_to_forward_prefetch([following])
    for unit, following in zip(backward, backward[1:], strict=False):
        unit.set_modules_to_backward_prefetch([following])
    # FSDP gathers weights before `forward` only, unless it is told of another method that computes.
    register_fsdp_forward_method(model, "logits")
