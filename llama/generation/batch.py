"""Texts that grow side by side: prompts are read together, then each step adds one token to every text.

    add    A: prompt of 5    B: prompt of 2       one packed stream; each prompt's last logits give a token
    step   A a               B b                  one token of each, attention over its own cached keys and values
    step   A a a             B b b
    step   A a a a           B stops              B's row is free at once,
    add                      C: prompt of 3       and another prompt may take it while A goes on

What follows a prompt depends on that prompt and its settings alone, and not on the other texts.
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

# The newest token of each row (B), which `KVCache.next_token` has prepared -> logits (B, V).
NextLogits = Callable[[Tensor, KVCache], Tensor]


class Batch:
    """The texts that a model continues at the same time. Puts the model into eval mode.

    next_logits: what computes a step, `model.logits` by default.
    remember:    for a chat. If no text grows and a prompt begins with the same ids as the last text, the cached keys
                 and values of these are used again, and only the other ids are read.
    """

    def __init__(self, model: Llama, next_logits: NextLogits | None = None, remember: bool = False):
        self.model = model.eval()
        self.next_logits = next_logits or model.logits
        self.positions = model.config.max_position_embeddings
        self.device = device_of(model)
        self.cache = KVCache.of(model, self.device)
        self.texts: list[Growing] = []  # of each row in the cache
        self.newest: list[int] = []  # the last token of each row, which the cache does not have yet
        self.remember = remember
        self.remembered: list[int] = []  # those ids of the last text that row 0 of the cache still has

    def __len__(self) -> int:
        """How many texts are growing. A text with beams has several rows, and counts once."""
        return len({text.number for text in self.texts})

    @torch.no_grad()
    def add(self, requests: Sequence[tuple[int, Request]]) -> list[tuple[int, Answer]]:
        """Read new prompts in one forward, and choose what follows each. Returns the answers that are complete.

        Each request comes with a number of its own, and asks for one token at least. The texts that grow already do not
        change. Raises UserError for a prompt that the model cannot read, and where the logits are NaN.
        """
        new: list[Growing] = []
        ids: list[int] = []
        for number, request in requests:
            row = len(self.texts) + len(new)
            new.append(Growing.of(number, request, row, self.positions))
            ids += request.prompt
        known = 0
        if not self.texts and len(new) == 1:
            known = shared_start(self.remembered, ids[:-1])  # the last id is always read: its logits say what follows
        self.remembered = []
        context: NewRows | MoreTokens
        if known:
            ids = ids[known:]
            context = self.cache.add_tokens(0, known, len(ids))
        else:
            lengths = [len(text.request.prompt) for text in new]
            context = self.cache.add_rows(lengths)
        self.texts += new
        self.newest += [0] * len(new)
        tokens = torch.tensor(ids, device=self.device)
        logits = self.model.logits(tokens, context, context.last)
        return self.grow(new, logits)

    @torch.no_grad()
    def step(self) -> list[tuple[int, Answer]]:
        """Add one token to every text. Returns the answers that this completes."""
        self.cache.next_token()
        tokens = torch.tensor(self.newest, device=self.device)
        logits = self.next_logits(tokens, self.cache)
        return self.grow(self.texts, logits)

    @torch.no_grad()
    def keep_company(self) -> None:
        """A forward whose result is not used: under FSDP all ranks compute together, also one that has no text."""
        token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.model.logits(token, PackedDocuments([1], self.device))

    def clear(self) -> None:
        """Drop all texts, and what the cache has of them. They may have been interrupted in the middle of a forward."""
        if self.cache.lengths:
            self.cache.lengths.clear()
            self.texts.clear()
            self.newest.clear()
            self.remembered = []

    def grow(self, texts: list[Growing], logits: Tensor) -> list[tuple[int, Answer]]:
        """Choose the next token of texts by their logits (R, V). Their rows are the last R of the cache."""
        first = len(self.texts) - len(logits)
        alike: dict[GenerationSettings, dict[int, Growing]] = {}  # texts with the same settings are chosen for at once
        for text in texts:
            alike.setdefault(text.request.settings, {})[text.number] = text
        answers = []
        idle: list[int] = []  # rows that no text needs any longer
        for settings, by_number in alike.items():
            group = list(by_number.values())
            rows = [row - first for text in group for row in text.rows]
            are_all = rows == list(range(len(logits)))
            scores = logits if are_all else logits[rows]
            if settings.num_beams > 1:
                counts = [len(text.rows) for text in group]
                for text, own in zip(group, scores.split(counts), strict=True):
                    assert text.beams
                    idle += self.grow_beams(text, text.beams, own)
                    if text.beams.done:
                        answer = text.shown(text.beams.answer())
                        answers.append((text.number, answer))
                continue
            tokens = next_tokens(group, scores)
            for text, token in zip(group, tokens, strict=True):
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
        """One step of a beam search. Returns the rows that it no longer needs: all of them when it is done."""
        with naming([text], logits):
            tokens, parents = beams.advance(logits)
        added = max(0, len(parents) - len(text.rows))  # after the first step, which has one row
        end = len(self.texts)
        spare = list(range(end, end + added))
        self.texts += [text] * added
        self.newest += [0] * added
        text.rows, copies, left_over = heirs(text.rows, parents, spare)
        if copies:
            first = 0 if added else len(text.request.prompt)  # later the rows differ only behind the prompt
            self.cache.copy(copies, first)
        for row, token in zip(text.rows, tokens, strict=True):
            self.newest[row] = token
        return left_over

    def leave(self, row: int) -> None:
        """Free a row at once; the last row of the cache moves into its place."""
        last = len(self.texts) - 1
        if last == 0 and self.remember:
            text = self.texts[0]
            ids = text.request.prompt + text.ids
            self.remembered = ids[: self.cache.lengths[0]]
        self.cache.leave(row)
        moved = self.texts.pop()
        token = self.newest.pop()
        if row < last:
            place = moved.rows.index(last)
            moved.rows[place] = row
            self.texts[row] = moved
            self.newest[row] = token


def device_of(model: Llama) -> torch.device:
    """Where the model computes. With FSDP's cpu_offload its weights lie elsewhere."""
    weight = model.norm.weight
    mesh = getattr(weight, "device_mesh", None)
    return torch.device(mesh.device_type) if mesh else weight.device
