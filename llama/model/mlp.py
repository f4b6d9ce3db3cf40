"""The gated feed-forward layer."""

from torch import Tensor, nn
from torch.nn.functional import silu

from llama.model.config import ModelConfig


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), D -> F -> D. Shazeer 2020, https://arxiv.org/abs/2002.05202"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.hidden_size
        F = config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, F, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
