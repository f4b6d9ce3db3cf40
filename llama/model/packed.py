"""Attention over packed documents: training and scoring without a single padding token.

Documents lie end to end in one stream. Every token sees itself and the earlier tokens of its own document, nothing
else, so packing changes no logit. Three ways to compute that same thing, the fastest the machine has:

- CUDA, half precision: the variable-length flash kernel (`torch.nn.attention.varlen`).
- CUDA otherwise: one `scaled_dot_product_attention` per block of rows, with a mask.
- CPU: the same blocks through matrix products. On a processor with bf16 instructions this is 2.5 to 3 times as fast
  as the CPU's own SDPA kernel, whose backward does not use them, and 1.3 times as fast in fp32.
"""

import inspect

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# Its signature moved between releases: `is_causal` in 2.10, `window_size` and `enable_gqa` from 2.12.
VARLEN_ARGUMENTS = inspect.signature(varlen_attn).parameters if varlen_attn else {}
BLOCK = 128  # rows of queries alive at once; with 9 heads and 512 keys, 1.2 MB of bf16 scores: about one core's cache


class PackedDocuments:
    """The attention context of documents laid end to end, `lengths` tokens each; their sum is T."""

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        self.lengths = lengths
        self.device = torch.device(device)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.boundaries = ends.to(self.device)  # where each document starts, and where the last one ends
        starts = torch.repeat_interleave(ends[:-1], torch.tensor(lengths))
        self.positions = (torch.arange(int(ends[-1])) - starts).to(self.device)  # (T), 0 at each document's start
        self._masked_blocks: dict = {}

    @torch.compiler.disable  # the number of documents changes every step; compiled code must not depend on it
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each document. q (T, N, H), k and v (T, K, H) -> (T, N, H)."""
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and varlen_attn is not None:
            return self.attend_varlen(q, k, v)
        if q.is_cuda:
            return self.attend_sdpa(q, k, v)
        return self.attend_blocks(q, k, v)

    def attend_varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longest = max(self.lengths)
        causal = {"window_size": (-1, 0)} if "window_size" in VARLEN_ARGUMENTS else {"is_causal": True}
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in VARLEN_ARGUMENTS:
                causal["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q, k, v, self.boundaries, self.boundaries, longest, longest, **causal)

    def attend_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (T, heads, H) -> (1, heads, T, H)
        for start, end, first, mask in self.masked_blocks(q.dtype):
            keys = slice(first, end)
            out.append(F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, keys], v[:, :, keys], attn_mask=mask, enable_gqa=True
            ))
        return torch.cat(out, dim=2)[0].transpose(0, 1)

    def attend_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _BlockedAttention.apply(q, k, v, self.masked_blocks(q.dtype))

    def masked_blocks(self, dtype: torch.dtype) -> list[tuple[int, int, int, Tensor]]:
        """The stream cut into blocks of at most BLOCK query rows: (start, end, first key, mask (rows, keys)).

        Keys after a block's last row are never touched, which saves nearly half of a long causal document. The
        mask, 0 where a row may look and -inf where not, is made once for all layers and passes.
        """
        if dtype not in self._masked_blocks:
            document = torch.repeat_interleave(torch.tensor(self.lengths)).to(self.device)
            token = torch.arange(len(document), device=self.device)
            blocks = []
            for start, end, first in _cut(self.lengths):
                hidden = document[start:end, None] != document[first:end]
                hidden |= token[start:end, None] < token[first:end]
                mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, -torch.inf)
                blocks.append((start, end, first, mask))
            self._masked_blocks[dtype] = blocks
        return self._masked_blocks[dtype]


def _cut(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(start, end, first key) of each block: long documents in pieces of BLOCK rows, short neighbours together."""
    blocks, offset, short = [], 0, 0  # short: where the still open block of short documents starts
    for length in lengths:
        if offset + length - short > BLOCK and short < offset:
            blocks.append((short, offset, short))
            short = offset
        if length > BLOCK:
            blocks += [(s, min(s + BLOCK, offset + length), offset) for s in range(offset, offset + length, BLOCK)]
            short = offset + length
        offset += length
    return blocks + [(short, offset, short)] * (short < offset)


class _BlockedAttention(torch.autograd.Function):
    """Flash attention's plan (Dao 2023, https://arxiv.org/abs/2307.08691) with matrix products: only q, k and v are
    kept, probabilities are computed again in the backward, and no more than one block of them exists at a time.

        S = q k^T / sqrt(H) + mask    P = softmax(S)    O = P v
        dv = P^T dO    dS = P * (dO v^T - rowsum(P * dO v^T))    dq = dS k / sqrt(H)    dk = dS^T q / sqrt(H)

    The G = N / K query heads that share a key/value head become G times as many rows of one product.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: list) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        grouped_out = _group(out, k)
        grouped_q, k, v = _group(q, k), k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        for start, end, first, mask in blocks:
            rows = _rows(grouped_q, start, end) * q.shape[-1] ** -0.5
            p = _probabilities(rows, k[:, first:end], mask)
            grouped_out[:, :, start:end] = torch.bmm(p, v[:, first:end]).unflatten(1, (-1, end - start))
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grouped_q, grouped_d_q, grouped_d_out = _group(q, k), _group(d_q, k), _group(d_out, k)
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        # A key collects from every block after it: sum in fp32, or bf16 would lose the small late terms.
        d_k, d_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for start, end, first, mask in ctx.blocks:
            keys = slice(first, end)
            rows, d_rows = _rows(grouped_q, start, end) * scale, _rows(grouped_d_out, start, end)
            p = _probabilities(rows, k[:, keys], mask)
            d_v[:, keys] += torch.bmm(p.transpose(1, 2), d_rows)
            d_p = torch.bmm(d_rows, v[:, keys].transpose(1, 2))
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            grouped_d_q[:, :, start:end] = (torch.bmm(d_s, k[:, keys]) * scale).unflatten(1, (-1, end - start))
            d_k[:, keys] += torch.bmm(d_s.transpose(1, 2), rows)
        return d_q, d_k.transpose(0, 1).to(q.dtype), d_v.transpose(0, 1).to(q.dtype), None


def _group(x: Tensor, k: Tensor) -> Tensor:
    """(T, N, H) -> (K, G, T, H), a view: the query heads beside the key/value head they read."""
    return x.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)


def _rows(grouped: Tensor, start: int, end: int) -> Tensor:
    """(K, G, T, H) -> (K, G * rows, H): one block's rows of every head of a group, below each other."""
    return grouped[:, :, start:end].flatten(1, 2)


def _probabilities(rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """softmax(rows keys^T + mask): (K, G * rows, H), (K, S, H), (rows, S) -> (K, G * rows, S)."""
    mask = mask.repeat(rows.shape[1] // mask.shape[0], 1)
    return torch.softmax(torch.baddbmm(mask, rows, keys.transpose(1, 2)), dim=-1)
