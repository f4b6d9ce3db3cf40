"""Texts that grow side by side, against transformers' `generate` and against themselves one by one."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from adapters import ODD as CONFIG
from sharded import build, this_process
from small_llama import BASE, config_of, llama3, randomize
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llama.boundary.errors import UserError
from llama.boundary.untrusted import read_json
from llama.generation import decode, kv_cache
from llama.generation.batch import Batch
from llama.generation.decode import generate
from llama.generation.request import Answer, Request
from llama.generation.settings import GenerationSettings
from llama.model import Llama
from llama.storage.base import config_from_json
from llama.storage.pretrained import initialize_weights, load_weights

SLOW = pytest.mark.slow
NAN = "the scores of token 1 of the answer are NaN or infinite: the model's weights are unusable"

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


def requests_of(prompts, tokens: int = 40, stops=STOPS, on_token=None, **settings) -> list[Request]:
    return [Request(prompt, GenerationSettings(max_new_tokens=tokens, **settings), stops, on_token)
            for prompt in prompts]


@pytest.fixture(scope="module")
def small() -> Llama:
    return pair(BASE)[1]


class Recorder:
    """`next_logits` of a model that keeps what it returned, and how many rows each step had."""

    def __init__(self, model: Llama):
        self.model = model
        self.rows: list[int] = []
        self.logits: list[torch.Tensor] = []

    def __call__(self, tokens, cache):
        self.rows.append(len(tokens))
        self.logits.append(self.model.logits(tokens, cache))
        return self.logits[-1]


FAST = [16]
SHAPES_FAST = [shape if shape in FAST else pytest.param(shape, marks=SLOW) for shape in range(len(SHAPES))]


@pytest.mark.parametrize("shape", SHAPES_FAST)
def test_greedy_answers_to_unequal_prompts_equal_transformers_token_for_token(shape):
    """C24, C55: five prompts, three at a time, so that two enter while others run; each goes through transformers
    alone."""
    raw = BASE | SHAPES[shape]
    theirs, ours = pair(raw)
    prompts = prompts_of(raw["vocab_size"])
    answers = dict(generate(ours, requests_of(prompts), batch_size=3))
    assert sorted(answers) == list(range(len(prompts)))
    for number, prompt in enumerate(prompts):
        assert answers[number].ids == their_answer(theirs, prompt, 40)


@pytest.mark.slow
@pytest.mark.parametrize("shape, batch_size", [(0, 1), (2, 3), (9, 5), (16, 3)])
def test_beams_penalties_and_greedy_texts_side_by_side_equal_transformers(shape, batch_size):
    """C24: texts with different settings, and with one row or several, enter and leave the same batch."""
    raw = BASE | SHAPES[shape]
    theirs, ours = pair(raw)
    prompts = prompts_of(raw["vocab_size"])
    settings = [
        {"num_beams": 4, "no_repeat_ngram_size": 3}, {}, {"repetition_penalty": 1.3},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}, {"num_beams": 2},
    ]  # fmt: skip
    requests = []
    for prompt, of_text in zip(prompts, settings, strict=True):
        ours_only = {"early_stopping": "true"} if "early_stopping" in of_text else {}
        requests += requests_of([prompt], 30, **of_text | ours_only)
    answers = dict(generate(ours, requests, batch_size))
    for number, (prompt, of_text) in enumerate(zip(prompts, settings, strict=True)):
        assert answers[number].ids == their_answer(theirs, prompt, 30, **of_text), of_text


def test_a_text_does_not_depend_on_its_companions(small):
    """C24: greedy, drawn and searched texts, alone and in batches that change all the time."""
    prompts = prompts_of(96, (5, 1, 40, 17, 3, 9))
    requests = [
        *requests_of(prompts[:2], 15), *requests_of(prompts[2:4], 12, temperature=1.3, top_k=20, seed=3),
        *requests_of(prompts[4:], 9, num_beams=3, temperature=0.9, top_p=0.9),
    ]  # fmt: skip
    alone = [next(generate(small, [request], 1))[1] for request in requests]
    for batch_size in (2, 6):
        assert dict(generate(small, requests, batch_size)) == dict(enumerate(alone))
    assert dict(generate(small, requests[::-1], 6)) == dict(enumerate(alone[::-1]))
    assert len({tuple(answer.ids) for answer in alone}) == 6


class FourRows(nn.Linear):
    """A linear whose sums do not depend on the number of rows: MKL multiplies four rows at a time, and a rest of one to
    three in another order."""

    def forward(self, x):
        padding = x.new_zeros(-len(x) % 4, x.shape[1])
        return super().forward(torch.cat([x, padding]))[: len(x)]


@pytest.mark.parametrize("shape", [2, *(pytest.param(shape, marks=SLOW) for shape in (9, 17, 20))])
def test_a_batch_equals_one_by_one_bit_for_bit_in_fp64(shape, monkeypatch):
    """C24, where the order of sums does not depend on the shape: products of 4 rows, and of 96 columns (MKL takes 24 at
    a time, PyTorch's vectors 8), and each prompt read alone. No number of one text comes from another, then."""
    monkeypatch.setattr(decode, "STREAM", 1)
    monkeypatch.setattr(kv_cache, "VIEW_BLOCK", 96)
    monkeypatch.setattr(kv_cache, "BLOCK", 288)
    raw = BASE | SHAPES[shape] | {"max_position_embeddings": 400}
    model = pair(raw)[1].double()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FourRows
    requests = requests_of(prompts_of(raw["vocab_size"], (5, 1, 40, 17, 3, 270)), 30, frozenset())

    def logits_by_text(batch_size: int) -> dict[int, list[torch.Tensor]]:
        found: dict[int, list[torch.Tensor]] = {number: [] for number in range(len(requests))}

        class Watched(Batch):
            def grow(self, texts, logits):
                for text, row in zip(texts, logits, strict=True):
                    found[text.number].append(row)
                return super().grow(texts, logits)

        assert len(dict(generate(Watched(model), requests, batch_size))) == len(requests)
        return found

    alone = logits_by_text(1)
    together = logits_by_text(4)
    for number in alone:
        assert torch.equal(torch.stack(alone[number]), torch.stack(together[number]))


def test_a_new_prompt_changes_no_bit_of_texts_that_grow_already(small):
    """Continuous batching: what the others computed is what they compute without it."""
    requests = requests_of(prompts_of(96, (5, 9, 4, 30, 8)), 20, frozenset())
    steps = []
    for entering in ([], [(4, requests[4])]):
        recorder = Recorder(small)
        batch = Batch(small, recorder)
        batch.add(list(enumerate(requests[:4])))
        for step in range(8):
            if step == 3 and entering:
                batch.add(entering)
            batch.step()
        steps.append(recorder.logits)
    assert [len(logits) for logits in steps[1]] == [4, 4, 4, 5, 5, 5, 5, 5]
    for without, beside in zip(*steps, strict=True):
        assert torch.equal(without, beside[:4])


def test_texts_leave_as_they_end_and_prompts_take_their_place_at_once(small):
    requests = []
    for tokens, prompt in zip((4, 9, 2, 6), prompts_of(96, (3, 4, 5, 6)), strict=True):
        requests += requests_of([prompt], tokens, frozenset())
    recorder = Recorder(small)
    order = [number for number, _ in generate(small, requests, 2, next_logits=recorder)]
    # A prompt's forward gives the first token. Text 2 enters after three steps and leaves after one, and so on.
    assert order == [0, 2, 1, 3] and recorder.rows == [2] * 3 + [2] + [2] * 4 + [1]


def test_many_prompts_are_read_in_streams_of_bounded_length(small, monkeypatch):
    monkeypatch.setattr(decode, "STREAM", 50)
    streams = []
    compute = Llama.logits

    def logits(self, tokens, context, rows=None):
        streams.append(len(tokens))
        return compute(self, tokens, context, rows)

    monkeypatch.setattr(Llama, "logits", logits)
    requests = requests_of(prompts_of(96, (20, 20, 20, 70, 1, 1)), 1)
    assert len(list(generate(small, requests, 100))) == 6
    assert streams == [40, 20, 70, 2]


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_end_where_they_must(small, beams):
    """The limit of tokens, the model's positions, a stop id, and `on_token`."""
    prompt = prompts_of(96, (5,))[0]

    def answer(prompt, tokens=10, stops=frozenset(), on_token=None):
        ((_, answer),) = generate(small, requests_of([prompt], tokens, stops, on_token, num_beams=beams), 1)
        return answer

    free = answer(prompt)
    assert len(free.ids) == 10 and free.reason == "length"
    assert answer(prompt, 0) == Answer([], "length")
    full = prompts_of(96, (256,))[0]
    assert answer(full) == Answer([], "context")
    assert len(answer(full[:250]).ids) == 6 and answer(full[:250]).reason == "context"
    shown: list[int] = []
    assert answer(prompt, on_token=lambda id: shown.append(id)) == free and shown == free.ids
    assert answer(prompt, on_token=lambda id: id == free.ids[3]) == Answer(
        free.ids[: free.ids.index(free.ids[3]) + 1], "stop_string")
    if beams == 1:
        stop = free.ids[4]
        assert answer(prompt, stops=frozenset([stop])) == Answer(free.ids[: free.ids.index(stop)], "stop")


@pytest.mark.parametrize("prompt, message", [
    ([], "prompt 2: 0 tokens, expected 1 to 256, the model's positions"),
    ([1] * 257, "prompt 2: 257 tokens, expected 1 to 256, the model's positions"),
], ids=["empty", "long"])  # fmt: skip
def test_a_prompt_that_the_model_cannot_read_is_named_before_any_is_read(small, prompt, message, monkeypatch):
    monkeypatch.setattr(Llama, "logits", None)
    with pytest.raises(UserError) as error:
        list(generate(small, requests_of([[1], prompt]), 2))
    assert str(error.value) == message


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.2}, {"temperature": 1.0}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("batch_size, found", [(1, "prompt 2"), (3, "prompt 1, prompt 2, prompt 3")])
def test_scores_that_are_no_numbers_name_prompts_and_token(settings, batch_size, found):
    """In one stream NaN reaches all prompts: masked or not, 0 times NaN is NaN."""
    model = pair(BASE)[1]
    with torch.no_grad():
        model.embed_tokens.weight[5] = torch.nan
    requests = requests_of([[1, 2], [3, 5], [4]], 5, **settings)
    with pytest.raises(UserError) as error:
        list(generate(model, requests, batch_size))
    if settings.get("num_beams") and batch_size == 3:  # the first text's beams notice it
        found = "prompt 1"
    assert str(error.value) == f"{found}: {NAN}"


