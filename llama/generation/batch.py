"""Texts that grow side by side: prompts are read together, then each step adds one token to every text.

    add    A: prompt of 5    B: prompt of 2       read as one packed stream; their last rows give the first new tokens
    step   A a               B b                  one token of each, attention over its own cached keys and values
    step   A a a             B b b
    step   A a a a           B stops              B's row is free at once,
    add                      C: prompt of 3       and another prompt may take it while A goes on

What follows a prompt depends on that prompt and its settings alone, whatever grows beside it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama.generation.beams import Beams
from llama.generation.growing import Growing, heirs, naming, next_tokens, shared_start
from llama.generation.kv_cache import KVCache, MoreTokens, NewRows
from llama.generation.request import Answer, Request
from llama.generation.settings import GenerationSettings
from llama.model import Llama, PackedDocuments

# Scores (B, V) of what follows each row's newest token (B), for which `KVCache.next_token` has made room.
NextLogits = Callable[[Tensor, KVCache], Tensor]


class Batch:
    """The texts that a model continues at the same time. Puts the model into eval mode.

    next_logits: how a step computes; by default, `model.logits`.
    remember:    for a chat. While no text grows, a prompt that begins like the last text goes on in its row, so only
                 what is new is read.
    """

    def __init__(self, model: Llama, next_logits: NextLogits | None = None, remember: bool = False):
        self.model = model.eval()
        self.next_logits = next_logits or model.logits
        self.positions = model.config.max_position_embeddings
        self.device = device_of(model)
        self.cache = KVCache(model.config, self.device)
        self.texts: list[Growing] = []  # of each row in the cache
        self.newest: list[int] = []  # the last token of each row, which the cache does not have yet
        self.remember = remember
        self.remembered: list[int] = []  # the ids of the text that left last, as far as row 0 of the cache has them

    def __len__(self) -> int:
        """How many texts are growing. One with beams has several rows."""
        return len({text.number for text in self.texts})

    @torch.no_grad()
    def add(self, requests: Sequence[tuple[int, Request]]) -> list[tuple[int, Answer]]:
        """Read new prompts in one forward, and choose what follows each. Returns the answers that are complete.

        Each request comes with a number of its own, and asks for one token at least. The texts that grow already do not
        change. Raises UserError for a prompt that the model cannot read, and for one that it gives NaN for.
        """
        new: list[Growing] = []
        ids: list[int] = []
        for number, request in requests:
            new.append(Growing.of(number, request, len(self.texts) + len(new), self.positions))
            ids += request.prompt
        context: NewRows | MoreTokens
        # The last id is read in any case: its scores say what follows.
        known = 0 if self.texts or len(new) > 1 else shared_start(self.remembered, ids[:-1])
        self.remembered = []
        if known:
            ids = ids[known:]
            context = self.cache.add_tokens(0, known, len(ids))
        else:
            context = self.cache.add_rows([len(text.request.prompt) for text in new])
        self.texts += new
        self.newest += [0] * len(new)
        logits = self.model.logits(torch.tensor(ids, device=self.device), context, context.last)
        return self.grow(new, logits)

    @torch.no_grad()
    def step(self) -> list[tuple[int, Answer]]:
        """Add one token to every text. Returns the answers that this completes."""
        self.cache.next_token()
        tokens = torch.tensor(self.newest, device=self.device)
        return self.grow(self.texts, self.next_logits(tokens, self.cache))

    @torch.no_grad()
    def keep_company(self) -> None:
        """A forward without use, for a rank that has no text while others have: under FSDP all compute together."""
        self.model.logits(torch.zeros(1, dtype=torch.int64, device=self.device), PackedDocuments([1], self.device))

    def clear(self) -> None:
        """Drop texts that were interrupted, perhaps in the middle of a forward, and what the cache has of them."""
        if self.cache.lengths:
            self.cache.lengths.clear()
            self.texts.clear()
            self.newest.clear()
            self.remembered = []

    def grow(self, texts: list[Growing], logits: Tensor) -> list[tuple[int, Answer]]:
        """Continue the texts of the last rows of the cache by what their rows of logits (R, V) say."""
        first = len(self.texts) - len(logits)
        alike: dict[GenerationSettings, dict[int, Growing]] = {}  # texts with the same settings are one matrix
        for text in texts:
            alike.setdefault(text.request.settings, {})[text.number] = text
        answers = []
        idle: list[int] = []  # rows that are needed no more
        for settings, by_number in alike.items():
            group = list(by_number.values())
            rows = [row - first for text in group for row in text.rows]
            scores = logits if rows == list(range(len(logits))) else logits[rows]
            if settings.num_beams > 1:
                for text, own in zip(group, scores.split([len(text.rows) for text in group]), strict=True):
                    assert text.beams
                    idle += self.grow_beams(text, text.beams, own)
                    if text.beams.done:
                        answers.append((text.number, text.shown(text.beams.answer())))
                continue
            for text, token in zip(group, next_tokens(group, scores), strict=True):
                reason = text.take(token, self.positions)
                if reason:
                    answers.append((text.number, Answer(text.ids, reason)))
                    idle += text.rows
                else:
                    self.newest[text.rows[0]] = text.ids[-1]
        for row in sorted(idle, reverse=True):
            self.leave(row)
        return answers

    def grow_beams(self, text: Growing, beams: Beams, logits: Tensor) -> list[int]:
        """One step of a beam search. Returns the rows that are left over, all of them when it is done."""
        with naming([text], logits):
            tokens, parents = beams.advance(logits)
        added = max(0, len(parents) - len(text.rows))  # after the first step, which has one row
        spare = list(range(len(self.texts), len(self.texts) + added))
        self.texts += [text] * added
        self.newest += [0] * added
        text.rows, copies, left_over = heirs(text.rows, parents, spare)
        if copies:
            equal = 0 if added else len(text.request.prompt)  # rows of one prompt differ only behind it
            self.cache.copy(copies, equal)
        for row, token in zip(text.rows, tokens, strict=True):
            self.newest[row] = token
        return left_over

    def leave(self, row: int) -> None:
        """Free a row at once; the last row of the cache moves into its place."""
        last = len(self.texts) - 1
        if last == 0 and self.remember:
            text = self.texts[0]
            self.remembered = (text.request.prompt + text.ids)[: self.cache.lengths[0]]
        self.cache.leave(row)
        moved = self.texts.pop()
        token = self.newest.pop()
        if row < last:
            moved.rows[moved.rows.index(last)] = row
            self.texts[row] = moved
            self.newest[row] = token


def device_of(model: Llama) -> torch.device:
    """Where the model computes. With FSDP's cpu_offload its weights lie elsewhere."""
    weight = model.norm.weight
    mesh = getattr(weight, "device_mesh", None)
    return torch.device(mesh.device_type) if mesh else weight.device
