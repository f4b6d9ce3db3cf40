"""A Llama laid out for generation: it computes what llama/model computes, in fewer and larger products.

A step of generation is short: one token of each text goes through all layers. Most of its time goes into reading the
weights, and a good part of the rest into the calls of PyTorch. So here q, k and v are one product, gate and up are
another, q and k are rotated together, and each matrix lies in memory as `layouts` chooses. The same code reads prompts.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from llama.boundary.command_line import announce
from llama.generation.captured import CapturedSteps
from llama.generation.kv_cache import KVCache
from llama.generation.layouts import FAST_DTYPES, Layout, Rows, choose
from llama.model import Llama
from llama.model.attention import Attention, AttentionContext
from llama.model.decoder import DecoderLayer
from llama.model.embedding import Embedding
from llama.model.mlp import MLP
from llama.model.norm import RMSNorm
from llama.model.rope import rope_table

PARTS = {Llama, nn.ModuleList, DecoderLayer, Attention, MLP, RMSNorm, Embedding, nn.Linear}


def lay_out(model: Llama, rows: int) -> Llama:
    """The fastest model for steps of about `rows` tokens: a FlatLlama, which takes the weights out of `model`.

    A model with other parts (adapters, quantised linears, FSDP's shards) is returned as it is.
    """
    if not all(type(module) in PARTS for module in model.modules()):
        return model
    flat = FlatLlama(model, rows)
    weight = flat.norm.weight
    could_be_fast = weight.device.type == "cpu" and weight.dtype in FAST_DTYPES
    if could_be_fast and isinstance(flat.head, Rows):
        lacking = "this PyTorch has no kernels for this processor that read weights in the order of a step"
        announce([f"{lacking}: each token may take twice as long as elsewhere"])
    return flat


class FlatLlama(Llama):
    """`model` for steps of about `rows` tokens. It takes the weights, so `model` is empty afterwards."""

    def __init__(self, model: Llama, rows: int):
        nn.Module.__init__(self)  # not Llama's, which would make weights
        self.config = model.config
        self.rows = rows
        self.shared: dict = {}  # what layouts of the same shape have in common
        self.norm = model.norm  # its device is that of the model
        self.last_norm = Norm(model.norm)
        self.flat_layers = [FlatLayer(layer, self.laid_out) for layer in model.layers]  # type: ignore[arg-type]
        self.head = self.laid_out(model.lm_head)
        self.embedding: Layout = Rows(model.embed_tokens.weight.detach(), None, self.shared)
        if model.config.tie_word_embeddings and self.head.has_rows:
            self.embedding = self.head
        self.captured = CapturedSteps(self.compute)
        del model.layers, model.norm, model.lm_head, model.embed_tokens

    def laid_out(self, *linears: nn.Linear) -> Layout:
        """The weights of `linears` below each other, as one matrix. The linears lose theirs."""
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = torch.cat(biases) if biases else None
        for linear in linears:
            del linear.weight
        layout = choose(weight, self.rows)
        return layout(weight, bias, self.shared)

    def forward(self, *_):
        raise TypeError("a model that was laid out for generation has no loss; expected `logits` to be called")

    @torch.no_grad()
    def logits(self, tokens: Tensor, context: AttentionContext, rows: Tensor | None = None) -> Tensor:
        """Scores of the next token behind the `rows` (R) of a stream: (R, V). Without `rows`, behind each: (T, V)."""
        if not isinstance(context, KVCache):
            return self.compute(tokens, context, rows)
        if tokens.is_cuda:
            return self.captured(tokens, context)
        with torch.inference_mode():  # faster: PyTorch does not track views and changes in place
            x = self.hidden(tokens, context)
        y = self.last_norm(x)
        return self.head(y)

    def compute(self, tokens: Tensor, context: AttentionContext, rows: Tensor | None = None) -> Tensor:
        """`logits` in any mode, and without a graph."""
        x = self.hidden(tokens, context)
        if rows is not None:
            x = x[rows]
        y = self.last_norm(x)
        return self.head(y)

    def hidden(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """The residual stream (T, D) behind the last layer."""
        x = self.embedding.rows(tokens)
        cos, sin = rope_table(self.config, context.positions)
        cos = torch.cat((cos, cos), dim=-1).to(x.dtype)  # (T, 1, H): once for each half of the pairs
        sin = sin.to(x.dtype)  # (T, 1, H/2)
        for index, layer in enumerate(self.flat_layers):
            layer(x, cos, sin, context, index)
        return x


class Norm:
    """RMSNorm. On a CPU PyTorch computes it in eight operations; here it takes four, all in fp32 at least:

    y = (w sqrt(D)) x / sqrt(|x|^2 + D eps)
    """

    def __init__(self, norm: RMSNorm):
        self.norm = norm
        D = len(norm.weight)
        dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        weight = norm.weight.detach().to(dtype)
        self.scale = weight * D**0.5
        floor = (D * norm.eps) ** 0.5
        self.floor = self.scale.new_tensor(floor)

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one kernel
            return self.norm(x)
        length = torch.linalg.vector_norm(x, 2, -1, keepdim=True, dtype=self.scale.dtype)
        divisor = torch.hypot(length, self.floor)
        y = x * self.scale
        return y.div_(divisor).to(x.dtype)


class FlatLayer:
    """A decoder layer of four products."""

    def __init__(self, layer: DecoderLayer, laid_out):
        attention = layer.self_attn
        mlp = layer.mlp
        self.head_dim = attention.head_dim
        self.queries = attention.q_proj.out_features // self.head_dim
        self.keys = attention.k_proj.out_features // self.head_dim
        self.input_norm = Norm(layer.input_layernorm)
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.qkv = laid_out(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = laid_out(attention.o_proj)
        self.gate_up = laid_out(mlp.gate_proj, mlp.up_proj)
        self.down = laid_out(mlp.down_proj)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext, index: int) -> None:
        """Add to the residual stream x (T, D), in place."""
        N = self.queries
        K = self.keys
        qkv = self.qkv(self.input_norm(x))
        qkv = qkv.view(-1, N + 2 * K, self.head_dim)
        qk = rotate(qkv[:, : N + K], cos, sin)
        q = qk[:, :N]
        k = qk[:, N:]
        v = qkv[:, N + K :]
        y = context.attend(index, q, k, v)
        x += self.o(y.flatten(1))
        gate_up = self.gate_up(self.mlp_norm(x))
        gate, up = gate_up.chunk(2, dim=-1)
        x += self.down(silu(gate).mul_(up))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate` of llama/model/rope.py, in fewer operations. x (T, heads, H), cos (T, 1, H), sin (T, 1, H/2)."""
    first, second = x.chunk(2, dim=-1)
    y = x * cos
    y_first, y_second = y.chunk(2, dim=-1)
    y_first.addcmul_(second, sin, value=-1)
    y_second.addcmul_(first, sin)
    return y
