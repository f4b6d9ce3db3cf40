"""Texts that grow side by side: prompts are read together, then each step adds one token to every text.

    add    A: prompt of 5    B: prompt of 2       read as one packed stream; their last rows give the first new tokens
    step   A a               B b                  one token of each, attention over its own cached keys and values
    step   A a a             B b b
    step   A a a a           B stops              B's row is free at once,
    add                      C: prompt of 3       and another prompt may take it while A goes on

What follows a prompt depends on that prompt and its settings alone, whatever grows beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama.boundary.errors import UserError
from llama.generation.kv_cache import KVCache
from llama.generation.request import Answer, Request
from llama.model import Llama, PackedDocuments

STREAM = 4096  # tokens of prompts that are read in one forward; a longer prompt is read alone

# Scores (B, V) of what follows each row's newest token (B), which `KVCache.next_token` has made room for.
NextLogits = Callable[[Tensor, KVCache], Tensor]


@dataclass
class Text:
    """A request that is being answered: its row in the cache (with beams: the row of each), and the ids so far."""

    number: int
    request: Request
    rows: list[int]
    ids: list[int] = field(default_factory=list)


class Batch:
    """The texts that a model continues at the same time. Puts the model into eval mode."""

    def __init__(self, model: Llama, next_logits: NextLogits | None = None):
        self.model = model.eval()
        self.next_logits = next_logits or model.logits
        self.positions = model.config.max_position_embeddings
        self.device = device_of(model)
        self.cache = KVCache(model.config, self.device)
        self.texts: list[Text] = []  # of each row in the cache
        self.newest: list[int] = []  # the last token of each row; the cache does not have it yet

    def __len__(self) -> int:
        """How many texts are growing."""
        return len({id(text) for text in self.texts})

    @torch.no_grad()
    def add(self, requests: Sequence[tuple[int, Request]]) -> list[tuple[int, Answer]]:
        """Read new prompts in one forward and choose what follows each. Returns the answers that are complete.

        A request comes with a number, which its answer and errors name. The texts that grow already do not change.
        Raises UserError for a prompt without ids, or too long for the model.
        """
        for number, request in requests:
            check(number, request, self.positions)
        first = len(self.texts)
        lengths = []
        ids: list[int] = []
        for i, (number, request) in enumerate(requests):
            self.texts.append(Text(number, request, [first + i]))
            lengths.append(len(request.prompt))
            ids += request.prompt
        context = self.cache.add_rows(lengths)
        last = context.documents.boundaries[1:].long() - 1
        logits = self.model.logits(torch.tensor(ids, device=self.device), context, last)
        return self.choose(logits, first)

    @torch.no_grad()
    def step(self) -> list[tuple[int, Answer]]:
        """Add one token to every text. Returns the answers that this completes."""
        self.cache.next_token()
        return self.choose(self.next_logits(torch.tensor(self.newest, device=self.device), self.cache), 0)

    @torch.no_grad()
    def keep_company(self) -> None:
        """A forward without use, for a rank that has no text while others have: under FSDP all compute together."""
        self.model.logits(torch.zeros(1, dtype=torch.int64, device=self.device), PackedDocuments([1], self.device))

    def choose(self, logits: Tensor, first: int) -> list[tuple[int, Answer]]:
        """Give each row from `first` on its next token, by its row of the logits (R, V)."""
        del self.newest[first:]
        best, ids = logits.max(-1)
        finished = []
        peaks, tokens = torch.stack([best.double(), ids.double()]).tolist()  # the step's only wait for the device
        for text, peak, token in zip(self.texts[first:], peaks, tokens, strict=True):
            refuse_nan(text, peak)
            self.newest.append(int(token))
            reason = grow(text, int(token), self.positions)
            if reason:
                finished.append((text, reason))
        for text, _ in finished:
            self.leave(text)
        return [(text.number, Answer(text.ids, reason)) for text, reason in finished]

    def leave(self, text: Text) -> None:
        """Free the text's rows at once; the last row of the cache moves into each."""
        for row in sorted(text.rows, reverse=True):
            self.cache.leave(row)
            moved = self.texts.pop()
            token = self.newest.pop()
            if row < len(self.texts):
                moved.rows[moved.rows.index(len(self.texts))] = row
                self.texts[row] = moved
                self.newest[row] = token


def check(number: int, request: Request, positions: int) -> None:
    """Raises UserError for a prompt that the model cannot read."""
    length = len(request.prompt)
    if not 1 <= length <= positions:
        raise UserError(f"prompt {number + 1}: {length} tokens, expected 1 to {positions}, the model's positions")


def refuse_nan(text: Text, peak: float) -> None:
    """`peak` is the largest of the scores: NaN if any is."""
    if peak != peak:
        place = f"prompt {text.number + 1}, token {len(text.ids) + 1} of the answer"
        raise UserError(f"{place}: the model's scores are NaN, expected numbers: its weights are unusable")


def grow(text: Text, token: int, positions: int) -> str | None:
    """Take the token, or not if it is a stop id. Returns why the text ends here, None if it goes on."""
    if token in text.request.stop_ids:
        return "stop"
    text.ids.append(token)
    if text.request.on_token and text.request.on_token(token):
        return "stop_string"
    return limit(text, positions)


def limit(text: Text, positions: int) -> str | None:
    """Why no further token may come, or None."""
    if len(text.ids) >= text.request.settings.max_new_tokens:
        return "length"
    return "context" if len(text.request.prompt) + len(text.ids) >= positions else None


def device_of(model: Llama) -> torch.device:
    """Where the model computes. With FSDP's cpu_offload its weights lie elsewhere."""
    weight = model.norm.weight
    mesh = getattr(weight, "device_mesh", None)
    return torch.device(mesh.device_type) if mesh else weight.device


def generate(
    model: Llama,
    requests: Sequence[Request],
    batch_size: int,
    any_rank: Callable[[bool], bool] = bool,
    next_logits: NextLogits | None = None,
) -> Iterator[tuple[int, Answer]]:
    """The answers, each with the index of its request, as they are completed. At most `batch_size` texts at a time.

    Prompts that wait are read, STREAM tokens at once, as soon as texts have ended. Every round is one forward on every
    rank: any_rank(live) says whether any rank still has work; the others keep it company, for FSDP's sake. Raises
    UserError before the first forward for prompts that the model cannot read, and later for NaN.
    """
    batch = Batch(model, next_logits)
    waiting: list[tuple[int, Request]] = []
    for number, request in enumerate(requests):
        check(number, request, batch.positions)
        reason = limit(Text(number, request, []), batch.positions)
        if reason:
            yield number, Answer([], reason)
        else:
            waiting.append((number, request))
    waiting.reverse()
    while any_rank(bool(batch.texts or waiting)):
        if waiting and len(batch) < batch_size:
            yield from batch.add(next_prompts(waiting, batch_size - len(batch)))
        elif batch.texts:
            yield from batch.step()
        else:
            batch.keep_company()


def next_prompts(waiting: list[tuple[int, Request]], at_most: int) -> list[tuple[int, Request]]:
    """Take prompts off the end of those that wait: one at least, and as many as fit into one stream."""
    taken: list[tuple[int, Request]] = []
    tokens = 0
    while waiting and len(taken) < at_most:
        tokens += len(waiting[-1][1].prompt)
        if taken and tokens > STREAM:
            break
        taken.append(waiting.pop())
    return taken
