"""Steps on a GPU as CUDA graphs.

A step of a small batch is hundreds of short kernels, which Python starts more slowly than the GPU runs them. A CUDA
graph is recorded once and then started as a whole, but it is fixed: the same kernels, shapes and addresses each time.
So

    tokens and positions are written into tensors that stay where they are, and the graph begins by reading them;
    each row reads all positions for which the cache has memory, a multiple of 256, and a mask hides the free ones;
    a graph is for 1, 2, 4, 8, ... rows: with 5 texts, three more rows compute something that nobody reads.

The cache gets new tensors when it grows. The graphs of the old ones are then dropped, and new ones are recorded.
https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama.generation.kv_cache import KVCache, mask_of
from llama.model.attention import AttentionContext

WARM_UPS = 3  # runs before a recording, in which libraries choose kernels and get their memory
Logits = Callable[[Tensor, AttentionContext], Tensor]  # tokens (T) and their context -> scores (T, V)


class CapturedSteps:
    """`logits(tokens, context)` of a model, for the newest token of each row of a cache, as graphs."""

    def __init__(self, logits: Logits):
        self.compute = logits
        self.graphs: dict[int, Step] = {}  # by rows
        self.keys: Tensor | None = None  # of the cache that the graphs read

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """tokens (B), which `cache.next_token` has prepared -> scores (B, V)."""
        if self.keys is not cache.keys[0]:
            self.graphs.clear()
            self.keys = cache.keys[0]
        count = len(tokens)
        power_of_two = 1 << (count - 1).bit_length()
        rows = min(power_of_two, cache.reserved[0])
        if rows not in self.graphs:
            self.graphs[rows] = Step(self.compute, WholeCache(cache, rows))
        scores = self.graphs[rows](tokens, cache.positions)
        return scores[:count]


class Step:
    """One token of each of a fixed number of rows. On a CPU the same is computed without a graph."""

    def __init__(self, logits: Logits, context: "WholeCache"):
        self.logits = logits
        self.context = context
        self.tokens = torch.zeros_like(context.positions)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens and positions (B), B <= rows -> scores (rows, V), in a tensor that nothing writes to later."""
        # Rows without a text compute as well. They write to position 0 of a free row, which a new text overwrites.
        count = len(tokens)
        self.context.positions[count:] = 0
        self.context.positions[:count] = positions
        self.tokens[:count] = tokens
        if not self.tokens.is_cuda:
            return self.compute()
        if self.graph is None:
            self.graph = self.record()
        self.graph.replay()
        return self.out.clone()

    def compute(self) -> Tensor:
        self.context.look()
        return self.logits(self.tokens, self.context)

    def record(self) -> torch.cuda.CUDAGraph:
        """The graph of `compute`, whose scores are `out`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):  # each writes the same keys and values
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.out = self.compute()
        return graph


class WholeCache:
    """The context of the newest token of each of the first rows of a cache. No shape depends on how long a text is."""

    def __init__(self, cache: KVCache, rows: int):
        self.keys = [keys[:rows] for keys in cache.keys]  # of each layer: (rows, K, capacity, H)
        self.values = [values[:rows] for values in cache.values]
        self.rows = torch.arange(rows, device=cache.device)
        self.heads = cache.heads
        self.every_position = torch.arange(cache.reserved[1], device=cache.device)
        self.positions = torch.zeros_like(self.rows)

    def look(self) -> None:
        """Follow `positions`: where each token is written, and which positions each row may see."""
        positions = self.positions[:, None]
        self.place = (self.rows[:, None], self.heads, positions)
        mask = mask_of(self.every_position > positions, self.keys[0].dtype)
        self.mask = mask[:, None, None]  # (rows, 1, 1, capacity)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (rows, N, H), k and v (rows, K, H) -> (rows, N, H)."""
        keys = self.keys[layer]
        values = self.values[layer]
        keys.index_put_(self.place, k)
        values.index_put_(self.place, v)
        queries = q[:, :, None]
        y = scaled_dot_product_attention(queries, keys, values, self.mask, enable_gqa=True)
        return y[:, :, 0]
