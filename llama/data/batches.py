"""Which examples an optimizer step trains on, and how they lie in a stream: pure functions of (seed, step)."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from llama.data.examples import EncodedData
from llama.model.packed import PackedDocuments

# The length of a stream is rounded up to a multiple of this. For every new length, the CPU's matrix library keeps one
# more set of compiled kernels (memory grew by 2 GB over 96 lengths), and CUDA's allocator fragments.
ROUND_TO = 64
# --group_by_length shuffles the examples, then sorts each window of this many steps by length. If the window were the
# whole epoch, the sort would undo the shuffle: a step would get the same examples in every epoch.
GROUPED_STEPS = 50


@dataclass(frozen=True)
class Batch:
    """Whole examples packed into one stream.

    tokens (T). rows (R): the places whose next token is a label; targets (R): that token. documents: the attention
    context, which also has the positions. `example_tokens` is T without the padding at the end, which is a document of
    its own without labels.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    documents: PackedDocuments
    example_tokens: int
    indices: Sequence[int]  # of the examples, in the order of the stream
    labels_per_example: Sequence[int]


def pack(data: EncodedData, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """Lay examples end to end. An example's first token must not be a label: no token before it could predict it.

    With no indices, the stream is padding without labels. So a rank that has no examples left still takes part in every
    collective (otherwise the others would wait forever), and adds exactly 0 to the loss and the gradients.
    """
    ids, rows, targets = [], [], []
    lengths, labels = [], []
    offset = 0
    for i in indices:
        tokens, is_label = data[i]
        places = np.flatnonzero(is_label)
        ids.append(tokens)
        rows.append(offset + places - 1)  # a label is predicted at the token before it
        targets.append(tokens[places])
        lengths.append(len(tokens))
        labels.append(len(places))
        offset += len(tokens)
    padding = -offset % ROUND_TO
    if offset == 0:  # nothing to do: a stream of padding alone
        padding = ROUND_TO
    if padding:
        ids.append(np.zeros(padding, np.int32))
        lengths.append(padding)
    empty = np.zeros(0, np.int64)  # np.concatenate needs at least one array
    return Batch(
        tokens=_to(np.concatenate(ids), device),
        rows=_to(np.concatenate([empty, *rows]), device),
        targets=_to(np.concatenate([empty, *targets]), device),
        documents=PackedDocuments(lengths, device),
        example_tokens=offset,
        indices=list(indices),
        labels_per_example=labels,
    )


def _to(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


@dataclass(eq=False)
class Schedule:
    """The examples of every optimizer step: a pure function of the data, the settings and the seed.

    Each step has `micro_batches_per_step` micro-batches over all ranks, each with at most `batch_size` examples, or,
    if `batch_tokens` is given, a pack: whole examples of at most that many tokens together. Each epoch has its own
    order and uses every example once. A step may take the end of one epoch and the start of the next; only the very
    last step may be smaller. The examples of a step do not depend on the number of ranks.

    units: the number of things that an epoch shuffles: packs (formed once, for all epochs), or else examples.
    steps: the number of optimizer steps.
    """

    lengths: np.ndarray
    epochs: float
    micro_batches_per_step: int
    batch_size: int
    batch_tokens: int = 0
    group_by_length: bool = False
    seed: int = 0

    def __post_init__(self):
        self.packs = fill_packs(self.lengths, self.batch_tokens, self.seed) if self.batch_tokens else None
        self.units = len(self.packs) if self.packs else len(self.lengths)
        units_per_micro_batch = 1 if self.packs else self.batch_size
        self.units_per_step = self.micro_batches_per_step * units_per_micro_batch
        self.total = max(1, round(self.epochs * self.units))
        self.steps = -(-self.total // self.units_per_step)  # -(-a // b) is a / b, rounded up
        self._order = lru_cache(maxsize=2)(self._epoch_order)  # two: a step may span the end of an epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """The micro-batches of optimizer step `step` (from 0), each a list of example indices."""
        start = step * self.units_per_step
        stop = min(start + self.units_per_step, self.total)
        chosen = []
        for epoch in range(start // self.units, -(-stop // self.units)):
            first = epoch * self.units
            chosen += self._order(epoch)[max(start - first, 0) : stop - first].tolist()
        if self.packs is None:
            return deal(chosen, self.lengths, self.micro_batches_per_step, self.batch_size)
        empty: list[list[int]] = [[] for _ in range(self.micro_batches_per_step - len(chosen))]
        return [self.packs[i] for i in chosen] + empty

    def imbalance(self, world_size: int, steps: int = 100) -> float:
        """(most tokens of a rank / mean) - 1, averaged over some steps: how long ranks wait for the busiest one."""
        excess = []
        sampled = np.linspace(0, self.steps - 1, min(steps, self.steps))
        for step in sampled.astype(int).tolist():
            micro_batches = self.micro_batches(step)
            tokens = np.array([self.lengths[indices].sum() for indices in micro_batches])
            by_rank = tokens.reshape(-1, world_size).sum(0)  # micro-batch i goes to rank i modulo world_size
            excess.append(by_rank.max() / by_rank.mean() - 1)
        return float(np.mean(excess))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.units)
        if not self.group_by_length:
            return order
        # The first `head` examples fill the step that the previous epoch left incomplete; group only those after them.
        head = -epoch * self.units % self.units_per_step
        steps = _group(order[head:], self.lengths, self.units_per_step, generator)
        if epoch == 0:  # the longest example in the first step: memory runs out in the first minute or never
            longest_of = [self.lengths[step].max() for step in steps]
            whole = [i for i, step in enumerate(steps) if len(step) == self.units_per_step]
            first = max(whole, key=lambda i: longest_of[i], default=0)
            steps.insert(0, steps.pop(first))
        return np.concatenate([order[:head], *steps])


def _group(order: np.ndarray, lengths: np.ndarray, size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """The same examples as steps of `size` with similar lengths, in random order, and a shorter step at the end."""
    window = GROUPED_STEPS * size
    starts = range(0, max(len(order) - size, 0) + 1, window)
    steps = []
    for start in starts:
        stop = len(order) if start == starts[-1] else start + window  # the last window takes an incomplete step, too
        part = order[start:stop]
        part = part[np.argsort(-lengths[part], kind="stable")]
        steps += [part[i : i + size] for i in range(0, len(part), size)]
    short = [steps.pop()] if steps and len(steps[-1]) < size else []
    return [steps[i] for i in generator.permutation(len(steps))] + short


def fill_packs(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Packs of whole examples with at most `capacity` tokens each. Every example is in exactly one pack.

    Cutting the stream after every `capacity` tokens would fill each pack, but split examples; whole examples leave
    gaps. Best-fit decreasing keeps gaps small: take the longest example first, and put each into the fullest pack that
    still has space for it. No example may be longer than `capacity`. Ding et al. 2024, https://arxiv.org/abs/2404.10830
    """
    order = np.random.default_rng([seed, 0]).permutation(len(lengths))
    packs: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending
    for i in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[i])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room = capacity
            pack: list[int] = []
            packs.append(pack)
        else:
            room = rooms[place]
            pack = by_room[room].pop()
            if not by_room[room]:
                del rooms[place], by_room[room]
        pack.append(i)
        room -= length
        if room > 0:
            if room not in by_room:
                insort(rooms, room)
            by_room.setdefault(room, []).append(pack)
    return packs


def deal(indices: Sequence[int], lengths: np.ndarray, shares: int, most: int) -> list[list[int]]:
    """Split examples into `shares` lists of at most `most` examples, with token counts that are nearly equal.

    The longest example first, each to the share with the fewest tokens that still has room (Graham 1969, the LPT rule).
    Ranks wait for each other at every layer, so they should have equal work.
    """
    dealt: list[list[int]] = [[] for _ in range(shares)]
    with_room = [(0, share) for share in range(shares)]  # a heap of (tokens, share)
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        tokens, share = heapq.heappop(with_room)
        dealt[share].append(i)
        if len(dealt[share]) < most:
            heapq.heappush(with_room, (tokens + int(lengths[i]), share))
    return dealt
