"""What the model's tests share: a small Llama's shape by transformers' names, random weights, exact frequencies."""

import math

import torch

from llama.model.config import ModelConfig, RopeScaling

LENGTHS = [5, 1, 40, 17]  # of the documents of a batch
BASE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}


def llama3(factor: float) -> dict:
    """With 64 original positions the six frequencies of BASE are fast, blended and slow ones."""
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64}}


def config_of(raw: dict) -> ModelConfig:
    """Our configuration of the keyword arguments of a LlamaConfig, which gets a copy: it writes into rope_scaling."""
    return ModelConfig(**raw | {"rope_scaling": RopeScaling(**raw.get("rope_scaling", {}))})


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near 1, norms and biases that are not trivial: all terms count in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim == 2:
                values /= p.shape[1] ** (0.0 if "embed" in name and not model.config.tie_word_embeddings else 0.5)
            p.copy_(1 + values / 4 if name.endswith("norm.weight") else values)


def random_tokens(vocab_size: int, lengths: list[int] = LENGTHS, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def exact_rope_table(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rope_table in float64 for llama3 scaling or none."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    s = config.rope_scaling
    if s.rope_type == "llama3":
        turns = s.original_max_position_embeddings * frequencies / (2 * math.pi)
        slow = ((s.high_freq_factor - turns) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequencies = frequencies * (1 - slow + slow / s.factor)
    angles = positions.double()[:, None, None] * frequencies
    return angles.cos(), angles.sin()
