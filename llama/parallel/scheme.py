"""How one job is spread over ranks, and how large the fullest rank's part of the model is. Pure arithmetic."""

from dataclasses import dataclass, replace

from llama.model import ModelConfig


@dataclass(frozen=True)
class Scheme:
    """One way to train: how the ranks share the work, and what a step repeats.

    `mesh` is (replicate, shard, tensor): how many ranks each dimension has. `resharded`: whether a layer's gathered
    weights are freed after its forward. `micro_batches` are those of each rank in one optimizer step.
    """

    sharding: str
    mesh: tuple[int, int, int]
    activation_checkpointing: str = "none"
    micro_batches: int = 1
    defer_gradient_sync: bool = False

    @property
    def replicate(self) -> int:
        return self.mesh[0]

    @property
    def shard(self) -> int:
        return self.mesh[1]

    @property
    def tensor(self) -> int:
        return self.mesh[2]

    @property
    def data_ranks(self) -> int:
        """In how many shares the data are divided."""
        return self.replicate * self.shard

    @property
    def world_size(self) -> int:
        return self.data_ranks * self.tensor

    @property
    def resharded(self) -> bool:
        return self.sharding in ("full", "hybrid")


def largest_part(units: int, ranks: int) -> int:
    """How many of `units` the fullest of `ranks` holds, where rank r holds r * units // ranks up to the next one's."""
    return -(-units // ranks)


def fullest_tensor_rank(config: ModelConfig, ranks: int, feature_unit: int = 1) -> ModelConfig:
    """The narrower Llama that the fullest of `ranks` tensor-parallel ranks computes.

    Attention is cut by whole key/value heads, each with its query heads; the MLP by features, in units of
    `feature_unit` (64 where nf4 packs 64 columns together); embedding and lm_head by rows of the vocabulary. The
    residual stream keeps its width.
    """
    group = config.num_attention_heads // config.num_key_value_heads
    key_value_heads = largest_part(config.num_key_value_heads, ranks)
    units = largest_part(config.intermediate_size, feature_unit)
    return replace(
        config,
        num_attention_heads=group * key_value_heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=min(config.intermediate_size, largest_part(units, ranks) * feature_unit),
        vocab_size=largest_part(config.vocab_size, ranks),
    )


def mesh_of(sharding: str, tensor_parallel: int, gpus: int, node_gpus: int) -> tuple[int, int, int]:
    data_ranks = gpus // tensor_parallel
    if sharding == "hybrid":
        return -(-gpus // node_gpus), node_gpus // tensor_parallel, tensor_parallel
    if sharding in ("none", "zero1"):
        return data_ranks, 1, tensor_parallel
    return 1, data_ranks, tensor_parallel
