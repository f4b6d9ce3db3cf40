"""Grouped-query self-attention. A context, given with each call, decides which tokens may see which."""

from typing import Protocol

from torch import Tensor, nn

from llama.model.config import ModelConfig
from llama.model.rope import rotate


class AttentionContext(Protocol):
    """Knows which tokens of the stream belong together: packed documents in training, a KV cache in generation."""

    positions: Tensor  # (T) integers: the place of each token in its own document, counted from 0

    def attend(
        self,
        layer: int,  # index of the decoder layer, for a context that stores something for each
        q: Tensor,  # (T, N, H)
        k: Tensor,  # (T, K, H)
        v: Tensor,  # (T, K, H)
    ) -> Tensor:
        """softmax(q k^T / sqrt(H)) v over the keys that each query may see. Query head n reads key/value head n // G.

        Returns (T, N, H).
        """


class Attention(nn.Module):
    r"""N query heads share K key/value heads, G = N/K to each. G = 1 is multi-head, K = 1 multi-query attention.

        q heads   0 1 2   3 4 5   6 7 8        N = 9
                   \|/     \|/     \|/
        k, v        0       1       2          K = 3, G = 3

    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        D = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, D, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        """x (T, D); cos, sin (T, 1, H/2) in the dtype of x. Returns (T, D)."""
        heads = (-1, self.head_dim)  # -1, not N: if a caller shards q_proj by heads, this rank has fewer than N
        q = self.q_proj(x).unflatten(-1, heads)
        k = self.k_proj(x).unflatten(-1, heads)
        v = self.v_proj(x).unflatten(-1, heads)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        y = context.attend(self.layer, q, k, v)
        return self.o_proj(y.flatten(-2))
