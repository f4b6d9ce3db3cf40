"""The KV cache: keys and values of the tokens that a model has read, so that the next token is computed alone.

A token's keys and values depend on itself and on earlier tokens only, so they do not change when the text grows. Each
layer has one tensor of keys and one of values, (rows, K, capacity, H). One head of such a tensor looks like this:

    position   0 1 2 3 4 5 6 ...    255 | 511       k  read in earlier forwards
    row 0      k k k k k n . ...      . |           n  written in this forward, then read like the others
    row 1      k k n . . . . ...      . |           .  free: zeros, hidden by the mask
    row 2      (free)

Texts of any length lie side by side. The tensors grow by blocks of 256 positions, so almost no step copies them. They
hold the K key/value heads. Nothing is repeated for the N query heads: the G = N / K query heads that share a key/value
head are the rows of one matrix, which is multiplied with that head's keys.

There are three attention contexts. Each first writes the new keys and values into the cache, then reads from it:

    `add_rows`   prompts of new rows, packed into one stream without padding
    `next_token` one token of each row; the cache itself is the context
    `add_tokens` several tokens behind those of one row
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama.model import Llama, ModelConfig, PackedDocuments

BLOCK = 256  # positions by which the tensors grow
VIEW_BLOCK = 64  # a step reads a multiple of this many positions: kernels prefer round sizes, and shapes change rarely
QUERIES = 128  # tokens behind cached ones whose attention is computed at once


class KVCache:
    """Keys and values of texts that grow, and the attention context of the newest token of each."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu", heads: int | None = None):
        """`heads`: how many key/value heads of each layer this process computes (default: all)."""
        self.lengths: list[int] = []  # how many tokens of each row are in the cache
        self.keys: list[Tensor] = []  # of each layer: (rows, K, capacity, H); made when the layer first writes
        self.values: list[Tensor] = []
        self.reserved = (0, 0)  # the rows and positions for which there is memory
        self.device = torch.device(device)
        self.heads = torch.arange(heads or config.num_key_value_heads, device=device)
        self.view_shape = (0, 0)  # the rows and the S positions that a step reads
        self.key_views: list[Tensor] = []  # of each layer: (rows * K, S, H)
        self.value_views: list[Tensor] = []

    @classmethod
    def of(cls, model: Llama, device: torch.device) -> "KVCache":
        """An empty cache for a model. Under tensor parallelism each rank caches the heads that it computes."""
        return cls(model.config, device, getattr(model, "key_value_heads", None))

    # One token of each row

    def next_token(self) -> None:
        """Prepare one more token of each row: memory for it, where it is written, and which positions it may see."""
        self.positions = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        count = len(self.lengths)
        longest = max(self.lengths)
        self.reserve(count, longest)
        self.set_views(count, _round_up(longest, VIEW_BLOCK))
        # A layer's keys are (rows * K * capacity) vectors of H numbers. These are the numbers of the new ones.
        positions = self.positions[:, None]
        rows = torch.arange(count, device=self.device)
        heads = rows[:, None] * len(self.heads) + self.heads
        slots = heads * self.reserved[1] + positions
        self.slots = slots.flatten()
        every_position = torch.arange(self.view_shape[1], device=self.device)
        hidden = every_position > positions
        mask = mask_of(hidden, self.score_dtype)
        mask_of_heads = mask[:, None, None].expand(-1, len(self.heads), -1, -1)
        self.mask = mask_of_heads.flatten(0, 1)  # (rows * K, 1, S)

    def set_views(self, rows: int, positions: int) -> None:
        """Make the views of the first rows and positions, if the last step had others. Nothing is copied."""
        if (rows, positions) == self.view_shape:
            return
        self.view_shape = (rows, positions)
        self.key_views = [keys[:rows, :, :positions].flatten(0, 1) for keys in self.keys]
        self.value_views = [values[:rows, :, :positions].flatten(0, 1) for values in self.values]

    @torch.compiler.disable  # shapes change while texts grow; compiled layers must not depend on them
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (rows, N, H), k and v (rows, K, H) -> (rows, N, H): each row's token sees the row's tokens and itself."""
        H = q.shape[-1]
        new_keys = k.reshape(-1, H)
        new_values = v.reshape(-1, H)
        all_keys = self.keys[layer].view(-1, H)
        all_values = self.values[layer].view(-1, H)
        all_keys.index_copy_(0, self.slots, new_keys)
        all_values.index_copy_(0, self.slots, new_values)
        keys = self.key_views[layer]
        values = self.value_views[layer]
        grouped = q.reshape(len(keys), -1, H)  # (rows * K, G, H)
        if q.is_cuda:
            queries = grouped.unsqueeze(1)
            keys = keys.unsqueeze(1)
            values = values.unsqueeze(1)
            mask = self.mask.unsqueeze(1)
            y = scaled_dot_product_attention(queries, keys, values, mask)
            return y.reshape(q.shape)
        # The same in plain products, which take less time to start.
        dtype = self.mask.dtype
        queries = grouped.to(dtype)
        keys = keys.to(dtype)
        values = values.to(dtype)
        scores = torch.baddbmm(self.mask, queries, keys.mT, alpha=H**-0.5)
        p = torch.softmax(scores, dim=-1)
        y = torch.bmm(p, values)
        return y.to(q.dtype).view(q.shape)

    # What the other contexts share with it

    def write(self, layer: int, place: tuple[Tensor, ...], k: Tensor, v: Tensor) -> None:
        """Put the keys and values (T, K, H) of a stream's tokens at their rows, heads and positions."""
        if layer == len(self.keys):  # the first stream: the cache takes the dtype in which the model computes
            keys = k.new_zeros(self.reserved[0], k.shape[1], self.reserved[1], k.shape[2])
            self.keys.append(keys)
            self.values.append(torch.zeros_like(keys))
        self.keys[layer].index_put_(place, k)
        self.values[layer].index_put_(place, v)

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype of one token's scores. Few CPUs have fast products of a few rows in bf16, so there it is fp32."""
        keys = self.keys[0]
        if keys.is_cuda:
            return keys.dtype
        return torch.promote_types(keys.dtype, torch.float32)

    def reserve(self, rows: int, positions: int) -> None:
        """Get memory for at least so many rows and positions, in blocks of positions. What is cached moves into it."""
        old_rows, old_positions = self.reserved
        new_rows = max(rows, old_rows)
        new_positions = max(_round_up(positions, BLOCK), old_positions)
        if (new_rows, new_positions) == self.reserved:
            return
        self.reserved = (new_rows, new_positions)
        self.view_shape = (0, 0)
        self.key_views.clear()  # views keep the old tensors alive; without them each goes as soon as it is copied
        self.value_views.clear()
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                _, K, _, H = old.shape
                new = old.new_zeros(new_rows, K, new_positions, H)
                new[:old_rows, :, :old_positions] = old
                tensors[layer] = new

    # Rows come, go, and are copied

    def add_rows(self, lengths: list[int]) -> "NewRows":
        """The context of the first tokens of new rows, `lengths` each, which lie end to end in one stream."""
        first = len(self.lengths)
        self.lengths += lengths
        self.reserve(len(self.lengths), max(lengths))
        return NewRows(self, first, lengths)

    def add_tokens(self, row: int, start: int, count: int) -> "MoreTokens":
        """The context of `count` tokens behind the first `start` positions of a row. What was behind them is forgotten.

        The row may be one that has left, if no other has taken its place since.
        """
        self.lengths[row : row + 1] = [start + count]
        self.reserve(len(self.lengths), start + count)
        return MoreTokens(self, row, start, count)

    def leave(self, row: int) -> None:
        """Take a row out. The last row takes its place: one row is copied once, the others stay where they are."""
        last = len(self.lengths) - 1
        if row < last:
            self.copy([(last, row)])
        del self.lengths[last]

    def copy(self, pairs: list[tuple[int, int]], first: int = 0) -> None:
        """For each pair (source, target), copy what row `source` holds from position `first` on into row `target`."""
        sources = [source for source, _ in pairs]
        targets = [target for _, target in pairs]
        end = max(self.lengths[source] for source in sources)
        added = max(targets) + 1 - len(self.lengths)
        self.lengths += [0] * added
        for source, target in pairs:
            self.lengths[target] = self.lengths[source]
        self.reserve(len(self.lengths), end)
        from_rows, to_rows = torch.tensor([sources, targets], device=self.device)
        for tensor in (*self.keys, *self.values):
            part = tensor[:, :, first:end]
            part[to_rows] = part[from_rows]


