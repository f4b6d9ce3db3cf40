"""Random numbers that belong to a text, and the tokens drawn with them: chi-square tests with a fixed seed."""

import numpy as np
import torch

from llama.generation.sampling import RandomNumbers, choose, draw

INF = torch.inf
LARGEST = 1 - 2**-53  # of the numbers in [0, 1)
# What a sum of squares exceeds once in a thousand times: the 0.999 quantile of chi-square by degrees of freedom.
QUANTILE = {6: 22.46, 99: 148.23}


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float((np.square(counts - expected) / expected).sum())


def test_a_number_depends_on_seed_prompt_and_place_alone():
    """The values are written down, so that a seed gives the same text in the next version too."""
    numbers = RandomNumbers(3, [1, 2])
    assert numbers.uniform(5).tolist() == RandomNumbers(3, [1, 2]).uniform(5).tolist()
    assert numbers.uniform(5, 4)[:1] == numbers.uniform(5) and numbers.uniform(5, 0).shape == (0,)
    others = [RandomNumbers(seed, prompt) for seed, prompt in ((4, [1, 2]), (3, [1, 2, 0]), (3, [2, 1]), (1, [3, 2]))]
    assert len({float(n.uniform(5)[0]) for n in [numbers, *others]} | set(numbers.uniform(6, 3).tolist())) == 8
    assert not set(numbers.uniform(5, 1000).tolist()) & set(numbers.uniform(6, 1000).tolist())
    assert RandomNumbers(0, [1]).uniform(0, 2).tolist() == [0.9216865170816144, 0.3857923069399315]
    assert RandomNumbers(2**63 - 1, [2**40]).uniform(2**20).shape == (1,)


def test_the_draws_have_the_probabilities_of_the_scores():
    scores = torch.tensor([[0.0, 1.0, -INF, 2.0, -1.0, 0.5, -3.0, 1.5]])
    probabilities = scores[0].double().softmax(-1).numpy()
    numbers = RandomNumbers(0, [1, 2, 3])
    drawn = choose(scores.repeat(10_000, 1), [float(numbers.uniform(place)[0]) for place in range(10_000)])
    counts = np.bincount(drawn, minlength=8)
    is_possible = probabilities > 0
    assert counts[2] == 0
    assert chi_square(counts[is_possible], 10_000 * probabilities[is_possible]) < QUANTILE[6]


def test_places_prompts_and_seeds_are_independent():
    """Pairs of neighbours fall evenly on a board of 10 x 10 fields."""
    by_place = np.concatenate([RandomNumbers(0, [7]).uniform(place) for place in range(4_000)])
    by_prompt = np.concatenate([RandomNumbers(0, [prompt]).uniform(0) for prompt in range(4_000)])
    by_seed = np.concatenate([RandomNumbers(seed, [0]).uniform(0) for seed in range(4_000)])
    within = RandomNumbers(0, [7]).uniform(3, 4_000)
    pairs = [(u[:-1], u[1:]) for u in (by_place, by_prompt, by_seed, within)]
    for first, second in [*pairs, (by_place, by_prompt), (by_prompt, by_seed)]:
        counts = np.bincount((first * 10).astype(int) * 10 + (second * 10).astype(int), minlength=100)
        assert chi_square(counts, np.full(100, len(first) / 100)) < QUANTILE[99]


def test_the_ends_of_the_interval_draw_the_first_and_the_last_possible_token():
    """For sums that end a little beside 1, too."""
    for seed in range(50):
        scores = torch.randn(1, 7 + 50 * seed, generator=torch.Generator().manual_seed(seed))
        scores[:, :2] = scores[:, -3:] = -INF
        assert draw(scores.repeat(3, 1), [0.0, 2**-60, LARGEST]).tolist() == [2, 2, scores.shape[1] - 4]


def test_a_rare_token_is_drawn_as_often_as_it_should_be():
    """A probability of 1e-9 is lost if it is added to 1 in float32."""
    scores = torch.tensor([[1.0, 1e-9]]).log()
    assert draw(scores.repeat(2, 1), [1 - 1.1e-9, 1 - 0.9e-9]).tolist() == [0, 1]


def test_a_token_of_probability_zero_is_never_drawn():
    scores = torch.tensor([[-INF, 0.0, -INF, -800.0, 0.0, -INF]])  # exp(-800) is 0
    drawn = draw(scores.repeat(1001, 1), [*np.linspace(0, LARGEST, 1001)])
    assert set(drawn.tolist()) == {1, 4}
    assert abs(int((drawn == 1).sum()) - 500.5) < 1


def test_of_tokens_that_tie_the_lowest_id_is_the_likeliest():
    assert choose(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])) == [1, 0]


def test_where_every_token_is_ruled_out_there_is_no_choice():
    scores = torch.tensor([[-INF, -INF], [-INF, 0.0]])
    assert choose(scores) == choose(scores, [0.3, 0.3]) == [None, 1]


def test_a_row_is_chosen_as_if_it_were_alone():
    """C24."""
    scores = torch.randn(5, 1001, generator=torch.Generator().manual_seed(0))
    numbers = RandomNumbers(0, [1]).uniform(0, 5).tolist()
    assert choose(scores, numbers) == [choose(scores[i : i + 1], [u])[0] for i, u in enumerate(numbers)]
    assert choose(scores[:0], []) == []
