"""The shape of a Llama: every number that determines its weights and its arithmetic.

The fields have the names that a Hugging Face config.json uses, so nothing is translated between the two. Each number
declares its range here, once; `llama.storage.base` reads the file and refuses a number outside of its range.
"""

from dataclasses import MISSING, dataclass, field
from typing import Any

# The fields each rope_type needs. storage/base.py refuses a file that lacks one: a default would change the model.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

LARGEST_SIZE = 2**24  # far beyond any Llama: a larger number is a mistake or an attack that would use up the memory
LARGEST_DEPTH = 2**10


def number(default: Any = MISSING, **bounds: float) -> Any:
    """A field with a range (as records.setting, which model/ must not import). above, below exclude the bound."""
    return field(default=default, metadata=bounds)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was first trained on.

    `default` leaves them as they are. `linear` divides every frequency by `factor` (Chen et al. 2023,
    https://arxiv.org/abs/2306.15595). `llama3` divides only the slow ones and blends in between (Llama 3.1,
    https://arxiv.org/abs/2407.21783); the last three fields are for `llama3` alone. See `rope.py` for the formulas.
    Raises ValueError for another type, and for llama3 factors in the wrong order.
    """

    rope_type: str = "default"
    factor: float = number(1.0, above=0)
    low_freq_factor: float = number(1.0, above=0)
    high_freq_factor: float = number(4.0, above=0)
    original_max_position_embeddings: int = number(8192, at_least=1, at_most=LARGEST_SIZE)

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {self.rope_type!r:.100}, expected one of {', '.join(ROPE_TYPES)}")
        # With equal factors, the blend between slow and fast frequencies would divide by zero.
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            expected = f"expected less than high_freq_factor, {self.high_freq_factor}"
            raise ValueError(f"low_freq_factor is {self.low_freq_factor}, {expected}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one Llama. Raises ValueError when its numbers contradict each other."""

    vocab_size: int = number(at_least=1, at_most=LARGEST_SIZE)
    hidden_size: int = number(at_least=1, at_most=LARGEST_SIZE)
    intermediate_size: int = number(at_least=1, at_most=LARGEST_SIZE)
    num_hidden_layers: int = number(at_least=1, at_most=LARGEST_DEPTH)
    num_attention_heads: int = number(at_least=1, at_most=LARGEST_SIZE)
    num_key_value_heads: int = number(at_least=1, at_most=LARGEST_SIZE)
    head_dim: int = number(at_least=1, at_most=LARGEST_SIZE)
    max_position_embeddings: int = number(2048, at_least=1, at_most=LARGEST_SIZE)
    rms_norm_eps: float = number(1e-6, above=0)
    rope_theta: float = number(10000.0, above=0)
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False  # one matrix serves as the embedding and as lm_head
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = number(0.02, above=0)  # standard deviation of random weights

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"expected a multiple of num_key_value_heads, {self.num_key_value_heads}"
            raise ValueError(f"num_attention_heads is {self.num_attention_heads}, {expected}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number: RoPE rotates pairs")
