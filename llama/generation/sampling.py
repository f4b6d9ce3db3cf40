"""One token from processed scores: the likeliest, or one drawn with random numbers that belong to the text alone."""

import hashlib

import numpy as np
import torch
from torch import Tensor


class RandomNumbers:
    """The random numbers of one text: a pure function of the seed, the prompt, and the number of tokens behind it.

    There is no state that other texts of the batch could change, so a text is the same whatever is beside it. The
    generator is Philox, which encrypts a counter with a key: it computes any block of numbers without the blocks before
    it. The key is a hash of seed and prompt, and each token of the answer has 2^64 blocks of its own.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405
    """

    def __init__(self, seed: int, prompt: list[int]):
        numbers = np.array([seed, *prompt], dtype="<i8")
        hashed = hashlib.blake2b(numbers.tobytes(), digest_size=16)
        self.key = int.from_bytes(hashed.digest(), "little")

    def uniform(self, tokens: int, count: int = 1) -> np.ndarray:
        """`count` numbers in [0, 1), to choose the token that follows the first `tokens` tokens of the answer."""
        philox = np.random.Philox(key=self.key, counter=tokens << 64)
        generator = np.random.Generator(philox)
        return generator.random(count)


def choose(scores: Tensor, numbers: list[float] | None = None) -> list[int | None]:
    """The next token of each row of processed scores (R, V). A token whose score is -inf is never chosen.

    numbers: R numbers in [0, 1). Each draws one token from softmax(scores). None: the likeliest token is taken, and the
             one with the lowest id if several tie.

    A row's choice is None if all of its scores are -inf: no_repeat_ngram_size forbids every token, and the answer ends.
    """
    best = scores.max(-1)
    chosen = best.indices
    if numbers is not None:
        chosen = draw(scores, numbers)
    is_possible = best.values > -torch.inf
    pairs = zip(chosen.tolist(), is_possible.tolist(), strict=True)
    return [token if possible else None for token, possible in pairs]


def draw(scores: Tensor, numbers: list[float]) -> Tensor:
    """Draw one id from softmax(scores) of each row, (R, V) -> (R), by inverting the cumulative distribution:

    the first token i with  p_0 + ... + p_i > u  and  p_i > 0.
    """
    probabilities = scores.double().softmax(-1)
    # Rounding may make a sum smaller than the one before it, and the last sum is not exactly 1. So a token of
    # probability 0 gets the sum 0, which no u is below, and u is scaled to the largest sum.
    sums = probabilities.cumsum(-1)
    sums = sums.masked_fill(probabilities == 0, 0)
    u = torch.tensor(numbers, dtype=torch.float64, device=scores.device)
    scaled = u * sums.amax(-1)
    is_above = sums > scaled[:, None]
    return is_above.int().argmax(-1)  # the first one
