"""--sample_prompts: what the model answers to held-out prompts, before training and after it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chats import MESSAGES, trained_prompt, write_base
from runs import assert_equal_runs, lines_of, replaced, summary_of, train_here, write_reviews
from sharded import build, this_process

from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.examples import encode_file
from llama.data.templates import Template
from llama.storage.base import TINY, Base
from llama.training import samples
from llama.training.samples import Samples, _shortened, _start_of_answer
from llama.training.settings import TrainingSettings

STEPS = 4
QUESTIONS = Template("questions", "Q: {question}\nA:[[{answer}]]")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews"), 16)


@pytest.fixture(scope="module")
def trained(ranks, data, cache, tmp_path_factory):
    """trained(ranks, sample_prompts=3, ...): the folder of a run of 4 steps, made once for each choice."""
    made: dict = {}

    def trained(size: int, die_in_step: int | None = None, **changes) -> Path:
        key = (size, *changes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            common = dict(data=str(data), template="imdb", output=str(made[key]), max_steps=STEPS, save_every=2,
                          batch_size=4 // size, dtype="float32", eval_every=3)  # fmt: skip
            settings = TrainingSettings(**(common | changes)).with_recipe(size)
            if die_in_step:
                ranks(size, train_here, cache, settings, die_in_step)
                settings = TrainingSettings(**(common | changes), resume="newest").with_recipe(size)
            ranks(size, train_here, cache, settings)
        return made[key]

    return trained


def samples_of(folder: Path) -> list[dict]:
    return summary_of(folder)["samples"]


def write_questions(folder: Path, count: int = 5) -> Path:
    """Prompts of unequal length."""
    path = folder / "rows.jsonl"
    rows = [{"question": " ".join(["why"] * (1 + 7 * i % 12)), "answer": f"{i} of them"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_is_bit_for_bit_the_same_with_and_without_samples(trained, size):
    """C48: no random number, mode or gathered copy of the weights is left changed."""
    assert_equal_runs(trained(size, sample_prompts=3), trained(size, sample_prompts=0), STEPS)
    assert samples_of(trained(size, sample_prompts=0)) == []
    assert all("samples" not in line for line in lines_of(trained(size, sample_prompts=0)))


def test_a_summary_holds_prompt_right_answer_and_both_answers(trained, data):
    """The answer to an IMDB prompt is a label word, once the model has learned that much."""
    found = samples_of(trained(1, sample_prompts=3))
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    assert len(found) == 3
    for sample in found:
        row = rows[sample["row"] - 1]
        assert row["text"] in sample["prompt"] and sample["prompt"].endswith("#### Answer:")
        assert sample["expected"] == ["negative", "positive"][row["label"]]
        assert set(sample) == {"row", "prompt", "expected", "before", "after"}
        assert isinstance(sample["before"], str) and isinstance(sample["after"], str)


@pytest.mark.slow
def test_a_resumed_run_shows_the_answers_before_its_first_start(trained):
    """C48: they are in metrics.jsonl, beside the metrics before training."""
    whole, resumed = trained(2, sample_prompts=3), trained(2, die_in_step=4, sample_prompts=3, keep_checkpoints=3)
    assert samples_of(resumed) == samples_of(whole) and samples_of(whole)[0]["before"] is not None
    assert lines_of(resumed)[0]["samples"] == [sample | {"after": None} for sample in samples_of(whole)]


@pytest.mark.slow
def test_without_held_out_examples_there_are_no_samples_and_no_error(trained, data):
    assert samples_of(trained(1, data=str(data / "train.jsonl"), test_fraction=0.0)) == []


# What is asked


@pytest.fixture
def base(tmp_path) -> Base:
    return Base.pretrained(str(write_base(tmp_path / "base")))


def test_prompts_are_those_of_training_and_end_where_the_last_answer_begins(base, cache, tmp_path):
    """C12, C13: also of a conversation with several answers, whose end of turn ends an answer."""
    turns = [*MESSAGES, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you!"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    chat = Chat("chatml")
    samples = Samples(encode_file(path, chat, base.tokenizer, 200), chat, base, 2, None)
    (request,) = samples.requests  # fewer are held out than were asked for
    assert request.prompt == trained_prompt(chat, base.tokenizer, turns)
    assert request.stop_ids == {0, 2} and request.settings.max_new_tokens == 64 and not request.settings.draws
    assert samples.found[0]["expected"] == "See you!"


def test_answer_words_limit_the_answer_to_the_longest_of_them(base, cache, tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text('{"text": "x", "label": 1}\n')
    words = Template("words", "{text...}[[ {label=no,perhaps}]]")
    samples = Samples(encode_file(path, words, base.tokenizer, 200), words, base, 1, None)
    assert samples.requests[0].settings.max_new_tokens == len(" perhaps")  # a token is a byte
    assert samples.found[0]["expected"] == "perhaps"


@pytest.mark.parametrize("labels, first", [
    ([0, 0, 1, 1], 2), ([0, 1, 1, 0, 0, 1, 0], 5), ([1, 1, 1], 1), ([0, 1, 1, 1], 1), ([0, 0, 1], 2), ([1], 1),
])  # fmt: skip
def test_the_last_run_of_labels_is_the_answer_and_one_token_at_least_the_prompt(labels, first):
    """A text that is learned as a whole is continued from its first token."""
    assert _start_of_answer([bool(label) for label in labels]) == first


def test_a_long_text_is_shown_by_its_ends_and_cannot_control_the_terminal():
    assert _shortened("a\n b\x1b[2J\u200b") == "a b\\x1b[2J\\u200b"
    shown = _shortened("start " + 500 * "x " + "end")
    assert shown.startswith("start x") and shown.endswith("x end") and " ... " in shown and len(shown) < 110


# Asking on several ranks


def asked(
    folder: Path, path: Path, count: int, broken: bool = False, tensor_parallel: int = 1
) -> tuple[list[dict], bool]:
    """What a model with random weights answers in this test worker, and its mode afterwards."""
    base = Base.pretrained(str(folder))
    process = this_process("full", tensor_parallel)
    model = build(base.config, process)
    base.load(model)
    if broken:
        with torch.no_grad():
            model.norm.weight.fill_(torch.nan)
    samples = Samples(encode_file(path, QUESTIONS, base.tokenizer, 200), QUESTIONS, base, count, None)
    model.train()
    samples.answer(model, process, "before")
    return samples.found, model.training


SIZES = [pytest.param(1, 3, marks=pytest.mark.slow), (2, 1), pytest.param(4, 5, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size, count", SIZES)
def test_ranks_share_the_prompts_and_transformers_gives_the_same_answers(ranks, tmp_path, cache, size, count):
    """C45: ranks with fewer prompts or shorter answers go on until all are done, and all know every answer."""
    from transformers import AutoModelForCausalLM

    folder, path = write_base(tmp_path / "base"), write_questions(tmp_path)
    results = ranks(size, asked, folder, path, count)
    assert all(result == results[0] for result in results) and len(results[0][0]) == count and results[0][1]
    base, theirs = Base.pretrained(str(folder)), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for sample in results[0][0]:
        ids = torch.tensor([base.tokenizer.encode(sample["prompt"])])
        with torch.no_grad():
            output = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=[0], pad_token_id=0)
        new = output[0, ids.shape[1] :].tolist()
        cut = "" if new[-1] == 0 else " ..."
        assert sample["before"] == base.tokenizer.decode(new, starts_text=False).strip() + cut


def test_a_slow_model_is_not_waited_for(ranks, tmp_path, cache):
    """Each answer ends with the first token after the time that is given, and the last ones say that they are cut."""
    folder, path = write_base(tmp_path / "base"), write_questions(tmp_path)
    for found in ranks(2, asked_in_a_hurry, folder, path):
        assert len(found) == 3 and all(sample["before"].endswith(" ...") for sample in found)
        assert max(len(sample["before"]) for sample in found) < 10  # a token is a byte


def asked_in_a_hurry(folder: Path, path: Path) -> list[dict]:
    with replaced(samples, LONGEST_WAIT=-1.0):
        return asked(folder, path, 3)[0]


def asked_by_clocks_that_differ(folder: Path, path: Path) -> list[dict]:
    """Rank 1 of the tensor group is late from the first token on, rank 0 never."""
    late = torch.distributed.get_rank() == 1
    with replaced(samples, LONGEST_WAIT=-1.0 if late else 1e6):
        return asked(folder, path, 3, tensor_parallel=2)[0]


@pytest.mark.slow
def test_a_tensor_group_ends_an_answer_together_although_each_rank_has_its_own_clock(ranks, tmp_path, cache):
    """C45: a rank that went on alone would wait forever for the others' part of the next token."""
    folder, path = write_base(tmp_path / "base"), write_questions(tmp_path)
    first, second = ranks(2, asked_by_clocks_that_differ, folder, path, timeout=60)
    assert first == second and all(sample["before"].endswith(" ...") for sample in first)
    assert max(len(sample["before"]) for sample in first) < 10


