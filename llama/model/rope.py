"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864).

Each pair of features of q and k is turned by an angle that grows with the position, so the product of q and k depends
on how far apart the two tokens are. cos and sin are computed from the positions in each forward and are not stored as
buffers, so there is nothing here to load or to shard after the model was built on the meta device (without memory).
"""

import math

import torch
from torch import Tensor

from llama.model.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position for pair i of features: rope_theta^(-2i / H), scaled as the config says. (H/2,) fp32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / float(config.rope_theta) ** exponent  # float: a tensor refuses an int over 2^63
    scaling = config.rope_scaling
    if scaling.rope_type == "linear":
        return frequencies / float(scaling.factor)
    if scaling.rope_type == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep the fast frequencies, divide the slow ones by `factor`, blend linearly in between.

    A pair is fast if it makes more than high_freq_factor turns over the original context length, and slow if it makes
    fewer than low_freq_factor.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = float(scaling.low_freq_factor), float(scaling.high_freq_factor)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / float(scaling.factor)


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, for positions (T). Two tensors (T, 1, H/2), always fp32.

    bf16 has 8 significant bits: position 257 would become 256, and beyond that neighbours would share a position.
    """
    angles = positions.float()[:, None, None] * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + H/2]) by its angle. Hugging Face checkpoints pair the two halves of a head.

    x (T, heads, H) of any dtype; cos, sin (T, 1, H/2) of the same dtype. Returns (T, heads, H).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
