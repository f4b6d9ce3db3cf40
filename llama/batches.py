"""Which examples are trained on when, by which rank, and how they are laid out: all pure functions of (seed, step)."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llama.packed import PackedDocuments

# Every new length makes the CPU's matrix library keep another set of compiled kernels (memory grew by 2 GB over 96
# lengths) and makes CUDA's allocator fragment: streams are rounded up to a multiple of this.
ROUND_TO = 64


class Examples(Protocol):
    """What a batch is made from: `data.EncodedData`, or anything like it."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Batch:
    """Whole examples packed into one stream.

    tokens (T); rows (R): where an answer token comes next; targets (R): that token. documents: the attention context,
    which also has the positions. `example_tokens` does not count the round-up at the end, which is a document of its
    own without labels.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    documents: PackedDocuments
    example_tokens: int
    indices: Sequence[int]  # of the examples, in the order they lie in the stream
    labels_per_example: Sequence[int]


def pack(
    data: Examples, indices: Sequence[int], device: torch.device | str = "cpu", every_token: bool = False
) -> Batch:
    """Lay examples end to end; labels are the answer tokens, or with `every_token` all but each example's first.

    No index at all gives a stream without labels: a rank with nothing to do still takes part in every collective, and
    contributes exactly 0.
    """
    ids, rows, targets, lengths, labels = [], [], [], [], []
    offset = 0
    for i in indices:
        tokens, is_answer = data[i]
        at = np.arange(1, len(tokens)) if every_token else np.flatnonzero(is_answer)
        ids.append(tokens)
        rows.append(offset + at - 1)  # the token before predicts this one
        targets.append(tokens[at])
        lengths.append(len(tokens))
        labels.append(len(at))
        offset += len(tokens)
    fill = -offset % ROUND_TO or (ROUND_TO if not offset else 0)
    if fill:
        ids.append(np.zeros(fill, np.int32))
        lengths.append(fill)
    return Batch(
        tokens=_to(np.concatenate(ids), device),
        rows=_to(np.concatenate([np.zeros(0, np.int64), *rows]), device),
        targets=_to(np.concatenate([np.zeros(0, np.int64), *targets]), device),
        documents=PackedDocuments(lengths, device),
        example_tokens=offset,
        indices=list(indices),
        labels_per_example=labels,
    )


def _to(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def total_steps(examples: int, epochs: float, global_batch: int) -> int:
    """Optimizer steps in `epochs` passes; the last step takes what is left."""
    return -(-max(1, round(epochs * examples)) // global_batch)


def global_batch_of(step: int, examples: int, epochs: float, global_batch: int, seed: int) -> list[int]:
    """The example indices of optimizer step `step` (from 0), over all ranks and micro-batches.

    Each epoch is a permutation drawn from (seed, epoch), and the epochs follow each other without a gap: every
    example comes once an epoch, whatever the batch size. Nothing here depends on the number of ranks.
    """
    start = step * global_batch
    stop = min(start + global_batch, max(1, round(epochs * examples)))
    indices = []
    for epoch in range(start // examples, -(-stop // examples)):
        order = _epoch_order(examples, epoch, seed)
        first = epoch * examples
        indices += order[max(start - first, 0) : stop - first].tolist()
    return indices


@lru_cache(maxsize=2)
def _epoch_order(examples: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def deal(indices: Sequence[int], lengths: np.ndarray, parts: int, most: int) -> list[list[int]]:
    """Split examples into `parts` of at most `most` each, with token counts as near equal as can be had quickly.

    Longest first, each to the part with the fewest tokens that still has room (Graham 1969, the LPT rule): ranks that
    wait for each other at every layer should have equal work.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    with_room = [(0, part) for part in range(parts)]  # a heap of (tokens, part)
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        tokens, part = heapq.heappop(with_room)
        dealt[part].append(i)
        if len(dealt[part]) < most:
            heapq.heappush(with_room, (tokens + int(lengths[i]), part))
    return dealt
