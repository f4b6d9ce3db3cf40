"""Where and when the gradients of the ranks are added up. A weight can have a gradient on several ranks:

    over        each rank has the term of        added up                               by
    shard       its own examples                 after every micro-batch, or the last   FSDP (reduce-scatter)
    replicate   its own examples                 after the last micro-batch             FSDP (all-reduce)
    tensor      its own tokens, heads, features  after the last micro-batch             sum_over_tensor_ranks

The third is for weights that every rank of a tensor group has whole. Of a weight that is cut, each rank's rows or
columns have their gradient on that rank alone.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from llama.parallel.processes import Process
from llama.parallel.shards import local_slice, tensor_cut


def set_gradient_sync(model: nn.Module, is_last: bool, defer: bool) -> None:
    """Say what FSDP does with the gradients of the next backward. `is_last`: it is that of a step's last micro-batch.

    Over "shard" they are added up after every micro-batch, so that a rank keeps only its slice of them. With `defer`
    they are added up once, after the last one, and until then every rank keeps whole gradients. Over "replicate" they
    are added up once in any case: waiting costs no memory there, because these ranks keep the same slice.
    """
    if isinstance(model, FSDPModule):  # a model that was not sharded is that of one process
        model.set_requires_gradient_sync(is_last or not defer)
        model.set_requires_all_reduce(is_last)


@torch.no_grad()
def sum_over_tensor_ranks(model: nn.Module, process: Process) -> None:
    """Add up the gradients of the parameters that are whole on every rank of the tensor group: norms, some biases and
    halves of adapters. One message for all of them. Collective, after the last backward of a step."""
    gradients = []
    for parameter in model.parameters():
        cut = tensor_cut(parameter)
        if parameter.grad is not None and cut and cut.dim is None:
            gradients.append(local_slice(parameter.grad)[0])
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together, group=process.mesh["tensor"].get_group())
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, total in zip(gradients, together.split(sizes), strict=True):
        gradient.copy_(total.view_as(gradient))
