"""Grouped-query self-attention. What may look at what is decided by the context the model is called with."""

from typing import Protocol

from torch import Tensor, nn

from llama.model.config import ModelConfig
from llama.model.rope import rotate


class AttentionContext(Protocol):
    """Says which tokens of the stream belong together: packed documents when training, a KV cache when decoding."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(H)) v over the keys each query may see.

        `layer` numbers the decoder layers, for a context that keeps something for each. q (T, N, H); k and v
        (T, K, H), where query head n reads key/value head n * K // N. Returns (T, N, H).
        """


class Attention(nn.Module):
    """N query heads share K key/value heads: N / K = 1 is multi-head, K = 1 multi-query attention.

        q heads   0 1 2   3 4 5   6 7 8        N = 9
                   \\|/     \\|/     \\|/
        k, v        0       1       2          K = 3

    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        D, bias = config.hidden_size, config.attention_bias
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, q_size, bias=bias)
        self.k_proj = nn.Linear(D, kv_size, bias=bias)
        self.v_proj = nn.Linear(D, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, D, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        # (T, heads * H) -> (T, heads, H); -1 because a tensor-parallel rank owns only some of the heads
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = context.attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(y.flatten(-2))