def mask_of(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: -inf where a position is hidden, else 0. Made once a step, for all layers."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf)


def _round_up(count: int, block: int) -> int:
    """The smallest multiple of `block` that is `count` or more."""
    return -(-count // block) * block


class NewRows:
    """The context of prompts that begin new rows, from row `first` on: packed documents whose keys and values stay."""

    def __init__(self, cache: KVCache, first: int, lengths: list[int]):
        self.cache = cache
        self.documents = PackedDocuments(lengths, cache.device)
        self.positions = self.documents.positions
        ends = self.documents.boundaries[1:].long()
        self.last = ends - 1  # where each prompt's last token is in the stream
        counts = torch.tensor(lengths)
        documents = torch.repeat_interleave(counts)
        rows = first + documents.to(cache.device)  # (T): the row of each token
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
        device = cache.device
        self.cache = cache
        self.row = row
        self.positions = torch.arange(start, start + count, device=device)
        self.last = torch.tensor([count - 1], device=device)
        rows = torch.tensor([[row]], device=device)
        self.place = (rows, cache.heads, self.positions[:, None])
        self.blocks = []  # first token, end, and the mask (block, S): -inf where a token may not see a position
        for first in range(0, count, QUERIES):
            end = min(first + QUERIES, count)
            every_position = torch.arange(start + end, device=device)
            hidden = every_position > self.positions[first:end, None]
            self.blocks.append((first, end, mask_of(hidden, cache.keys[0].dtype)))

    @torch.compiler.disable
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, N, H), k and v (n, K, H) -> (n, N, H)."""
        self.cache.write(layer, self.place, k, v)
        all_keys = self.cache.keys[layer][self.row]
        all_values = self.cache.values[layer][self.row]
        y = torch.empty_like(q)
        for first, end, mask in self.blocks:
            by_key_head = q[first:end].unflatten(1, (len(all_keys), -1))
            grouped = by_key_head.permute(1, 2, 0, 3)  # (K, G, block, H)
            queries = grouped.flatten(1, 2)[None]  # (1, K, G * block, H): heads of a group below each other
            seen = mask.shape[1]
            keys = all_keys[None, :, :seen]
            values = all_values[None, :, :seen]
            group = grouped.shape[1]
            mask = mask.repeat(group, 1)
            out = scaled_dot_product_attention(queries, keys, values, mask)
            out = out[0].unflatten(1, grouped.shape[1:3])  # (K, G, block, H)
            y[first:end] = out.permute(2, 0, 1, 3).flatten(1, 2)
        return y
