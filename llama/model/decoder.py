"""The decoder: embed, a stack of layers that each add to one residual stream, normalise, project to the vocabulary.

The model reads one flat stream of tokens. Several documents may lie in it end to end, or one new token of each of
many sequences: positions and context say which, and no weight here needs to know.
"""

from torch import Tensor, nn

from llama.model.attention import Attention, AttentionContext
from llama.model.config import ModelConfig
from llama.model.embedding import Embedding
from llama.model.loss import summed_cross_entropy
from llama.model.mlp import MLP
from llama.model.norm import RMSNorm
from llama.model.rope import rope_table


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm layer of Llama."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama for causal language modelling (Touvron et al. 2023, https://arxiv.org/abs/2302.13971).

    Build it under `torch.device("meta")` and fill it with `llama.storage.pretrained.load`, or call `initialize`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: AttentionContext,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Predict the token that follows each of `rows`.

        tokens, positions (T) integers; rows (R) indices into T, None for all of them; targets (R) token ids.
        Without targets: logits (R, V). With targets: the sum of their negative log-likelihoods in nats, an fp32
        scalar, 0 when R = 0. The vocabulary is only ever computed for `rows`, in pieces when there is a target.
        """
        x = self.embed_tokens(tokens)
        # Angles are exact in fp32; only their sines may be rounded, so that q and k stay in their own dtype.
        cos, sin = (table.to(x.dtype) for table in rope_table(self.config, positions))
        for layer in self.layers:
            x = layer(x, cos, sin, context)
        if rows is not None:
            x = x[rows]
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x)
        return summed_cross_entropy(x, self.lm_head.weight, targets)
