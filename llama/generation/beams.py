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

    and the num_beams best of these are kept. Of the candidates of a step, (1 + number of stop ids) * num_beams are
    looked at, at least 2 * num_beams: that many cannot all end, so that num_beams can go on.

    If tokens are drawn, the candidates are not the best ones, but drawn without replacement from the softmax of all
    scores: by the largest of score + Gumbel noise (Kool et al. 2019, https://arxiv.org/abs/1903.06059).

    The steps and early stopping are those of transformers' beam search. Where fewer than num_beams texts are possible,
    that one goes on with copies whose score is -1e9; here there are fewer rows.

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
        """The number of living beams: 1 before the first step, then num_beams, or fewer where fewer texts are possible:
        in a small vocabulary, or if few n-grams are left that may still come."""
        return len(self.texts)

    def advance(self, logits: Tensor) -> tuple[list[int], list[int]]:
        """One step. logits (rows, V): what may follow each living beam.

        Returns the new token of each beam that lives on, and the row that it continues; two empty lists when done.
        Raises ValueError for logits that are NaN or infinite.
        """
        num_beams = self.settings.num_beams
        length = len(self.texts[0]) - self.prompt_length + 1
        scores, candidates = self._candidates(logits, length)
        divided = (scores / length**self.settings.length_penalty).tolist()
        is_end = [token in self.stop_ids or length == self.longest for _, token in candidates]
        for rank, (parent, token) in enumerate(candidates[:num_beams]):
            if is_end[rank]:
                self._finish(divided[rank], [*self.texts[parent], token])
        living = scores.masked_fill(torch.tensor(is_end, dtype=torch.bool), -torch.inf)
        best = living.topk(min(num_beams, len(living))).indices.tolist()
        best = [rank for rank in best if not is_end[rank]]
        if not best or self._is_decided(scores[best[0]], length):
            self.done = True
            return [], []
        tokens = [candidates[rank][1] for rank in best]
        parents = [candidates[rank][0] for rank in best]
        self.texts = [[*self.texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        self.scores = scores[best].tolist()
        return tokens, parents

    def answer(self) -> Answer:
        """The best text that ended. If none did, the best one so far: each token would have repeated an n-gram."""
        if self.finished:
            return self.finished[0].answer
        reason = "no_repeat" if self.longest > 0 else self.reason_at_longest
        return Answer(self.texts[0][self.prompt_length :], reason)

    def _candidates(self, logits: Tensor, length: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """The texts that are looked at, in their order: scores (C) on the CPU, and C times (row, new token)."""
        if logits.dtype != torch.float64:
            logits = logits.float()
        scores = process(logits.log_softmax(-1), self.texts, self.settings, self.candidates_per_beam)
        totals = (scores + scores.new_tensor(self.scores)[:, None]).flatten()  # (rows * V)
        keys = totals
        if self.settings.draws:
            is_possible = totals > -torch.inf
            uniform = torch.from_numpy(self.numbers.uniform(length - 1, int(is_possible.sum())))
            gumbel = -(-(1 - uniform).log()).log()
            keys = totals.double()
            keys[is_possible] += gumbel.to(keys.device)
        places = keys.topk(min(self.candidates_per_beam * self.settings.num_beams, len(keys))).indices
        places = places[totals[places] > -torch.inf]
        return totals[places].cpu(), [divmod(place, scores.shape[1]) for place in places.tolist()]

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
        """Whether num_beams texts ended, and the best living one is not expected to beat the worst of them.

        Its score is `best` after `length` tokens. It only loses score as it grows; what it gains is a larger divisor.
        """
        if len(self.finished) < self.settings.num_beams:
            return False
        if self.settings.early_stopping == "true":
            return True
        if self.settings.early_stopping == "never" and self.settings.length_penalty > 0:
            length = self.longest
        return float(best / length**self.settings.length_penalty) <= self.finished[-1].score
