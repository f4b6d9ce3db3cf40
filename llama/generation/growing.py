"""One text that grows: how its next token is chosen, and when it ends."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama.boundary.errors import UserError
from llama.generation.beams import Beams
from llama.generation.request import Answer, Request
from llama.generation.sampling import RandomNumbers, choose
from llama.generation.scores import process
from llama.generation.settings import GenerationSettings


@dataclass
class Growing:
    """A request with a number of its own, its row in the cache (with beams, the row of each), and the answer so far."""

    number: int
    request: Request
    rows: list[int]
    ids: list[int] = field(default_factory=list)
    random: RandomNumbers | None = None
    beams: Beams | None = None

    @classmethod
    def of(cls, number: int, request: Request, row: int, positions: int) -> "Growing":
        """`positions`: how many the model has. Raises UserError for a prompt that it cannot read."""
        text = cls(number, request, [row])
        length = len(request.prompt)
        if not 1 <= length <= positions:
            raise UserError(f"{text.name}: {length} tokens, expected 1 to {positions}, the model's positions")
        if request.settings.num_beams > 1:
            text.beams = Beams(request.prompt, request.settings, request.stop_ids, positions - length)
        elif request.settings.draws:
            text.random = RandomNumbers(request.settings.seed, request.prompt)
        return text

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.request.name or f"prompt {self.number + 1}"

    def take(self, token: int | None, positions: int) -> str | None:
        """Add the token to the answer, unless it is a stop id. Returns the reason if the answer ends here."""
        if token is None:  # every token would repeat an n-gram
            return "no_repeat"
        if token in self.request.stop_ids:
            return "stop"
        self.ids.append(token)
        if self.request.on_token and self.request.on_token(token):
            return "stop_string"
        return self.limit(positions)

    def limit(self, positions: int) -> str | None:
        """Why no further token may come, or None if one may."""
        if len(self.ids) >= self.request.settings.max_new_tokens:
            return "length"
        if len(self.request.prompt) + len(self.ids) >= positions:
            return "context"
        return None

    def shown(self, answer: Answer) -> Answer:
        """The answer of beams, given to `on_token` when it is complete. `on_token` may end it earlier."""
        for count, token in enumerate(answer.ids, 1):
            if self.request.on_token and self.request.on_token(token):
                return Answer(answer.ids[:count], "stop_string")
        return answer


def heirs(rows: list[int], parents: list[int], spare: list[int]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """In which rows of the cache beams go on: the row of each new beam, the copies (from, to) that this needs, and the
    rows that nobody needs any longer.

    rows:    the rows of the old beams.
    parents: which old beam each new one continues. The first child of an old beam goes on in its row. Each further
             child gets a copy, in the row of an old beam without children or in one of the `spare` rows.
    """
    free = [row for beam, row in enumerate(rows) if beam not in parents] + spare
    placed: list[int] = []
    copies = []
    for parent in parents:
        row = rows[parent]
        if row in placed:
            copy = free.pop()
            copies.append((row, copy))
            row = copy
        placed.append(row)
    return placed, copies, free


def shared_start(first: list[int], second: list[int]) -> int:
    """How many ids two texts have in common from their start on."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def next_tokens(texts: Sequence[Growing], logits: Tensor) -> list[int | None]:
    """The next token of each text, which all have the same settings and no beams. logits (R, V), a row for each.

    None where no token is possible. Raises UserError for logits that are NaN or infinite.
    """
    settings = texts[0].request.settings
    if is_greedy(settings):
        best, ids = logits.max(-1)
        both = torch.stack([best.double(), ids.double()])
        scores, tokens = both.tolist()  # the step's only wait for the device
        if not all(map(math.isfinite, scores)):
            refuse(texts, logits)
        return [int(token) for token in tokens]
    with naming(texts, logits):
        so_far = [text.request.prompt + text.ids for text in texts]
        processed = process(logits, so_far, settings)
    if not settings.draws:
        return choose(processed)
    numbers = []
    for text in texts:
        assert text.random
        (number,) = text.random.uniform(len(text.ids))
        numbers.append(float(number))
    return choose(processed, numbers)


def is_greedy(settings: GenerationSettings) -> bool:
    """Whether the likeliest token is taken as it is."""
    return not settings.draws and settings.repetition_penalty == 1 and not settings.no_repeat_ngram_size


@contextmanager
def naming(texts: Sequence[Growing], logits: Tensor) -> Iterator[None]:
    """A ValueError about logits (R, V) becomes a UserError that names the prompt. With beams, all rows are of one."""
    try:
        yield
    except ValueError:
        refuse(texts, logits)
        raise


def refuse(texts: Sequence[Growing], logits: Tensor) -> None:
    """Raises UserError if the scores of a text are NaN or infinite. A NaN may reach all prompts of one stream."""
    best = logits.amax(-1)  # NaN for a row that holds NaN
    is_good = best.isfinite().view(len(texts), -1).any(-1)
    bad = [text for text, its_good in zip(texts, is_good.tolist(), strict=True) if not its_good]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        names = ", ".join(text.name for text in bad[:3])
        token = f"token {len(bad[0].ids) + 1} of the answer"
        found = f"the scores of {token} are NaN or infinite"
        raise UserError(f"{names}{more}: {found}: the model's weights are unusable")
