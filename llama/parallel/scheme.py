"""How one job is spread over ranks, and how wide the model of the fullest tensor rank is. Pure arithmetic."""

from dataclasses import dataclass, replace

from llama.model import ModelConfig
from llama.parallel.mesh import MeshShape
from llama.parallel.shards import largest_share


@dataclass(frozen=True)
class Scheme:
    """One way to train: how the ranks share the work, and what a step repeats.

    `micro_batches`: of each rank in one optimizer step.
    """

    sharding: str
    mesh: MeshShape
    activation_checkpointing: str = "none"
    micro_batches: int = 1
    defer_gradient_sync: bool = False

    @property
    def world_size(self) -> int:
        return self.mesh.data_ranks * self.mesh.tensor

    @property
    def resharded(self) -> bool:
        """Whether a layer's gathered weights are freed after its forward, and gathered again for its backward."""
        return self.sharding != "grad"


def fullest_tensor_rank(config: ModelConfig, ranks: int, feature_unit: int = 1) -> ModelConfig:
    """The narrower Llama that the fullest of `ranks` tensor-parallel ranks computes.

    Attention is cut by whole key/value heads, each with its query heads; the MLP by features, in units of
    `feature_unit` (64 where nf4 packs 64 columns together); embedding and lm_head by rows of the vocabulary. The
    residual stream keeps its width.
    """
    group = config.num_attention_heads // config.num_key_value_heads
    key_value_heads = largest_share(config.num_key_value_heads, ranks)
    units = largest_share(config.intermediate_size, feature_unit)
    return replace(
        config,
        num_attention_heads=group * key_value_heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=min(config.intermediate_size, largest_share(units, ranks) * feature_unit),
        vocab_size=largest_share(config.vocab_size, ranks),
    )