def refused(folder: Path, path: Path) -> str:
    with pytest.raises(UserError) as error:
        asked(folder, path, 1, broken=True)
    return str(error.value)


def test_scores_that_are_no_numbers_are_one_line_on_every_rank(ranks, tmp_path, cache):
    """C4, C45: also on a rank that had no prompt."""
    folder, path = write_base(tmp_path / "base"), write_questions(tmp_path)
    for told in ranks(2, refused, folder, path):
        assert told.startswith("--sample_prompts: prompt 1") and "NaN" in told and "\n" not in told


def test_ids_that_the_tokenizer_does_not_have_are_no_text():
    """A model may have rows for more tokens than its tokenizer: an untrained one may choose them."""
    samples = Samples(None, QUESTIONS, Base.tiny(), 2, None)
    assert samples.found == samples.lines() == [] and samples._text([TINY.vocab_size + 7]) == ""
    model = SimpleNamespace()  # nobody is asked
    samples.answer(model, SimpleNamespace(), "before")


def test_the_screen_shows_what_is_known(base):
    samples = Samples(None, QUESTIONS, base, 2, None)
    samples.found = [{"row": 7, "prompt": "Q: why\nA:", "expected": "so", "before": None, "after": ""}]
    assert samples.lines() == ["held-out row 7: Q: why A:", "  expected: so", "  after:    (nothing)"]
    samples.recall([{"row": 7, "prompt": "Q: why\nA:", "before": "b"}, {"row": 8, "prompt": "", "before": "c"}])
    assert samples.lines()[2] == "  before:   b"
    samples.recall([{"row": 7, "prompt": "another file's row", "before": "b"}])
    assert samples.found[0]["before"] is None
