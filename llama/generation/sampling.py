"""One token from processed scores: the likeliest, or one drawn with random numbers that belong to the text alone."""

import hashlib

import numpy as np
import torch
from torch import Tensor


class RandomNumbers:
    """The random numbers of one text: a pure function of the seed, the prompt, and how many tokens it has behind it.

    There is no state that other texts of the batch could move on, so a text is the same whatever is beside it. The
    generator is Philox, which encrypts a counter with a key: its n-th block of numbers is computed at once, without the
    ones before. The key is a hash of seed and prompt; each token has 2^64 blocks of its own.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405
    """

    def __init__(self, seed: int, prompt: list[int]):
        text = np.array([seed, *prompt], dtype="<i8").tobytes()
        self.key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")

    def uniform(self, tokens: int, count: int = 1) -> np.ndarray:
        """`count` numbers in [0, 1) for the choice of the token that has `tokens` of the answer before it."""
        return np.random.Generator(np.random.Philox(key=self.key, counter=tokens << 64)).random(count)


def choose(scores: Tensor, numbers: list[float] | None = None) -> list[int | None]:
    """The next token of each row of processed scores (R, V): a token that has -inf is never chosen.

    numbers: R numbers in [0, 1), each of which draws a token from softmax(scores). None: the likeliest token is taken,
             of several that tie the one with the lowest id.

    A row's choice is None if all of its scores are -inf: no_repeat_ngram_size forbids every token, and the answer ends.
    """
    best = scores.max(-1)
    chosen = best.indices if numbers is None else draw(scores, numbers)
    is_possible = best.values > -torch.inf
    pairs = zip(chosen.tolist(), is_possible.tolist(), strict=True)
    return [token if possible else None for token, possible in pairs]


def draw(scores: Tensor, numbers: list[float]) -> Tensor:
    """(R) ids, each drawn from softmax(scores) (R, V) by inverting the cumulative distribution:

    the first token i with  p_0 + ... + p_i > u  and  p_i > 0.
    """
    probabilities = scores.double().softmax(-1)
    # A sum in parallel may come out smaller than the one before it, and the last one is not exactly 1. So a token of
    # probability 0 counts as not reached, and u is scaled to the largest sum.
    reached = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0)
    u = torch.tensor(numbers, dtype=torch.float64, device=scores.device)
    is_beyond = reached > (u * reached.amax(-1))[:, None]
    return is_beyond.int().argmax(-1)  # the first one