def test_a_chat_reads_only_what_is_new(small, monkeypatch):
    """The answers are those of a batch that remembers nothing; a turn that starts otherwise is read as a whole."""
    streams = []
    compute = Llama.logits

    def logits(self, tokens, context, rows=None):
        if rows is not None:
            streams.append(len(tokens))
        return compute(self, tokens, context, rows)

    monkeypatch.setattr(Llama, "logits", logits)
    batch = Batch(small, remember=True)
    text = prompts_of(96, (30,))[0]
    expected_streams = [30]
    for turn in range(3):
        (request,) = requests_of([text], 7, frozenset())
        ((_, answer),) = generate(batch, [request], 1)
        assert streams == expected_streams
        assert generate_alone(small, request) == answer
        streams.pop()
        text = text + answer.ids + prompts_of(96, (4,), seed=turn)[0]
        expected_streams.append(5)  # the answer's last token was never read
    (request,) = requests_of([text[:33] + [1] + text[34:]], 7, frozenset())
    assert dict(generate(batch, [request], 1)) == {0: generate_alone(small, request)}
    assert streams[-2] == len(text) - 33


def test_a_batch_that_was_interrupted_starts_afresh(small):
    def interrupt(id):
        raise KeyboardInterrupt

    batch = Batch(small, remember=True)
    (request,) = requests_of(prompts_of(96, (30,)))
    expected = generate_alone(small, request)
    with pytest.raises(KeyboardInterrupt):
        list(generate(batch, requests_of([request.prompt], on_token=interrupt), 1))
    assert dict(generate(batch, [request], 1)) == {0: expected}


