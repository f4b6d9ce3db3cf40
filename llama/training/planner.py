"""Every way to spread one training job over some GPUs: what it holds, what it sends, how long a step takes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from llama.boundary.choices import CHECKPOINTINGS, SHARDINGS
from llama.boundary.errors import UserError
from llama.boundary.launch import launch
from llama.model import Llama, ModelConfig
from llama.parallel.distribute import keep_frozen_in, on_meta
from llama.parallel.mesh import mesh_shape
from llama.parallel.processes import Process, compute_dtype
from llama.parallel.scheme import Scheme, fullest_tensor_rank
from llama.parallel.shards import largest_share
from llama.parallel.tensor import unit_counts
from llama.parallel.traffic import messages
from llama.training.activations import Batch, activations
from llama.training.forecast import Rates, seconds_of_step
from llama.training.memory import Shapes, States, peak, states
from llama.training.planner_settings import PlannerSettings
from llama.training.settings import FilledSettings


@dataclass(frozen=True)
class Job:
    """What is to be trained, and how much of it in one step."""

    config: ModelConfig
    change: Callable[[Llama], object]  # what is done to the model before it is sharded
    optimizer: str
    batch: Batch
    step_tokens: int
    document: int  # tokens of one text
    defer_gradient_sync: bool = False


@dataclass(frozen=True)
class Row:
    """What one scheme holds, sends and takes, on the fullest rank."""

    scheme: Scheme
    held: States
    activations: float  # bytes that the backward needs
    peak: float  # bytes at the fullest point of a step: states, activations, gathered weights, logits
    sent: float  # bytes in one step
    seconds: float  # of one step
    tokens_per_second: float  # on all GPUs

    @property
    def flags(self) -> str:
        """Those of fsdp_train.py that make this setting."""
        words = [f"--sharding {self.scheme.sharding}"]
        if self.scheme.mesh.tensor > 1:
            words.append(f"--tensor_parallel {self.scheme.mesh.tensor}")
        if self.scheme.activation_checkpointing != "none":
            words.append(f"--activation_checkpointing {self.scheme.activation_checkpointing}")
        if self.scheme.micro_batches > 1:
            words.append(f"--gradient_accumulation_steps {self.scheme.micro_batches}")
        if self.scheme.defer_gradient_sync:
            words.append("--defer_gradient_sync")
        return " ".join(words)


class Planner:
    """`row` of each scheme. The shapes of a tensor rank are built once for each tensor-parallel degree."""

    def __init__(self, job: Job, rates: Rates):
        self.job = job
        self.rates = rates
        self.whole = self._changed(job.config)
        self._shapes: dict[int, Shapes] = {}

    def _changed(self, config: ModelConfig) -> Llama:
        """On the meta device, with adapters and frozen parts, frozen weights in the compute dtype."""
        model = on_meta(config)
        self.job.change(model)
        keep_frozen_in(self.job.batch.dtype, model)
        return model

    def shapes(self, tensor_ranks: int) -> Shapes:
        """What the fullest tensor rank computes. Raises UserError for a model that so many ranks cannot share."""
        if tensor_ranks not in self._shapes:
            model = self.whole
            if tensor_ranks > 1:
                counts = unit_counts(self.whole, tensor_ranks)
                feature_unit = self.job.config.intermediate_size // counts["features"]
                model = self._changed(fullest_tensor_rank(self.job.config, tensor_ranks, feature_unit))
            self._shapes[tensor_ranks] = Shapes(model, self.job.optimizer, tensor_ranks, self.job.batch)
        return self._shapes[tensor_ranks]

    def rows(self, asked: Iterable[Scheme]) -> list[Row]:
        """The fastest first. Raises UserError where none is possible."""
        found, refused = [], UserError("no setting is left")
        for scheme in asked:
            try:
                found.append(self.row(scheme))
            except UserError as error:
                refused = error
        if not found:
            raise refused
        return sorted(found, key=lambda row: (row.seconds, row.peak))

    def row(self, scheme: Scheme) -> Row:
        """Raises UserError for a model that so many tensor ranks cannot share."""
        job = self.job
        batch = job.batch
        shapes = self.shapes(scheme.mesh.tensor)
        micro_batches = largest_share(job.step_tokens, batch.tokens * scheme.mesh.data_ranks)
        scheme = replace(scheme, micro_batches=micro_batches, defer_gradient_sync=job.defer_gradient_sync)
        held = states(shapes, scheme)
        needed = activations(shapes.model, scheme, batch, shapes.layers)
        sent = messages(shapes.model, scheme, batch.tokens, batch.dtype)
        seconds = seconds_of_step(shapes, scheme, sent, self.rates, job.document)
        return Row(
            scheme,
            held,
            needed.kept + needed.inside,
            peak(shapes, scheme, held, needed),
            sum(message.sent for message in sent),
            seconds,
            micro_batches * scheme.mesh.data_ranks * batch.tokens / seconds,
        )


def schemes(gpus: int, node_gpus: int) -> Iterator[Scheme]:
    """All that so many GPUs can be arranged in. Where all have the same data, every sharding is the same."""
    own_node = min(gpus, node_gpus)
    for tensor_parallel in divisors(own_node):
        for sharding in SHARDINGS if gpus > tensor_parallel else ("full",):
            with suppress(UserError):  # mesh_shape refuses hybrid on one node
                mesh = mesh_shape(sharding, tensor_parallel, gpus, own_node)
                yield from (Scheme(sharding, mesh, checkpointing) for checkpointing in CHECKPOINTINGS)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def refuse_what_cannot_fit(
    settings: FilledSettings,
    config: ModelConfig,
    change: Callable[[Llama], object],
    process: Process,
    memory: int | None = None,
) -> None:
    """Raises UserError where a rank's states alone take more than its GPU's memory. They are certain: its slices of
    weights, gradients and moments, counted on the meta device. Activations depend on the data and are not counted.

    `memory`: bytes of the GPU; None: as CUDA says. On a CPU, and with --cpu_offload, nothing is refused.
    """
    if memory is None and process.device.type == "cuda" and not settings.cpu_offload:
        memory = torch.cuda.mem_get_info(process.device)[1]
    if memory is None:
        return
    gpus, own_node = process.world_size, launch().local_world_size
    dtype = compute_dtype(settings.dtype, process.device)
    tokens = settings.batch_tokens or settings.batch_size * settings.max_length
    step_tokens = tokens * process.data_ranks * settings.gradient_accumulation_steps
    job = Job(config, change, settings.optimizer, Batch(tokens, dtype), step_tokens, settings.max_length)
    hardware = PlannerSettings(model=settings.model, gpus=own_node, node_gpus=own_node)
    planner = Planner(job, Rates.of(hardware))
    mesh = mesh_shape(settings.sharding, settings.tensor_parallel, gpus, own_node)
    held = states(planner.shapes(mesh.tensor), Scheme(settings.sharding, mesh))
    if held.total <= memory:
        return
    rows = planner.rows(schemes(gpus, own_node))
    expected = next((row.flags for row in rows if row.peak <= memory * (1 - hardware.reserve)), None)
    way_out = f"expected {expected}" if expected else "no other sharding fits; python planner.py shows what would"
    raise UserError(
        f"--model {settings.model}: on each rank weights ({held.weights / 1e9:.1f} GB), gradients "
        f"({held.gradients / 1e9:.1f}) and moments ({held.moments / 1e9:.1f}) alone take {held.total / 1e9:.1f} GB, "
        f"and this GPU has {memory / 1e9:.1f}; {way_out}"
    )
