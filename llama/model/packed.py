"""Attention over packed documents, so that no document is padded to the length of another.

Documents lie end to end in one stream. Every token sees itself and the earlier tokens of its own document, and nothing
else, so packing changes no logit. Three ways compute the same:

- CUDA in half precision: the variable-length flash kernel (`torch.nn.attention.varlen`).
- CUDA otherwise: one `scaled_dot_product_attention` per block of query rows, with a mask.
- CPU: the same blocks as matrix products. On a processor with bf16 instructions this is 2.5 to 3 times as fast as the
  CPU's own SDPA kernel, whose backward does not use them, and in fp32 1.3 times as fast.
"""

import inspect

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters
QUERY_ROWS = 128  # of a block; with 9 heads and 512 keys their scores are 1.2 MB in bf16, about the cache of one core


class PackedDocuments:
    """The attention context of documents that lie end to end, `lengths` tokens each; the sum of the lengths is T."""

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        self.lengths = lengths
        self.device = torch.device(device)
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        starts = torch.repeat_interleave(ends[:-1], torch.tensor(lengths))  # (T): where each token's document starts
        self.boundaries = ends.to(self.device)  # where each document starts, and where the last one ends
        self.positions = (torch.arange(sum(lengths)) - starts).to(self.device)
        self._blocks_by_dtype: dict[torch.dtype, list] = {}

    @torch.compiler.disable  # the number of documents changes every step; compiled code must not depend on it
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each document. q (T, N, H), k and v (T, K, H) -> (T, N, H)."""
        if not q.is_cuda:
            return self.attend_blocks(q, k, v)
        if q.dtype in (torch.bfloat16, torch.float16):
            return varlen(q, k, v, self.boundaries, max(self.lengths))
        return self.attend_sdpa(q, k, v)

    def attend_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (T, heads, H) -> (1, heads, T, H)
        outputs = []
        for start, end, first, mask in self.masked_blocks(q.dtype):
            queries = q[:, :, start:end]
            keys = k[:, :, first:end]
            values = v[:, :, first:end]
            outputs.append(scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True))
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    def attend_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _BlockedAttention.apply(q, k, v, self.masked_blocks(q.dtype))

    def masked_blocks(self, dtype: torch.dtype) -> list[tuple[int, int, int, Tensor]]:
        """The stream in blocks: (start, end, first key, mask). The rows start:end see the S keys first:end.

        Later keys are never touched, which saves nearly half of the work of a long document. The mask (rows, S) is 0
        where a row may see a key and -inf where not. It is made once for all layers, forward and backward.
        """
        if dtype not in self._blocks_by_dtype:
            document = torch.repeat_interleave(torch.tensor(self.lengths)).to(self.device)  # (T): 0, 0, 1, 2, 2, ...
            token = torch.arange(len(document), device=self.device)
            blocks = []
            for start, end, first in _cut(self.lengths):
                forbidden = document[start:end, None] != document[first:end]  # (rows, S)
                forbidden |= token[start:end, None] < token[first:end]
                mask = torch.zeros(forbidden.shape, dtype=dtype, device=self.device)
                mask.masked_fill_(forbidden, -torch.inf)
                blocks.append((start, end, first, mask))
            self._blocks_by_dtype[dtype] = blocks
        return self._blocks_by_dtype[dtype]


def varlen(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    """The variable-length flash kernel, causal within each document. PyTorch has renamed its options: causal is
    `is_causal` in 2.10 and `window_size` later; `enable_gqa` (shared key/value heads) exists from 2.12 on."""
    options: dict = {"window_size": (-1, 0)} if "window_size" in VARLEN_OPTIONS else {"is_causal": True}
    group = q.shape[1] // k.shape[1]
    if group > 1 and "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True
    elif group > 1:
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    output = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **options)
    assert isinstance(output, Tensor)  # it is a tuple only if more is asked for
    return output


def _cut(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(start, end, first key) of each block. With QUERY_ROWS = 3, documents a, b and c of 2, 1 and 4 tokens give

        rows  a | x
              a | x x                  (0, 3, 0): short neighbours share a block; its mask hides a from b
              b |     x
              c |       x
              c |       x x            (3, 6, 3): the first rows of a long document
              c |       x x x
              c |       x x x x        (6, 7, 3): its last row, which sees the keys of both blocks
           keys   a a b c c c c
    """
    blocks = []
    offset = 0  # where the current document starts
    open_from = 0  # where the block starts that collects short documents
    for length in lengths:
        end = offset + length
        # The document does not fit into the unfinished block: end that block before it.
        if end - open_from > QUERY_ROWS and open_from < offset:
            blocks.append((open_from, offset, open_from))
            open_from = offset
        # A long document gets blocks of its own.
        if length > QUERY_ROWS:
            for start in range(offset, end, QUERY_ROWS):
                blocks.append((start, min(start + QUERY_ROWS, end), offset))
            open_from = end
        offset = end
    if open_from < offset:  # the stream has ended with an unfinished block
        blocks.append((open_from, offset, open_from))
    return blocks


