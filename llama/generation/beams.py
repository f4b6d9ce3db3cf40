"""Beam search: several texts are continued side by side, and the one with the best score is the answer."""

from typing import NamedTuple

import torch
from torch import Tensor

from llama.generation.request import Answer
from llama.generation.sampling import RandomNumbers
from llama.generation.scores import process
from llama.generation.settings import GenerationSettings


class Hypothesis(NamedTuple):
    """A text that ended, with its score divided by the length penalty."""

    score: float
    answer: Answer


class Beams:
    """The beams of one prompt. In each step, every beam is continued by every token, and the best texts stay.

    A text's score is the sum of its tokens' processed log-probabilities (llama.generation.scores). When it ends, by a
    stop id or at its greatest length, its score is divided by

        (number of its tokens, the stop id among them) ** length_penalty        Wu et al. 2016, arxiv.org/abs/1609.08144

    and the num_beams best of these are kept. A step has (1 + number of stop ids) * num_beams candidates, at least
    2 * num_beams: each beam has one candidate for each stop id, so num_beams candidates at least do not end.

    The candidates are the texts with the best scores. If tokens are drawn, they are drawn without replacement from the
    softmax of all scores: those with the largest score + Gumbel noise (Kool et al. 2019, arxiv.org/abs/1903.06059).

    The steps and early stopping are those of transformers' beam search, with one difference: where fewer than num_beams
    texts are possible, transformers adds copies with the score -1e9, and here there are fewer rows.

        beams = Beams(prompt, settings, stop_ids, positions_left)
        while not beams.done:
            tokens, parents = beams.advance(logits)         # logits (beams.rows, V)
            logits = the model's, where row i is the old row parents[i], continued by tokens[i]
        beams.answer()
    """

    def __init__(self, prompt: list[int], settings: GenerationSettings, stop_ids: frozenset[int], positions_left: int):
        """positions_left: the answer has at most this many tokens, because the model has no position for more."""
        self.settings = settings
        self.stop_ids = stop_ids
        self.longest = min(settings.max_new_tokens, positions_left)
        self.reason_at_longest = "length" if settings.max_new_tokens <= positions_left else "context"
        self.candidates_per_beam = max(2, 1 + len(stop_ids))
        self.numbers = RandomNumbers(settings.seed, prompt)
        self.prompt_length = len(prompt)
        self.texts = [prompt]  # prompt and answer so far of the living beams, the best one first
        self.scores = [0.0]
        self.finished: list[Hypothesis] = []  # the best one first
        self.done = self.longest <= 0

    @property
    def rows(self) -> int:
        """The number of living beams: 1 before the first step, then num_beams. It is smaller where fewer texts are
        possible: in a small vocabulary, or if nearly every token would repeat an n-gram."""
        return len(self.texts)

    def advance(self, logits: Tensor) -> tuple[list[int], list[int]]:
        """One step. logits (rows, V): what may follow each living beam.

        Returns the new token of each beam that lives on, and the row that it continues. Both are empty when done.
        Raises ValueError for logits that are NaN or infinite.
        """
        num_beams = self.settings.num_beams
        length = len(self.texts[0]) - self.prompt_length + 1
        scores, candidates = self._candidates(logits, length)
        divisor = length**self.settings.length_penalty
        final_scores = (scores / divisor).tolist()
        is_end = []
        for place, (parent, token) in enumerate(candidates):
            ends = token in self.stop_ids or length == self.longest
            is_end.append(ends)
            if ends and place < num_beams:
                self._finish(final_scores[place], [*self.texts[parent], token])
        ended = torch.tensor(is_end, dtype=torch.bool)
        living = scores.masked_fill(ended, -torch.inf)
        count = min(num_beams, len(living))
        best = living.topk(count).indices.tolist()
        best = [place for place in best if not is_end[place]]
        if not best or self._is_decided(scores[best[0]], length):
            self.done = True
            return [], []
        chosen = [candidates[place] for place in best]
        self.texts = [[*self.texts[parent], token] for parent, token in chosen]
        self.scores = scores[best].tolist()
        parents = [parent for parent, _ in chosen]
        tokens = [token for _, token in chosen]
        return tokens, parents

    def answer(self) -> Answer:
        """The best text that ended. If none did, because every token would repeat an n-gram, the best one so far."""
        if self.finished:
            return self.finished[0].answer
        reason = "no_repeat" if self.longest > 0 else self.reason_at_longest
        return Answer(self.texts[0][self.prompt_length :], reason)

    def _candidates(self, logits: Tensor, length: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """The step's C candidates, in the order in which they count: scores (C) on the CPU, and (row, new token)."""
        if logits.dtype != torch.float64:
            logits = logits.float()
        log_p = logits.log_softmax(-1)
        of_tokens = process(log_p, self.texts, self.settings, self.candidates_per_beam)
        of_texts = of_tokens.new_tensor(self.scores)
        totals = of_texts[:, None] + of_tokens
        totals = totals.flatten()  # (rows * V)
        keys = totals
        if self.settings.draws:
            is_possible = totals > -torch.inf
            uniform = self.numbers.uniform(length - 1, int(is_possible.sum()))
            exponential = -torch.from_numpy(1 - uniform).log()
            gumbel = -exponential.log()
            keys = totals.double()
            keys[is_possible] += gumbel.to(keys.device)
        count = min(self.candidates_per_beam * self.settings.num_beams, len(keys))
        places = keys.topk(count).indices
        places = places[totals[places] > -torch.inf]
        V = of_tokens.shape[1]
        return totals[places].cpu(), [divmod(place, V) for place in places.tolist()]

    def _finish(self, score: float, text: list[int]) -> None:
        """Keep a text that ended, if it is among the num_beams best."""
        ids = text[self.prompt_length :]
        if ids[-1] in self.stop_ids:
            answer = Answer(ids[:-1], "stop")
        else:
            answer = Answer(ids, self.reason_at_longest)
        self.finished.append(Hypothesis(score, answer))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # of equal ones, the earlier stays first
        del self.finished[self.settings.num_beams :]

    def _is_decided(self, best: Tensor, length: int) -> bool:
        """Whether num_beams texts ended, and the best living text is not expected to beat the worst of them.

        best: the score of the living text, which has `length` tokens. Each further token makes the score smaller, but
              makes the divisor larger. "never" takes the largest divisor that is possible.
        """
        if len(self.finished) < self.settings.num_beams:
            return False
        if self.settings.early_stopping == "true":
            return True
        if self.settings.early_stopping == "never" and self.settings.length_penalty > 0:
            length = self.longest
        divisor = length**self.settings.length_penalty
        return float(best / divisor) <= self.finished[-1].score
