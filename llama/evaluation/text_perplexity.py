"""Perplexity of a text of any length, by windows that overlap.

    window 5, stride 2     tokens   0 1 2 3 4 5 6 7 8
                           1st      . x x x x              .  read, and not scored
                           2nd          . . . x x          x  scored
                           3rd              . . . x x

Every token but the first is scored exactly once. From the second window on, at least (window - stride) tokens stand
before a scored token. A smaller stride gives it more context and costs more forwards.
This is the recipe of https://huggingface.co/docs/transformers/perplexity, except that the sum of all losses is divided
by the number of scored tokens, so a window counts by how many tokens it scores.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llama.boundary.errors import UserError
from llama.boundary.progress import Progress
from llama.data.batches import pack
from llama.data.plain_text import token_pieces
from llama.data.tokenizer import Tokenizer
from llama.evaluation.intervals import bootstrap, exponential
from llama.evaluation.losses import few_enough, in_memory, losses_of_examples
from llama.evaluation.outcome import Outcome
from llama.model import Llama
from llama.parallel.processes import Process


class Window(NamedTuple):
    """The ids of a window, and how many of them, at its end, are scored."""

    ids: list[int]
    scored: int

    def example(self) -> tuple[np.ndarray, np.ndarray]:
        """Its ids, and which of them are labels."""
        ids = np.array(self.ids, np.int32)
        return ids, np.arange(len(ids)) >= len(ids) - self.scored


def windows(ids: Iterable[int], size: int, stride: int) -> Iterator[Window]:
    """The windows of a stream of ids. Each begins `stride` < `size` ids after the one before. The last may be shorter.

    None where there are fewer than two ids.
    """
    stream = iter(ids)
    window = list(islice(stream, size))
    scored = len(window) - 1
    while scored > 0:
        yield Window(window, scored)
        new = list(islice(stream, stride))
        scored = len(new)
        window = window[stride:] + new


class TextPerplexity:
    """loss              nats of all scored tokens / scored tokens
    perplexity        exp(loss), of one token
    word_perplexity   exp(nats / words), where spaces separate words; None for a text without
    bits_per_byte     nats / ln 2 / bytes of the text in UTF-8: the same measure for every tokenizer

    The file is read and tokenized piece by piece on every rank. What stays in memory is 16 bytes for each window.
    `limit`: only so many windows; 0: all.
    """

    generates = False

    def __init__(self, path: Path, tokenizer: Tokenizer, window: int, stride: int, batch_size: int, limit: int):
        self.path = path
        self.tokenizer = tokenizer
        self.window = window
        self.stride = stride
        self.batch_size = batch_size
        self.limit = limit or None
        self.about = {"window": window, "stride": stride}
        self.bytes = self.words = 0
        # Read the first window now, so that a file that is no text is refused before the model is opened.
        if next(self.windows(), None) is None:
            raise UserError(f"{path}: fewer than two tokens, expected a text; its first token is not scored")

    def windows(self) -> Iterator[Window]:
        """The windows of the file, at most `limit`. Counts the bytes and words of the pieces that are read."""
        self.bytes = self.words = 0
        return islice(windows(self._ids(), self.window, self.stride), self.limit)

    def _ids(self) -> Iterator[int]:
        for piece in token_pieces(self.path, self.tokenizer):
            self.bytes += piece.bytes
            self.words += piece.words
            yield from piece.ids

    @torch.no_grad()
    def score(self, model: Llama, process: Process) -> Outcome:
        model.eval()
        together = few_enough(self.batch_size, self.window, model.config.vocab_size)
        losses = array("d")  # of each window; 0 for those of other ranks
        scored = array("q")
        stream = self.windows()
        with Progress("evaluating", "windows", silent=not process.is_rank_zero) as progress:
            # Every rank reads all windows and takes part in every forward, so that FSDP can gather weights inside it.
            while part := list(islice(stream, together * process.data_ranks)):
                mine = slice(process.data_rank, None, process.data_ranks)
                own = part[mine]
                examples = in_memory([window.example() for window in own])
                batch = pack(examples, range(len(own)), process.device)
                of_part = np.zeros(len(part))
                of_part[mine] = losses_of_examples(model, batch).cpu().numpy()
                losses.extend(of_part)
                scored.extend(window.scored for window in part)
                progress.update(len(part))
        found = torch.tensor(losses, dtype=torch.float64, device=process.device)
        process.sum_over_data_ranks(found)
        return self._outcome(found.tolist(), list(scored))

    def _outcome(self, losses: list[float], scored: list[int]) -> Outcome:
        nats = sum(losses)
        tokens = sum(scored)
        if not math.isfinite(nats):
            raise UserError(f"the loss over {tokens} tokens is {nats}: the model's weights are unusable")
        loss = nats / tokens
        values: dict = {"loss": loss, "perplexity": exponential(loss), "tokens": tokens, "n": len(losses)}
        if self.limit is None:  # else the bytes that were read are not those of the scored tokens
            values["bytes"] = self.bytes
            values["bits_per_byte"] = nats / math.log(2) / self.bytes
            values["words"] = self.words
            per_word = exponential(nats / max(1, self.words))
            values["word_perplexity"] = per_word if per_word < math.inf else None  # no spaces between its words
        interval = bootstrap(losses, scored, "windows")
        intervals = {"perplexity": interval.exp() if interval else None, "loss": interval}
        lines = ({"window": i, "loss": loss, "tokens": scored[i]} for i, loss in enumerate(losses))
        return Outcome(values, intervals, lines)
