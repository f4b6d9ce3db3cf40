"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864), as functions of the positions.

There is no buffer to initialise, to shard or to lose: a model built on the meta device needs nothing here.
"""

import math

import torch
from torch import Tensor

from llama.model.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position for each pair of features: theta^(-2i / H), scaled as the config says. (H/2,) fp32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep the fast frequencies, divide the slow ones by `factor`, blend linearly in between.

    "Fast" and "slow" are told by how many turns a pair makes over the original context length:
    more than high_freq_factor turns is fast, fewer than low_freq_factor is slow.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, for positions (T). Two tensors (T, 1, H/2), always fp32.

    bf16 holds 8 significant bits: position 257 would round to 256, and from there on neighbours become one.
    """
    angles = positions.float()[:, None, None] * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + H/2]) by its angle: the half-split layout of Hugging Face checkpoints.

    x (T, heads, H) of any dtype; cos, sin (T, 1, H/2) of the same dtype. Returns (T, heads, H).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
