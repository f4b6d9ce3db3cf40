"""The KV cache: keys and values of the tokens that a model has read, so that the next token is computed alone.

A token's keys and values depend on itself and on earlier tokens only, so they never change when a text grows. They are
kept, for each layer in one tensor of keys and one of values (rows, K, capacity, H). This is one head of it:

    position   0 1 2 3 4 5 6 ...    255 | 511       k  read in earlier forwards
    row 0      k k k k k n . ...      . |           n  written in this forward, then read like the others
    row 1      k k n . . . . ...      . |           .  free: zeros, hidden by the mask
    row 2      (free)

Texts of any length lie side by side. The tensors grow by blocks of 256 positions, so almost no step copies them. They
hold K heads, not N: the G query heads that share a key/value head are the rows of one matrix, and read it as it is.

Three contexts share the cache. A model's attention writes through them first, and then looks at what is there:

    `add_rows`   prompts of new rows, packed into one stream without padding
    `next_token` one token of each row; the cache itself is the context
    `add_tokens` several tokens behind those of one row
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama.model import ModelConfig, PackedDocuments

BLOCK = 256  # positions by which the tensors grow
GLANCE = 64  # one step sees a multiple of this many positions: kernels prefer round sizes, and shapes change rarely
QUERIES = 128  # tokens behind cached ones whose scores are computed at once


class KVCache:
    """Keys and values of texts that grow, and the attention context of the newest token of each."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu"):
        self.lengths: list[int] = []  # tokens of each row that are in the cache
        self.keys: list[Tensor] = []  # of each layer: (rows, K, capacity, H); made when the layer first writes
        self.values: list[Tensor] = []
        self.room = (0, 0)  # rows and positions for which there is memory
        self.device = torch.device(device)
        self.heads = torch.arange(config.num_key_value_heads, device=device)
        self.seen = (0, 0)  # the rows and positions of the views
        self.seen_keys: list[Tensor] = []  # of each layer: a view (rows * K, S, H)
        self.seen_values: list[Tensor] = []

    # One token of each row

    def next_token(self) -> None:
        """Make the cache the context of one more token of each row: its place, and which positions each row may see."""
        positions = torch.tensor(self.lengths, device=self.device)
        rows = torch.arange(len(positions), device=self.device)
        self.positions = positions
        self.lengths = [length + 1 for length in self.lengths]
        longest = max(self.lengths)
        self.make_room(len(rows), longest)
        seen = (len(rows), -(-longest // GLANCE) * GLANCE)
        if seen != self.seen:
            self.seen = seen
            self.seen_keys = [_view(keys, *seen) for keys in self.keys]
            self.seen_values = [_view(values, *seen) for values in self.values]
        # Where each row's new keys go among all (rows * K * capacity) of a layer.
        heads = rows[:, None] * len(self.heads) + self.heads
        self.slots = (heads * self.room[1] + positions[:, None]).flatten()
        hidden = torch.arange(seen[1], device=self.device) > positions[:, None]
        mask = self.mask_of(hidden, self.score_dtype)[:, None, None]
        self.mask = mask.expand(-1, len(self.heads), -1, -1).flatten(0, 1)  # (rows * K, 1, S)

    @torch.compiler.disable  # shapes change while texts grow; compiled layers must not depend on them
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (rows, N, H), k and v (rows, K, H) -> (rows, N, H): each row's token sees the row's tokens and itself."""
        H = q.shape[-1]
        self.keys[layer].view(-1, H).index_copy_(0, self.slots, k.reshape(-1, H))
        self.values[layer].view(-1, H).index_copy_(0, self.slots, v.reshape(-1, H))
        keys = self.seen_keys[layer]
        values = self.seen_values[layer]
        grouped = q.reshape(len(keys), -1, H)  # (rows * K, G, H)
        if q.is_cuda:
            queries = grouped.unsqueeze(1)
            mask = self.mask.unsqueeze(1)
            return scaled_dot_product_attention(queries, keys.unsqueeze(1), values.unsqueeze(1), mask).reshape(q.shape)
        # The same in plain products, which take less time to start.
        dtype = self.mask.dtype
        scores = torch.baddbmm(self.mask, grouped.to(dtype), keys.mT.to(dtype), alpha=H**-0.5)
        return torch.bmm(torch.softmax(scores, dim=-1), values.to(dtype)).to(q.dtype).view(q.shape)

    # What the other contexts share with it

    def write(self, layer: int, place: tuple[Tensor, ...], k: Tensor, v: Tensor) -> None:
        """Put the keys and values (T, K, H) of a stream's tokens at their rows, heads and positions."""
        if layer == len(self.keys):  # the first stream: the cache takes the dtype in which the model computes
            self.keys.append(k.new_zeros(self.room[0], k.shape[1], self.room[1], k.shape[2]))
            self.values.append(torch.zeros_like(self.keys[layer]))
        self.keys[layer].index_put_(place, k)
        self.values[layer].index_put_(place, v)

    @property
    def score_dtype(self) -> torch.dtype:
        """What the scores of one token are in. Few CPUs have fast products of a few rows in bf16."""
        dtype = self.keys[0].dtype
        return dtype if self.keys[0].is_cuda else torch.promote_types(dtype, torch.float32)

    def mask_of(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What is added to scores: -inf where a position is hidden, else 0. Made once a step, for all layers."""
        mask = torch.zeros(hidden.shape, dtype=dtype or self.keys[0].dtype, device=self.device)
        return mask.masked_fill_(hidden, -torch.inf)

    def make_room(self, rows: int, positions: int) -> None:
        """Get memory for so many rows and positions at least, in blocks of positions; what is cached moves into it."""
        needed = (max(rows, self.room[0]), max(-(-positions // BLOCK) * BLOCK, self.room[1]))
        if needed == self.room:
            return
        self.room = needed
        self.seen = (0, 0)
        self.seen_keys.clear()  # views keep the old tensors alive; now each goes as soon as it is copied
        self.seen_values.clear()
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(needed[0], old.shape[1], needed[1], old.shape[3])
                tensors[layer][: old.shape[0], :, : old.shape[2]] = old

    # Rows come, go, and are copied

    def add_rows(self, lengths: list[int]) -> "NewRows":
        """The context of new rows' first tokens, `lengths` each, end to end in one stream."""
        first = len(self.lengths)
        self.lengths += lengths
        self.make_room(len(self.lengths), max(lengths))
        return NewRows(self, first, lengths)

    def add_tokens(self, row: int, start: int, count: int) -> "MoreTokens":
        """The context of `count` tokens behind the first `start` positions of a row. What was behind them is forgotten.

        The row may be one that has left, if no other has taken its place since.
        """
        self.lengths[row : row + 1] = [start + count]
        self.make_room(len(self.lengths), start + count)
        return MoreTokens(self, row, start, count)

    def leave(self, row: int) -> None:
        """Take a row out. The last row takes its place: one row is copied once, the others stay where they are."""
        last = len(self.lengths) - 1
        if row < last:
            self.copy([(last, row)])
        del self.lengths[last]

    def copy(self, pairs: list[tuple[int, int]], first: int = 0) -> None:
        """For each pair (from, to), make row `to` hold what row `from` holds, from position `first` on."""
        rows = torch.tensor(pairs, device=self.device)
        end = max(self.lengths[source] for source, _ in pairs)
        self.lengths += [0] * (max(target for _, target in pairs) + 1 - len(self.lengths))
        for source, target in pairs:
            self.lengths[target] = self.lengths[source]
        self.make_room(len(self.lengths), end)
        for tensor in (*self.keys, *self.values):
            part = tensor[:, :, first:end]
            part[rows[:, 1]] = part[rows[:, 0]]


def _view(tensor: Tensor, rows: int, positions: int) -> Tensor:
    """(rows, K, capacity, H) -> (rows * K, S, H): its first rows and positions, nothing copied."""
    return tensor[:rows, :, :positions].flatten(0, 1)


class NewRows:
    """The context of prompts, each the start of a row from row `first` on: packed documents that are also kept."""

    def __init__(self, cache: KVCache, first: int, lengths: list[int]):
        self.cache = cache
        self.documents = PackedDocuments(lengths, cache.device)
        self.positions = self.documents.positions
        self.last = self.documents.boundaries[1:].long() - 1  # the place of each prompt's last token in the stream
        rows = first + torch.repeat_interleave(torch.tensor(lengths)).to(cache.device)  # (T): the row of each token
        self.place = (rows[:, None], cache.heads, self.positions[:, None])

    @torch.compiler.disable
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, N, H), k and v (T, K, H) -> (T, N, H)."""
        self.cache.write(layer, self.place, k, v)
        return self.documents.attend(layer, q, k, v)


class MoreTokens:
    """The context of n tokens behind P cached ones of one row. Token i sees P + i + 1 positions, the last one its own:

    P = 3, n = 2    x x x x .
                    x x x x x      causal at the lower right (`is_causal` of PyTorch is at the upper left)
    """

    def __init__(self, cache: KVCache, row: int, start: int, count: int):
        self.cache = cache
        self.row = row
        self.positions = torch.arange(start, start + count, device=cache.device)
        self.last = torch.tensor([count - 1], device=cache.device)
        self.place = (torch.tensor([[row]], device=cache.device), cache.heads, self.positions[:, None])
        self.blocks = []  # first token, end, and the mask (block, S): -inf where a token may not see a position
        for first in range(0, count, QUERIES):
            end = min(first + QUERIES, count)
            hidden = torch.arange(start + end, device=cache.device) > self.positions[first:end, None]
            self.blocks.append((first, end, cache.mask_of(hidden)))

    @torch.compiler.disable
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, N, H), k and v (n, K, H) -> (n, N, H)."""
        self.cache.write(layer, self.place, k, v)
        keys = self.cache.keys[layer][self.row]
        values = self.cache.values[layer][self.row]
        y = torch.empty_like(q)
        for first, end, mask in self.blocks:
            grouped = q[first:end].unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)  # (K, G, block, H)
            group = grouped.shape[1]
            seen = mask.shape[1]
            queries = grouped.flatten(1, 2)[None]  # (1, K, G * block, H): heads of a group below each other
            mask = mask.repeat(group, 1)
            out = scaled_dot_product_attention(queries, keys[None, :, :seen], values[None, :, :seen], mask)
            y[first:end] = out[0].unflatten(1, grouped.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2)
        return y
