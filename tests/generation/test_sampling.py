"""Random numbers that belong to a text, and tokens drawn with them."""

from llama.generation.sampling import RandomNumbers


def test_the_numbers_depend_on_seed_prompt_and_place_alone():
    numbers = RandomNumbers(3, [1, 2])
    assert numbers.uniform(5) == RandomNumbers(3, [1, 2]).uniform(5)
    others = [RandomNumbers(4, [1, 2]).uniform(5), RandomNumbers(3, [1, 2, 0]).uniform(5), numbers.uniform(6)]
    assert len({float(u[0]) for u in [numbers.uniform(5), *others]}) == 4
