"""Documents behind a shared prefix: the logits of whole documents, at the price of what differs."""

import pytest
import torch
from packed_llama import CONFIG, logits_of, random_model, random_tokens

from llama.generation.prefix import BehindPrefix, read_prefix
from llama.model import ModelConfig, PackedDocuments

SLOW = pytest.mark.slow
# Short documents that share a block, one at its edge, and long ones of several blocks.
LENGTHS = [[1], [3, 1, 2], [128, 5], [60, 200, 1, 300]]
SHAPES = {"GQA": {}, "MQA": {"num_key_value_heads": 1}, "MHA": {"num_key_value_heads": 6}}
PATHS = ["attend_parts", "attend_whole"]  # on the CPU; the model takes the first there


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", ["GQA", *(pytest.param(shape, marks=SLOW) for shape in ("MQA", "MHA"))])
@pytest.mark.parametrize("prefix", [1, 130, *(pytest.param(prefix, marks=SLOW) for prefix in (7, 300))])
def test_logits_behind_a_prefix_are_those_of_the_whole_documents(monkeypatch, path, shape, prefix):
    """C22: fp64, for every way to compute it; no document sees another, and all see the prefix."""
    monkeypatch.setattr(BehindPrefix, "attend_parts", getattr(BehindPrefix, path))
    model = random_model(config=ModelConfig(**vars(CONFIG) | SHAPES[shape]))
    shared = random_tokens(prefix, seed=9)
    for lengths in LENGTHS:
        documents = [random_tokens(length, seed=i) for i, length in enumerate(lengths)]
        with torch.no_grad():
            cache = read_prefix(model, shared)
            found = model.logits(torch.cat(documents), BehindPrefix(lengths, cache)).split(lengths)
            whole = logits_of(model, *(torch.cat([shared, document]) for document in documents))
        for ours, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, expected[prefix:], rtol=0, atol=1e-12)


def test_a_prefix_is_read_once_and_never_changed():
    """Several streams read the same cache; its length and its numbers stay."""
    model = random_model()
    cache = read_prefix(model, random_tokens(5, seed=1))
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    tokens = random_tokens(9, seed=2)
    with torch.no_grad():
        first, again = (model.logits(tokens, BehindPrefix([4, 5], cache)) for _ in range(2))
    assert torch.equal(first, again) and cache.lengths == [5]
    assert all(map(torch.equal, before, (*cache.keys, *cache.values)))


def test_training_through_a_prefix_is_refused():
    """Its keys and values have no gradient, so the sum would be wrong without a word."""
    model = random_model()
    cache = read_prefix(model, random_tokens(5, seed=1))
    with pytest.raises(AssertionError, match="no gradient"):
        model.logits(random_tokens(3, seed=2), BehindPrefix([3], cache))


def test_what_lies_behind_a_prefix_in_bf16_is_as_near_to_fp64_as_whole_documents_are():
    lengths = [40, 3, 150]
    shared = random_tokens(33, seed=9)
    documents = [random_tokens(length, seed=i) for i, length in enumerate(lengths)]
    whole = [torch.cat([shared, document]) for document in documents]
    with torch.no_grad():
        exact = torch.cat([part[33:] for part in logits_of(random_model(), *whole)])
        model = random_model().bfloat16()
        packed = PackedDocuments([len(document) for document in whole])
        plain = torch.cat([part[33:] for part in model.logits(torch.cat(whole), packed).split(packed.lengths)])
        cache = read_prefix(model, shared)
        found = model.logits(torch.cat(documents), BehindPrefix(lengths, cache))
    error = (found.double() - exact).norm()
    assert found.dtype == torch.bfloat16 and error <= 1.1 * (plain.double() - exact).norm()
