"""How long an optimizer step takes, from stated rates of the chip and the links. A forecast, not a measurement.

    step = max(arithmetic, starting kernels, FSDP's messages) + other messages + the update

FSDP gathers and reduces one layer while another one computes, so the longer of the two counts. Tensor parallelism waits
for each of its messages. docs/measurements.md has the measured steps that the rates come from.
"""

from dataclasses import dataclass

from torch import nn

from llama.model import Llama
from llama.model.quantize import Int8Linear, NF4Linear
from llama.parallel.scheme import Scheme
from llama.parallel.traffic import Message, lowest_trained_layer
from llama.training.activations import Batch
from llama.training.memory import Shapes
from llama.training.planner_settings import PlannerSettings

FORWARD = 2  # operations a weight and token: a product and a sum
# Bytes of memory traffic for each weight that is made whole from few bits. nf4's is from a measured step: 0.27 s for
# three passes over the 7 billion weights of Llama 3 8B.
UNPACKING = {Int8Linear: 7, NF4Linear: 54}
UPDATING = 60  # bytes for each trained number of a rank: its norm in fp64, clipping, AdamW
COPYING = 14  # bytes for each trained weight of a layer: into the compute dtype, and its gradient back to fp32


@dataclass(frozen=True)
class Rates:
    """What the hardware does in a second."""

    operations: float  # of matrix products, as training reaches them
    memory: float  # bytes
    link: float  # bytes that a GPU sends to others of its node
    network: float  # bytes that a GPU sends to other nodes
    layer_starts: float  # seconds in which Python starts all kernels of one layer, forward and backward
    node_gpus: int

    @classmethod
    def of(cls, settings: PlannerSettings) -> "Rates":
        return cls(
            operations=settings.peak * 1e12 * settings.efficiency,
            memory=settings.memory_gb_s * 1e9,
            link=settings.link_gb_s * 1e9,
            network=settings.network_gb_s * 1e9,
            layer_starts=settings.layer_ms / 1e3,
            node_gpus=settings.own_node,
        )

    def of_group(self, over: str, scheme: Scheme) -> float:
        """Bytes a second that each rank of such a group can send, when all groups send at the same time.

        The GPUs of one node that are in the same group send through each other's network cards, too: a ring leaves the
        node once.
        """
        mesh = scheme.mesh
        inside = {"tensor": mesh.tensor, "shard": mesh.tensor * mesh.shard}.get(over, scheme.world_size)
        if inside <= self.node_gpus:
            return self.link
        apart = {"shard": mesh.tensor, "replicate": mesh.tensor * mesh.shard}.get(over, 1)
        neighbours = max(1, self.node_gpus // apart)
        return min(self.link, neighbours * self.network)


def operations(model: Llama, scheme: Scheme, batch: Batch, document: int) -> float:
    """Floating-point operations of one micro-batch on one rank; `document`: tokens in each text of it."""
    c = model.config
    lowest = lowest_trained_layer(model)
    total = 0.0
    for i, layer in enumerate(model.layers):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        weights = sum(linear.in_features * linear.out_features for linear in linears)
        trained = sum(linear.weight.numel() for linear in linears if linear.weight.requires_grad)
        # Each token is multiplied with the keys before it, half a document on average, and so are the values.
        attention = 2 * FORWARD * document / 2 * c.num_attention_heads * c.head_dim
        forward = FORWARD * weights + attention
        total += forward
        if i >= lowest:
            total += FORWARD * (weights + trained) + 2.5 * attention
            total += forward * (scheme.activation_checkpointing == "full")
    head = model.lm_head.weight
    total += FORWARD * head.numel() * (2 + head.requires_grad)
    return total * batch.tokens


def seconds_of_step(shapes: Shapes, scheme: Scheme, messages: list[Message], rates: Rates, document: int) -> float:
    """Of one optimizer step on the fullest rank."""
    model, batch = shapes.model, shapes.batch
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    arithmetic = operations(model, scheme, batch, document) / rates.operations
    arithmetic += (COPYING * numbers + _traffic_of_recomputing(shapes, scheme)) / rates.memory
    starts = len(model.layers) * rates.layer_starts
    hidden = other = 0.0
    for message in messages:
        seconds = message.sent / rates.of_group(message.over, scheme)
        if message.over == "tensor" or message.what.startswith("updated"):
            other += seconds
        else:
            hidden += seconds
    updated = numbers / (scheme.mesh.replicate if scheme.sharding == "zero1" else scheme.mesh.shard)
    in_step = max(scheme.micro_batches * max(arithmetic, starts), hidden)
    return in_step + other + UPDATING * updated / rates.memory


def _traffic_of_recomputing(shapes: Shapes, scheme: Scheme) -> float:
    """Bytes read and written to make packed weights whole, and what selective checkpointing computes again."""
    passes = 2 + (scheme.activation_checkpointing == "full")
    moved = 0.0
    for kind, traffic in UNPACKING.items():
        packed = [module for module in shapes.model.modules() if isinstance(module, kind)]
        moved += passes * traffic * sum(linear.in_features * linear.out_features for linear in packed)
    if scheme.activation_checkpointing == "selective":
        moved += sum(2 * (kept - products) for kept, products in shapes.layers)
    return moved
