"""ZeRO-1: every rank has the whole weights and gradients, but only its share of the optimizer's state.

AdamW keeps two moments for each weight, twice as many numbers as the model has. Over R ranks of the mesh's "replicate":

    gradients    summed over all ranks (by FSDP), so they are the same everywhere
    update       rank r updates the r-th of R blocks of rows of every weight, and has the moments of these rows only
    weights      the updated rows are gathered from all ranks, one layer at a time

A rank sends half as much again as without: the all-reduce of gradients (twice their size) is followed by an all-gather
of the weights (once). In the paper a rank gets only its own rows of the summed gradients, so it sends no more than
without. Here FSDP leaves the gradients whole.
Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from llama.model import Llama
from llama.parallel.collectives import all_gather_tensor
from llama.parallel.processes import Process
from llama.parallel.shards import cut_as, largest_share, local_slice


class ZeRO1:
    """An optimizer that updates this rank's rows of the weights, and gets the others from the ranks that update those.

    inner: the optimizer of the rows, such as AdamW
    rows:  {parameter: this rank's rows of it}, DTensors over "replicate" that share the parameter's memory
    """

    def __init__(self, inner: torch.optim.Optimizer, model: Llama, process: Process):
        """`inner` was just made for the parameters of `model`, and has no state yet."""
        self.inner = inner
        self.mesh = process.mesh["replicate"]
        self.rows: dict[Tensor, DTensor] = {}
        for group in inner.param_groups:
            for parameter in group["params"]:
                self.rows[parameter] = self._rows_of(parameter)
            group["params"] = [self.rows[parameter] for parameter in group["params"]]
        of_layers = [list(layer.parameters()) for layer in model.layers]
        in_layers = {parameter for parameters in of_layers for parameter in parameters}
        others = [parameter for parameter in model.parameters() if parameter not in in_layers]
        self.gathered_together = [[p for p in parameters if p in self.rows] for parameters in [*of_layers, others]]

    @property
    def param_groups(self) -> list[dict]:
        return self.inner.param_groups

    def _rows_of(self, tensor: Tensor) -> DTensor:
        """This rank's rows of a parameter or gradient. The last ranks can have fewer rows than the first, or none."""
        held, _ = local_slice(tensor)
        count = largest_share(len(held), self.mesh.size())
        first = self.mesh.get_local_rank() * count
        rows = DTensor.from_local(
            held[first : first + count], self.mesh, [Shard(0)], run_check=False, shape=held.shape, stride=held.stride()
        )
        cut_as(rows, tensor)
        return rows

    def step(self) -> None:
        for parameter, rows in self.rows.items():
            rows.grad = None if parameter.grad is None else self._rows_of(parameter.grad)
        self.inner.step()
        self.gather_updated_rows()

    def zero_grad(self) -> None:
        for parameter, rows in self.rows.items():
            parameter.grad = rows.grad = None

    @torch.no_grad()
    def gather_updated_rows(self) -> None:
        """Replace each row of the weights by that of the rank which updates it. Collective."""
        if self.mesh.size() > 1:
            for parameters in self.gathered_together:
                if parameters:
                    self._gather_updated_rows_of(parameters)

    def _gather_updated_rows_of(self, parameters: list[nn.Parameter]) -> None:
        """One message for these parameters. In it each rank has room for as many rows as the first rank has."""
        ranks = self.mesh.size()
        weights = [local_slice(parameter)[0] for parameter in parameters]
        sizes = [largest_share(len(weight), ranks) * weight[:1].numel() for weight in weights]
        own = weights[0].new_zeros(sum(sizes))
        for parameter, place in zip(parameters, own.split(sizes), strict=True):
            rows = self.rows[parameter].to_local()
            place[: rows.numel()] = rows.flatten()
        of_all = own.new_empty(ranks * len(own))
        all_gather_tensor(of_all, own, group=self.mesh.get_group())
        for weight, of_weight in zip(weights, of_all.view(ranks, -1).split(sizes, dim=1), strict=True):
            received = of_weight.reshape(-1)[: weight.numel()]
            weight.copy_(received.view_as(weight))