class _BlockedAttention(torch.autograd.Function):
    """Flash attention (Dao 2023, https://arxiv.org/abs/2307.08691) written with matrix products: the forward saves only
    q, k and v; the backward recomputes the probabilities P, one block of query rows at a time.

        Z = q k^T / sqrt(H) + mask    P = softmax(Z)    O = P v
        dP = dO v^T    dZ = P * (dP - rowsum(P * dP))    dq = dZ k / sqrt(H)    dk = dZ^T q / sqrt(H)    dv = P^T dO

    The G query heads that share a key/value head are stacked: their rows are multiplied with its keys at once.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: list) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        scale = q.shape[-1] ** -0.5
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        grouped_out = _group(out, k)  # a view: what is written to it is written to `out`
        grouped_q = _group(q, k)
        k = k.transpose(0, 1).contiguous()  # (K, T, H)
        v = v.transpose(0, 1).contiguous()
        for start, end, first, mask in blocks:
            rows = _rows(grouped_q, start, end) * scale
            p = _probabilities(rows, k[:, first:end], mask)
            o = torch.bmm(p, v[:, first:end])
            grouped_out[:, :, start:end] = o.unflatten(1, (-1, end - start))
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grouped_d_q = _group(d_q, k)
        grouped_q = _group(q, k)
        grouped_d_out = _group(d_out, k)
        k = k.transpose(0, 1).contiguous()
        v = v.transpose(0, 1).contiguous()
        # Every block that sees a key adds to its gradient. In bf16 a long sum would lose small terms: add in fp32.
        sum_dtype = torch.promote_types(k.dtype, torch.float32)
        d_k = torch.zeros_like(k, dtype=sum_dtype)
        d_v = torch.zeros_like(v, dtype=sum_dtype)
        for start, end, first, mask in ctx.blocks:
            keys = slice(first, end)
            rows = _rows(grouped_q, start, end) * scale
            d_rows = _rows(grouped_d_out, start, end)
            p = _probabilities(rows, k[:, keys], mask)
            d_v[:, keys] += torch.bmm(p.transpose(1, 2), d_rows)
            d_p = torch.bmm(d_rows, v[:, keys].transpose(1, 2))
            # dZ of the formula in one pass (a private function: softmax has no public backward). P = 0 gives dZ = 0.
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            # `rows` are q / sqrt(H): the product with them needs no scale, the one with k does.
            d_k[:, keys] += torch.bmm(d_s.transpose(1, 2), rows)
            d_q_rows = torch.bmm(d_s, k[:, keys]) * scale
            grouped_d_q[:, :, start:end] = d_q_rows.unflatten(1, (-1, end - start))
        d_k = d_k.transpose(0, 1).to(q.dtype)
        d_v = d_v.transpose(0, 1).to(q.dtype)
        return d_q, d_k, d_v, None


def _group(x: Tensor, k: Tensor) -> Tensor:
    """(T, N, H) -> (K, G, T, H), a view: the query heads under the key/value head that they read."""
    return x.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)


def _rows(grouped: Tensor, start: int, end: int) -> Tensor:
    """(K, G, T, H) -> (K, G * rows, H): the rows of one block, for all heads of a group below each other."""
    return grouped[:, :, start:end].flatten(1, 2)


def _probabilities(rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """softmax(rows keys^T + mask): (K, G * rows, H), (K, S, H), (rows, S) -> (K, G * rows, S)."""
    group = rows.shape[1] // mask.shape[0]
    if group > 1:
        mask = mask.repeat(group, 1)
    return torch.softmax(torch.baddbmm(mask, rows, keys.transpose(1, 2)), dim=-1)
