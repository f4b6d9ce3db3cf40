"""Texts that grow side by side, against transformers' `generate` and against themselves one by one."""

import pytest
import torch
from small_llama import BASE, config_of, llama3, randomize
from transformers import LlamaConfig, LlamaForCausalLM

from llama.generation.decode import generate
from llama.generation.request import Request
from llama.generation.settings import GenerationSettings
from llama.model import Llama

STOPS = frozenset([7, 11])
PROMPT_LENGTHS = (5, 1, 40, 17, 3)
SHAPES = [
    {}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True},
    {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 20}, {"head_dim": 6}, {"vocab_size": 331},
    llama3(8.0), llama3(32.0) | {"rope_theta": 500000.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"num_hidden_layers": 1}, {"num_hidden_layers": 5}, {"rms_norm_eps": 0.1}, {"num_attention_heads": 6},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "attention_bias": True, "tie_word_embeddings": True},
    {"num_attention_heads": 8, "num_key_value_heads": 1} | llama3(8.0), {"num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 48}, {"rope_theta": 500000.0, "tie_word_embeddings": True, "mlp_bias": True},
    {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 72},
]  # fmt: skip


def prompts_of(vocab_size: int, lengths=PROMPT_LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def pair(raw: dict) -> tuple[LlamaForCausalLM, Llama]:
    """transformers' model with random weights, and ours with the same."""
    theirs = LlamaForCausalLM(LlamaConfig(**raw | {"rope_scaling": dict(raw.get("rope_scaling", {})) or None})).eval()
    randomize(theirs)
    ours = Llama(config_of(raw))
    ours.load_state_dict({name.removeprefix("model."): w for name, w in theirs.state_dict().items()})
    return theirs, ours


def their_answer(theirs: LlamaForCausalLM, prompt: list[int], tokens: int, **how) -> list[int]:
    ids = torch.tensor([prompt])
    how = {"do_sample": False, "eos_token_id": sorted(STOPS), "pad_token_id": 0} | how
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **how)
    answer = out[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] in STOPS else answer


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_greedy_answers_to_unequal_prompts_equal_transformers_token_for_token(shape):
    """C24, C55: five prompts, three at a time, so that two enter while others run; each goes through transformers
    alone."""
    raw = BASE | SHAPES[shape]
    theirs, ours = pair(raw)
    prompts = prompts_of(raw["vocab_size"])
    requests = [Request(prompt, GenerationSettings(max_new_tokens=40), STOPS) for prompt in prompts]
    answers = dict(generate(ours, requests, batch_size=3))
    assert sorted(answers) == list(range(len(prompts)))
    for number, prompt in enumerate(prompts):
        assert answers[number].ids == their_answer(theirs, prompt, 40)
