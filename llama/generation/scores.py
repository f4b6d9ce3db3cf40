"""What the settings make of a model's scores before a token is chosen: penalties, then the filters of a draw.

The steps and their order are those of transformers' logits processors. Each takes scores (R, V), one row for each text,
and returns new ones; a token that is ruled out gets -inf. V is the size of the vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from llama.generation.settings import GenerationSettings

RULED_OUT = -torch.inf


def process(scores: Tensor, texts: list[list[int]], settings: GenerationSettings, keep: int = 1) -> Tensor:
    """The scores from which the next token is chosen.

    scores: (R, V) logits, or log-probabilities for beams. They are not changed.
    texts:  R lists of ids, each the prompt and the answer so far.
    keep:   the filters of a draw leave at least this many tokens. Beam sampling asks for more than 1.

    In this order: repetition penalty, no-repeat n-grams; if tokens are drawn, also temperature, top-k, top-p, min-p.
    Returns (R, V) fp32, or fp64 for fp64 scores. All of a row is -inf if each token would repeat an n-gram; then
    llama.generation.sampling.choose returns None. Raises ValueError if a row holds NaN or +inf, or no finite score.
    """
    if scores.dtype != torch.float64:
        scores = scores.float()
    best = scores.amax(-1)  # NaN for a row that holds NaN
    if not best.isfinite().all():
        raise ValueError("the model's logits are NaN or infinite: its weights are unusable")
    if settings.repetition_penalty != 1:
        scores = penalize_repetition(scores, texts, settings.repetition_penalty)
    if settings.no_repeat_ngram_size:
        scores = forbid_repeated_ngrams(scores, texts, settings.no_repeat_ngram_size)
    if not settings.draws:
        return scores
    if settings.temperature != 1:
        scores = scores / settings.temperature
    if settings.top_k:
        scores = keep_top_k(scores, max(settings.top_k, keep))
    if settings.top_p < 1:
        scores = keep_top_p(scores, settings.top_p, keep)
    if settings.min_p:
        scores = keep_min_p(scores, settings.min_p, keep)
    return scores


def penalize_repetition(scores: Tensor, texts: list[list[int]], penalty: float) -> Tensor:
    """s / penalty where s > 0, s * penalty where s < 0, for each token that the text has already, prompt included.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858
    """
    seen = [(row, token) for row, text in enumerate(texts) for token in set(text)]
    rows, tokens = torch.tensor(seen, device=scores.device).T
    old = scores[rows, tokens]
    penalized = torch.where(old < 0, old * penalty, old / penalty)
    return scores.index_put((rows, tokens), penalized)


def forbid_repeated_ngrams(scores: Tensor, texts: list[list[int]], size: int) -> Tensor:
    """-inf for each token that would complete an n-gram of `size` tokens that the text, prompt included, has already.

    Paulus et al. 2017, https://arxiv.org/abs/1705.04304
    """
    forbidden = [(row, token) for row, text in enumerate(texts) for token in _completions(text, size)]
    if not forbidden:
        return scores
    rows, tokens = torch.tensor(forbidden, device=scores.device).T
    return scores.index_put((rows, tokens), scores.new_tensor(RULED_OUT))


def _completions(text: list[int], size: int) -> list[int]:
    """What came behind each earlier occurrence of the text's last size - 1 tokens."""
    if len(text) < size:
        return []
    ngrams = np.lib.stride_tricks.sliding_window_view(np.array(text), size)  # (len(text) - size + 1, size)
    newest = text[len(text) - size + 1 :]
    is_equal = ngrams[:, :-1] == newest
    last_tokens = ngrams[is_equal.all(1), -1]
    return last_tokens.tolist()


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """The k best tokens, and those that tie with the last of them. Fan et al. 2018, https://arxiv.org/abs/1805.04833"""
    if k >= scores.shape[-1]:
        return scores
    best = scores.topk(k).values
    return scores.masked_fill(scores < best[:, -1:], RULED_OUT)


def keep_top_p(scores: Tensor, top_p: float, keep: int) -> Tensor:
    """The fewest of the likeliest tokens that together have probability top_p.

    A token goes if it and all that are less likely have 1 - top_p or less together. Of tokens that tie, the one with
    the lowest id goes first (transformers leaves this to torch.sort).

    Holtzman et al. 2020, https://arxiv.org/abs/1904.09751
    """
    V = scores.shape[-1]
    probabilities = scores.softmax(-1)
    # Tokens below (1 - top_p) / V go in any case, as V of them do not reach 1 - top_p. Only the others are sorted.
    is_likely = probabilities >= (1 - top_p) / V
    likely = int(is_likely.sum(-1).max())
    count = min(max(likely, keep), V)
    ids = scores.topk(count).indices.sort().values
    values, order = scores.gather(1, ids).sort(stable=True)
    ids = ids.gather(1, order)  # from the least likely to the likeliest, and by id where they tie
    others = probabilities.scatter(1, ids, 0)
    below = others.sum(-1, keepdim=True)
    sums = below + probabilities.gather(1, ids).cumsum(-1)
    is_out = sums <= 1 - top_p
    is_out[:, -keep:] = False
    values = values.masked_fill(is_out, RULED_OUT)
    ruled_out = torch.full_like(scores, RULED_OUT)
    return ruled_out.scatter(1, ids, values)


def keep_min_p(scores: Tensor, min_p: float, keep: int) -> Tensor:
    """The tokens with at least min_p times the probability of the likeliest. Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082"""
    probabilities = scores.softmax(-1)
    likeliest = probabilities.amax(-1, keepdim=True)
    is_out = probabilities < min_p * likeliest
    count = min(keep, scores.shape[-1])
    kept = probabilities.topk(count).indices
    is_out = is_out.scatter(1, kept, False)
    return scores.masked_fill(is_out, RULED_OUT)