def generate_alone(model: Llama, request: Request) -> Answer:
    ((_, answer),) = generate(model, [request], 1)
    return answer


# Several ranks


def on_rank(bad_rank: int | None) -> tuple[dict, str]:
    """What a rank of a sharded model answers: rank 0 has one short text, rank 1 three long ones."""
    process = this_process()
    model = build(CONFIG, process, change=lambda model: model.requires_grad_(False))
    initialize_weights(model, seed=0)
    lengths = [(3,), (5, 9, 30)][process.rank]
    requests = requests_of(prompts_of(97, lengths), 2 + 20 * process.rank, frozenset())
    if process.rank == bad_rank:
        requests = [replace(requests[0], prompt=[])]

    def any_rank(live: bool) -> bool:
        working = torch.tensor(int(live))
        dist.all_reduce(working)
        return bool(working)

    answers = {}
    try:
        for number, answer in generate(model, requests, 2, any_rank):
            answers[number] = answer
    except UserError as error:
        return answers, str(error)
    return answers, ""


@pytest.mark.parametrize("bad_rank", [None, pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW)])
@pytest.mark.slow
def test_sharded_ranks_end_together_when_their_texts_stop_at_different_lengths(ranks, bad_rank):
    """C45: also when one rank has a prompt that cannot be read. Texts are those of the whole model on one process."""
    model = Llama(CONFIG)
    initialize_weights(model, seed=0)
    results = ranks(2, on_rank, bad_rank, timeout=30)
    for rank, (answers, error) in enumerate(results):
        requests = requests_of(prompts_of(97, [(3,), (5, 9, 30)][rank]), 2 + 20 * rank, frozenset())
        expected = {} if rank == bad_rank else dict(generate(model, requests, 2))
        assert answers == expected and bool(error) == (rank == bad_rank)


# Real models


@pytest.mark.slow
def test_stories260k_writes_the_story_that_transformers_wrote(assets):
    folder = assets / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    model = Llama(config_from_json(read_json(folder, "config.json"), folder))
    load_weights(model, folder)
    ids = reference["greedy_from_bos_ids"]
    ((_, answer),) = generate(model, requests_of([ids[:1]], 200, frozenset()), 1)
    assert answer.ids == ids[1:201]


@pytest.mark.slow
def test_smollm2_writes_what_transformers_writes(smollm2):
    """Three prompts side by side in fp32; the one that ends first leaves the others alone."""
    model = Llama(config_from_json(read_json(smollm2, "config.json"), smollm2)).requires_grad_(False)
    load_weights(model, smollm2)
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    texts = ["The capital of France is", "def factorial(n):", "Once upon a time there was a fox who"]
    prompts = [tokenizer.encode(text).ids for text in texts]
    answers = dict(generate(model, requests_of(prompts, 24, frozenset([2])), 3))
    theirs = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        how = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 2, "max_new_tokens": 24}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
        assert answers[number].ids == [id for id in expected if id != 2]
