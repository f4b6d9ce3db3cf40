"""When the gradients of several micro-batches are summed over the ranks: as late as memory allows."""

from torch import nn
from torch.distributed.fsdp import FSDPModule


def sum_over_ranks(model: nn.Module, is_last: bool, defer: bool) -> None:
    """Choose what the next backward of a sharded model does with its gradients. `is_last`: of the step.

    Over the mesh's "shard" they are summed after every micro-batch, so that a rank keeps only its slice of them. With
    `defer` they are summed once, after the last, and until then every rank keeps whole gradients. Over "replicate" they
    are summed once in any case: all ranks there keep the same slice.
    """
    if isinstance(model, FSDPModule):  # a plain model is that of one process
        model.set_requires_gradient_sync(is_last or not defer)
        model.set_requires_all_reduce(is_last)
