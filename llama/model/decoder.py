"""The decoder: embed the tokens, let each layer add to one residual stream, normalise, project to the vocabulary.

The model reads one flat stream of T tokens, without a batch dimension. The stream may hold several documents end to end
(training), or the newest token of each of many documents (generation): `context` knows where each document is.
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

    Parameters have Hugging Face's names, without the prefix `model.`. Build it under `torch.device("meta")`, where it
    takes no memory, and fill it with `llama.storage.pretrained`: `load_weights` or `initialize_weights`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,  # (T) ids
        context: AttentionContext,
        rows: Tensor,  # (R) indices into the stream
        targets: Tensor,  # (R) the id that follows each row
    ) -> Tensor:
        """The loss: -log p(target | the tokens up to its row), summed over all targets, in nats.

        Returns an fp32 scalar, 0 when R = 0. The caller divides it by the number of targets of the global batch.
        """
        x = self._hidden_states(tokens, context, rows)
        return summed_cross_entropy(x, self.lm_head.weight, targets)

    def logits(self, tokens: Tensor, context: AttentionContext, rows: Tensor | None = None) -> Tensor:
        """Scores (R, V): how likely each id is to follow each row. Without `rows`, all of the stream: (T, V)."""
        return self.lm_head(self._hidden_states(tokens, context, rows))

    def _hidden_states(self, tokens: Tensor, context: AttentionContext, rows: Tensor | None) -> Tensor:
        """What lm_head multiplies: the normalised residual stream (R, D) of the chosen rows."""
        x = self.embed_tokens(tokens)
        cos, sin = rope_table(self.config, context.positions)
        # The angles were computed in fp32. Only now cos and sin are rounded, so that q and k stay in their dtype.
        cos = cos.to(x.dtype)
        sin = sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, context)
        if rows is not None:
            x = x[rows]
        return self.norm(x)
