"""Documents that all begin with the same prefix, whose keys and values are computed once.

    prefix   P P P P                 its keys and values are read from a KV cache
    a                a a             sees P P P P and the earlier tokens of a
    b                    b b b       sees P P P P and the earlier tokens of b

The stream has only the tokens a a b b b, so no linear layer computes the P tokens of the prefix once for each document.
The logits are those of the whole documents: a token's keys and values depend on itself and on earlier tokens alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama.generation.kv_cache import KVCache
from llama.model import Llama, PackedDocuments


@torch.no_grad()
def read_prefix(model: Llama, ids: Tensor) -> KVCache:
    """The keys and values of the prefix `ids` (P), as the one row of a cache. One forward; collective under FSDP."""
    cache = KVCache.of(model, ids.device)
    with torch.compiler.set_stance("force_eager"):  # one short forward: compiled layers are not compiled again for it
        model.logits(ids, cache.add_rows([len(ids)]), rows=ids.new_empty(0))
    return cache


class BehindPrefix(PackedDocuments):
    """The attention context of documents that lie end to end. Each continues the prefix that `cache` holds.

    `lengths` do not count the prefix. Only for a forward without gradients.
    """

    def __init__(self, lengths: list[int], cache: KVCache):
        super().__init__(lengths, cache.device)
        self.cache = cache
        self.prefix = cache.lengths[0]
        self.positions = self.positions + self.prefix
        self._parts: list = []

    @torch.compiler.disable  # as that of packed documents
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, N, H), k and v (T, K, H) -> (T, N, H)."""
        assert not torch.is_grad_enabled(), "the prefix's keys and values have no gradient"
        prefix_k = self.cache.keys[layer][0, :, : self.prefix]  # (K, P, H)
        prefix_v = self.cache.values[layer][0, :, : self.prefix]
        if q.is_cuda:
            return self.attend_whole(q, k, v, prefix_k, prefix_v)
        return self.attend_parts(q, k, v, prefix_k, prefix_v)

    def attend_parts(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        """The blocks of packed documents as matrix products, with the prefix before the keys of each block."""
        K = k.shape[1]
        out = torch.empty_like(q)
        grouped_out = _grouped(out, K)  # what is written to this view is written to `out`
        grouped_q = _grouped(q, K)
        group = grouped_q.shape[1]
        scale = q.shape[-1] ** -0.5
        k = k.transpose(0, 1)  # (K, T, H)
        v = v.transpose(0, 1)
        for start, end, first, mask, memory in self.parts(q.dtype, K, group):
            rows = grouped_q[:, :, start:end].flatten(1, 2) * scale  # (K, G * rows, H)
            keys = torch.cat([prefix_k, k[:, first:end]], dim=1)
            values = torch.cat([prefix_v, v[:, first:end]], dim=1)
            torch.baddbmm(mask, rows, keys.mT, out=memory)
            torch.softmax(memory, dim=-1, out=memory)
            block = torch.bmm(memory, values)
            grouped_out[:, :, start:end] = block.unflatten(1, (group, -1))
        return out

    def parts(self, dtype: torch.dtype, K: int, group: int) -> list[tuple[int, int, int, Tensor, Tensor]]:
        """`masked_blocks` with masks (G * rows, P + S), which begin with zeros because every token sees the prefix; and
        memory for the scores (K, G * rows, P + S) of each block. All share it, so it stays in the CPU's cache."""
        if self._parts:
            return self._parts
        masks = []
        for start, end, first, mask in self.masked_blocks(dtype):
            padded = pad(mask, (self.prefix, 0))
            masks.append((start, end, first, padded.repeat(group, 1)))
        most = max(mask.numel() for *_, mask in masks)
        memory = torch.empty(K * most, dtype=dtype)
        for start, end, first, mask in masks:
            size = K * mask.numel()
            scores = memory[:size].view(K, *mask.shape)
            self._parts.append((start, end, first, mask, scores))
        return self._parts

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        """Packed documents that each begin with the prefix, so that a GPU's kernels for these can be used.

        The prefix's queries are zeros, and what is computed for them is dropped.
        """
        lengths = [self.prefix + length for length in self.lengths]
        whole = PackedDocuments(lengths, self.device)
        is_own = whole.positions >= self.prefix
        own = is_own.nonzero()[:, 0]  # (T): where the stream's tokens are in the whole
        source = whole.positions.clone()  # of each token of the whole: its index in the prefix followed by the stream
        source[own] = self.prefix + torch.arange(len(own), device=self.device)
        whole_q = q.new_zeros(len(source), *q.shape[1:])
        whole_q[own] = q
        all_k = torch.cat([prefix_k.transpose(0, 1), k])
        all_v = torch.cat([prefix_v.transpose(0, 1), v])
        whole_k = all_k[source]
        whole_v = all_v[source]
        y = whole.attend(layer=0, q=whole_q, k=whole_k, v=whole_v)
        return y[own]


def _grouped(x: Tensor, K: int) -> Tensor:
    """(T, N, H) -> (K, G, T, H), a view: the query heads under the key/value head that they read."""
    by_key_head = x.unflatten(1, (K, -1))
    return by_key_head.permute(1, 2, 0, 3)
