"""Which examples are trained on when, by which rank, and how they are laid out: all pure functions of (seed, step)."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llama.model.packed import PackedDocuments

# Every new length makes the CPU's matrix library keep another set of compiled kernels (memory grew by 2 GB over 96
# lengths) and makes CUDA's allocator fragment: streams are rounded up to a multiple of this.
ROUND_TO = 64


class Examples(Protocol):
    """What a batch is made from: `encoding.EncodedData`, or anything like it."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Batch:
    """Whole examples packed into one stream.

    tokens (T); rows (R): where a label comes next; targets (R): that token. documents: the attention context,
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


def pack(data: Examples, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """Lay examples end to end. Their first tokens must not be labels: nothing before could predict them.

    No index at all gives a stream without labels: a rank with nothing to do still takes part in every collective, and
    contributes exactly 0.
    """
    ids, rows, targets, lengths, labels = [], [], [], [], []
    offset = 0
    for i in indices:
        tokens, is_label = data[i]
        at = np.flatnonzero(is_label)
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


class Schedule:
    """The examples of every optimizer step: a pure function of the data, the settings and the seed.

    Each step has `parts` micro-batches over all ranks: of at most `batch_size` examples each, or with `batch_tokens`
    of whole examples of at most so many tokens together. Each epoch has an order of its own, and the epochs follow
    each other without a gap: every example comes once an epoch, and the last step takes what is left. What a step
    trains on does not depend on how its parts are shared out among ranks.
    """

    def __init__(self, lengths: np.ndarray, epochs: float, parts: int, batch_size: int, batch_tokens: int = 0,
                 group_by_length: bool = False, seed: int = 0):
        self.lengths, self.parts, self.batch_size, self.seed = lengths, parts, batch_size, seed
        self.group_by_length = group_by_length
        self.packs = fill(lengths, batch_tokens, seed) if batch_tokens else None
        # What is drawn from: packs are formed once, and come in another order each epoch.
        self.units = len(self.packs) if self.packs else len(lengths)
        self.per_step = parts if self.packs else parts * batch_size
        self.total = max(1, round(epochs * self.units))
        self.steps = -(-self.total // self.per_step)
        self._order = lru_cache(maxsize=2)(self._epoch_order)  # a step may lie in two epochs

    def micro_batches(self, step: int) -> list[list[int]]:
        """The `parts` micro-batches of optimizer step `step` (from 0), each a list of example indices."""
        start = step * self.per_step
        stop = min(start + self.per_step, self.total)
        chosen = []
        for epoch in range(start // self.units, -(-stop // self.units)):
            first = epoch * self.units
            chosen += self._order(epoch)[max(start - first, 0) : stop - first].tolist()
        if self.packs is None:
            return deal(chosen, self.lengths, self.parts, self.batch_size)
        return [self.packs[i] for i in chosen] + [[] for _ in range(self.parts - len(chosen))]

    def imbalance(self, ranks: int, steps: int = 100) -> float:
        """How many more tokens than the mean the rank with the most has, on the average of some steps: what the
        others wait for."""
        excess = []
        for step in np.linspace(0, self.steps - 1, min(steps, self.steps)).astype(int).tolist():
            tokens = np.array([self.lengths[part].sum() for part in self.micro_batches(step)])
            by_rank = tokens.reshape(-1, ranks).sum(0)  # part i goes to rank i modulo ranks
            excess.append(by_rank.max() / by_rank.mean() - 1)
        return float(np.mean(excess))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        chance = np.random.default_rng([self.seed, epoch])
        order = chance.permutation(self.units)
        if not self.group_by_length:
            return order
        # The first `head` complete the last step of the epoch before; what begins with a step of its own is grouped.
        head = -epoch * self.units % self.per_step
        steps = _grouped(order[head:], self.lengths, self.per_step, chance)
        if epoch == 0:  # the longest example at once: memory runs out in the first minute or never
            whole = [i for i, step in enumerate(steps) if len(step) == self.per_step]
            steps.insert(0, steps.pop(max(whole, key=lambda i: self.lengths[steps[i]].max(), default=0)))
        return np.concatenate([order[:head], *steps])


# Lengths are sorted within so many steps' worth of examples, so that a step's companions differ every epoch.
GROUPED_STEPS = 50


def _grouped(order: np.ndarray, lengths: np.ndarray, size: int, chance: np.random.Generator) -> list[np.ndarray]:
    """The same examples as steps of similar lengths, in random order but for the last, which may be short."""
    window = GROUPED_STEPS * size
    steps = []
    starts = range(0, max(len(order) - size, 0) + 1, window)  # the last window takes what is less than a step, too
    for start in starts:
        part = order[start:] if start == starts[-1] else order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        steps += [part[i : i + size] for i in range(0, len(part), size)]
    short = [steps.pop()] if steps and len(steps[-1]) < size else []
    return [*(steps[i] for i in chance.permutation(len(steps))), *short]


def fill(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Packs of whole examples with at most `capacity` tokens each, every example in exactly one.

    Cutting the stream of tokens every `capacity` would waste nothing but tear examples apart; whole ones leave gaps.
    The longest first, each to the pack with the least room that still holds it, keeps the gaps small. None may be
    longer than `capacity`. Best-fit decreasing: Ding et al. 2024, https://arxiv.org/abs/2404.10830
    """
    order = np.random.default_rng([seed, 0]).permutation(len(lengths))
    packs: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending
    for i in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[i])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, pack = capacity, []
            packs.append(pack)
        else:
            room = rooms[at]
            pack = by_room[room].pop()
            if not by_room[room]:
                del rooms[at], by_room[room]
        pack.append(i)
        if room := room - length:
            if room not in by_room:
                insort(rooms, room)
            by_room.setdefault(room, []).append(pack)
    return packs


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
