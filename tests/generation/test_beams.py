"""Beam search against transformers, against every text of a toy model, and against its definition in ten lines."""

import random

import pytest
import torch

from llama.generation.beams import Beams
from llama.generation.settings import GenerationSettings

HUGE = 1000  # positions


def run(model, prompt, settings, stop_ids=frozenset(), positions_left=HUGE):
    """The beams' answer of a model without a cache: a function from a list of texts to logits (texts, V)."""
    beams = Beams(prompt, settings, stop_ids, positions_left)
    rows = [prompt]
    steps = 0
    while not beams.done:
        assert beams.rows == len(rows)
        tokens, parents = beams.advance(model(rows))
        rows = [[*rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        steps += 1
    assert rows == [] or settings.max_new_tokens == 0
    return beams.answer()


def tiny_llama(seed: int, vocab_size: int, dtype: torch.dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.6, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def of_transformers(model, prompt, settings, stop_ids):
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        num_beams=settings.num_beams, max_new_tokens=settings.max_new_tokens,
        length_penalty=settings.length_penalty, no_repeat_ngram_size=settings.no_repeat_ngram_size,
        early_stopping={"true": True, "false": False, "never": "never"}[settings.early_stopping],
        repetition_penalty=settings.repetition_penalty, eos_token_id=sorted(stop_ids) or None, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    length = int((out.beam_indices[0] >= 0).sum())
    ids = out.sequences[0, len(prompt) :].tolist()[:length]
    return ids, float(out.sequences_scores[0])


@pytest.mark.parametrize("seed", range(4))
def test_beams_equal_transformers(seed):
    pytest.importorskip("transformers")
    r = random.Random(seed)
    model = tiny_llama(seed, 17, torch.float64)
    prompt = [r.randrange(17) for _ in range(5)]
    settings = GenerationSettings(num_beams=2 + seed % 4, max_new_tokens=10, no_repeat_ngram_size=2)
    stop_ids = frozenset([3, 4][: seed % 3])
    answer = run(torch.no_grad()(lambda rows: model(torch.tensor(rows)).logits[:, -1]), prompt, settings, stop_ids)
    ids, _ = of_transformers(model, prompt, settings, stop_ids)
    assert answer.ids == (ids[:-1] if answer.reason == "stop" else ids)
