"""The KV cache against the same texts read without one."""

import dis
import weakref
from dataclasses import replace

import pytest
import torch
from packed_llama import CONFIG, random_model

from llama.generation.kv_cache import BLOCK, KVCache, MoreTokens, NewRows
from llama.model import Llama, PackedDocuments

HEADS = {"grouped": 2, "multi-query": 1, "multi-head": 6}
EXACT = 1e-11  # in fp64, for logits of about 10


def model_of(heads: str = "grouped") -> Llama:
    return random_model(0, replace(CONFIG, num_key_value_heads=HEADS[heads])).requires_grad_(False)


def texts_and_logits(model: Llama, *lengths: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random texts, and the logits at each of their tokens without a cache."""
    generator = torch.Generator().manual_seed(len(lengths))
    texts = [torch.randint(CONFIG.vocab_size, (length,), generator=generator) for length in lengths]
    return texts, [model.logits(text, PackedDocuments([len(text)])) for text in texts]


def prefill(model: Llama, cache: KVCache, starts: list[torch.Tensor]) -> list[torch.Tensor]:
    lengths = [len(start) for start in starts]
    return list(model.logits(torch.cat(starts), cache.add_rows(lengths)).split(lengths))


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    assert ours.shape == expected.shape and expected.abs().max() > 1
    return (ours - expected).abs().max().item()


@pytest.mark.parametrize("heads", HEADS)
def test_logits_with_a_cache_equal_those_without_at_every_step(heads):
    """C55: unequal prompts, growth over 256 positions, a row that leaves, a new one beside old ones, a copied row."""
    model = model_of(heads)
    texts, expected = texts_and_logits(model, 290, 60, 300, 40)
    cache = KVCache(model.config)
    lengths = [240, 1, 255]
    rows = [0, 1, 2]  # which text each row holds

    def steps(count: int) -> None:
        for _ in range(count):
            places = list(cache.lengths)
            cache.next_token()
            tokens = torch.stack([texts[text][place] for text, place in zip(rows, places, strict=True)])
            logits = model.logits(tokens, cache)
            for row, (text, place) in enumerate(zip(rows, places, strict=True)):
                assert difference(logits[row], expected[text][place]) < EXACT

    for text, logits in enumerate(prefill(model, cache, [t[:n] for t, n in zip(texts, lengths, strict=False)])):
        assert difference(logits, expected[text][: lengths[text]]) < EXACT
    assert cache.reserved == (3, BLOCK)
    steps(3)
    assert cache.reserved == (3, 2 * BLOCK)
    cache.leave(0)
    rows = [2, 1]
    steps(3)
    assert difference(prefill(model, cache, [texts[3][:4]])[0], expected[3][:4]) < EXACT
    rows = [2, 1, 3]
    steps(3)
    cache.copy([(2, 0), (2, 3)])
    rows = [3, 1, 3, 3]
    assert cache.lengths == [7, 10, 7, 7]
    steps(3)


@pytest.mark.parametrize("count", [1, 5, 128, 300])
def test_several_tokens_behind_cached_ones_equal_the_whole_text(count):
    """C55: a chat's next turn. Other rows, before and behind, keep every bit."""
    model = model_of()
    texts, expected = texts_and_logits(model, 9, 450, 5)
    cache = KVCache(model.config)
    prefill(model, cache, [texts[0], texts[1][:100], texts[2]])
    before = [keys[[0, 2], :, :9].clone() for keys in cache.keys]
    logits = model.logits(texts[1][100 : 100 + count], cache.add_tokens(1, 100, count))
    assert difference(logits, expected[1][100 : 100 + count]) < EXACT
    assert cache.lengths == [9, 100 + count, 5]
    assert all(torch.equal(keys[[0, 2], :, :9], old) for keys, old in zip(cache.keys, before, strict=True))
    cache.next_token()
    tokens = torch.stack([texts[0][0], texts[1][100 + count], texts[2][0]])
    assert difference(model.logits(tokens, cache)[1], expected[1][100 + count]) < EXACT


def test_a_row_that_has_left_can_be_taken_up_and_what_was_behind_is_forgotten():
    model = model_of()
    texts, expected = texts_and_logits(model, 30)
    cache = KVCache(model.config)
    prefill(model, cache, [torch.cat([texts[0][:20], torch.zeros(30, dtype=torch.int64)])])
    cache.leave(0)
    assert difference(model.logits(texts[0][20:], cache.add_tokens(0, 20, 10)), expected[0][20:]) < EXACT


def test_the_cache_holds_key_value_heads_and_a_step_writes_one_position_of_it():
    """Never N heads; the tensors stay where they are, and of each row nothing changes but the new position."""
    model = model_of()
    texts, _ = texts_and_logits(model, 200, 80)
    cache = KVCache(model.config)
    prefill(model, cache, texts)
    assert {tensor.shape for tensor in cache.keys + cache.values} == {(2, 2, BLOCK, CONFIG.head_dim)}
    for _ in range(50):
        before = [(tensor, tensor.data_ptr(), tensor.clone()) for tensor in cache.keys + cache.values]
        cache.next_token()
        model.logits(torch.tensor([1, 2]), cache)
        for tensor, address, old in before:
            changed = (tensor != old).any(dim=(1, 3)).nonzero().tolist()
            assert tensor.data_ptr() == address and changed == [[0, cache.lengths[0] - 1], [1, cache.lengths[1] - 1]]


def test_growth_leaves_nothing_of_the_old_tensors_in_memory():
    model = model_of()
    cache = KVCache(model.config)
    prefill(model, cache, texts_and_logits(model, BLOCK)[0])
    old = [weakref.ref(tensor) for tensor in cache.keys + cache.values]
    cache.next_token()
    assert cache.reserved == (1, 2 * BLOCK) and not any(tensor() is not None for tensor in old)


def test_a_copy_leaves_alone_what_the_rows_share():
    """Beams of one prompt differ only behind it."""
    model = model_of()
    cache = KVCache(model.config)
    prefill(model, cache, texts_and_logits(model, 20, 20)[0])
    old = [keys.clone() for keys in cache.keys]
    cache.copy([(0, 1)], first=15)
    for keys, before in zip(cache.keys, old, strict=True):
        assert torch.equal(keys[1, :, :15], before[1, :, :15]) and torch.equal(keys[0], before[0])
        assert torch.equal(keys[1, :, 15:], before[0, :, 15:])


@pytest.mark.parametrize("context", [KVCache, NewRows, MoreTokens])
def test_attention_builds_no_tuple_list_or_dict_for_a_layer(context):
    """A step has hundreds of calls; only what PyTorch returns is a new object. MoreTokens reads prompts, not steps."""
    built = {entry.opname for function in (context.attend, KVCache.write) for entry in
             dis.get_instructions(getattr(function, "__wrapped__", function))}
    unwanted = {name for name in built if name.startswith(("BUILD_", "LIST_", "DICT_"))}
    assert bool(unwanted) == (context is MoreTokens)


def test_attention_in_bf16_on_a_cpu_is_the_softmax_of_scores_in_fp32():
    """Query head n reads key/value head n // G. Only the result is rounded."""
    N, K, H = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
    cache = KVCache(CONFIG)
    k, v = torch.randn(2, 77, K, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = 3 * torch.randn(77, N, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    cache.add_rows([70, 5]).attend(0, q[:75], k[:75], v[:75])
    cache.next_token()
    y = cache.attend(0, q[75:], k[75:], v[75:])
    assert y.dtype == torch.bfloat16
    for row, read in enumerate([[*range(70), 75], [*range(70, 75), 76]]):
        for head in range(N):
            scores = k[read, head // (N // K)].float() @ q[75 + row, head].float() / H**0.5
            expected = scores.softmax(0) @ v[read, head // (N // K)].float()
            assert (y[row, head].float() - expected).abs().max() < 2**-8 * expected.abs().max()
