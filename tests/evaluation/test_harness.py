"""lm-eval over our models gives what it gives over transformers' models, by its own `hf` class."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an optional extra")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from reviews import CONFIG, plain_model  # noqa: E402
from sharded import this_process  # noqa: E402

from llama.boundary.errors import UserError  # noqa: E402
from llama.data.tokenizer_files import load_tokenizer  # noqa: E402
from llama.evaluation.harness import Harness, Tasks, find_tasks, settings_of  # noqa: E402
from llama.evaluation.settings import EvaluationSettings  # noqa: E402
from llama.model import Llama  # noqa: E402
from llama.storage.base import TINY_TOKENIZER, Base  # noqa: E402
from llama.storage.companions import Companions  # noqa: E402
from llama.storage.config_json import config_to_json  # noqa: E402
from llama.storage.pretrained import export_model  # noqa: E402

CONTEXTS = ["Once upon a time", "Lily and Tom ", "The dog  ", "", "One day,\n", "Ünïcode 🦙 was here. ", "a " * 700]
CONTINUATIONS = [" there was a girl", "played in the park.", "\n\nThe end", "big", " 12 apples", "é"]
TEXTS = ["Once upon a time there was a little girl named Lily.", "", "Tom\n\n  sat.", "The cat ran. " * 200]


def requests_of(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, found, i) for i, found in enumerate(arguments)]


def harness_on_rank(folder: Path, batch_size: int = 4, prefix: int | None = None) -> Harness:
    base = Base.pretrained(str(folder))
    model = Llama(base.config)
    base.load(model)
    model.eval().requires_grad_(False)
    tokenizer = base.tokenizer
    prefix_id = tokenizer.bos_id if prefix is None else prefix
    return Harness(model, tokenizer, this_process(), frozenset([tokenizer.eos_id]), prefix_id, batch_size)


def asked_on_rank(folder: Path, asked: dict[str, list[tuple]], batch_size: int = 4) -> dict[str, list]:
    harness = harness_on_rank(folder, batch_size)
    return {kind: getattr(harness, kind)(requests_of(kind, arguments)) for kind, arguments in asked.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model as an export with the bundled tokenizer: transformers opens it as it is."""
    folder = tmp_path_factory.mktemp("exports") / "model"
    config = replace(CONFIG, max_position_embeddings=512)
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    export_model(plain_model(config), folder, config_to_json(config) | tokens, Companions(tokenizer.files))
    return folder


@pytest.fixture(scope="module")
def peer(folder) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def test_likelihoods_equal_those_of_lm_evals_hf_model(ranks, folder, peer):
    """Spaces at the end of a context, an empty one, one that is too long, several continuations of each."""
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    starts = [(" ".join(["The dog saw"] * count), {"max_gen_toks": 1}) for count in range(1, 25)]
    likeliest = peer.generate_until(requests_of("generate_until", starts), disable_tqdm=True)
    pairs += [(start, text) for (start, _), text in zip(starts, likeliest, strict=True) if text]
    expected = peer.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    assert len({is_greedy for _, is_greedy in expected}) == 2
    (found,) = ranks(1, asked_on_rank, folder, {"loglikelihood": pairs})
    for pair, (ours, is_greedy), (theirs, is_their_greedy) in zip(pairs, found["loglikelihood"], expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4) and is_greedy == is_their_greedy, pair


def test_rolling_likelihoods_equal_those_of_lm_evals_hf_model(ranks, folder, peer):
    """Windows of 512 tokens, of which the last one overlaps; a text of no tokens."""
    texts = [(text,) for text in TEXTS]
    expected = peer.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts), disable_tqdm=True)
    (found,) = ranks(1, asked_on_rank, folder, {"loglikelihood_rolling": texts})
    assert found["loglikelihood_rolling"] == pytest.approx(expected, rel=1e-6, abs=1e-4)


GREEDY = {"until": ["\n\n", "Lily"], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0, "top_p": 0.9}
PROMPTS = [
    *((context, GREEDY) for context in CONTEXTS if context),
    ("Once upon a time", {"max_gen_toks": 7}),
    ("Tom", {"until": "."}),
    ("Tom", {"max_gen_toks": 30, "num_beams": 3, "until": ["zzz"]}),
]


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_texts_equal_those_of_lm_evals_hf_model(ranks, folder, peer, size):
    """Stop strings, also one text instead of a list, a length, beams; contexts that are cut to leave room."""
    expected = peer.generate_until(requests_of("generate_until", PROMPTS), disable_tqdm=True)
    assert len(set(expected)) > 5
    for found in ranks(size, asked_on_rank, folder, {"generate_until": PROMPTS}):
        assert found["generate_until"] == expected


def test_the_same_prompt_asked_again_draws_another_text_and_the_whole_the_same_again(ranks, folder):
    """Tasks that ask several times count how often one of the texts is right; equal texts would make it one."""
    draws = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20, "until": []}
    asked = {"generate_until": [("Once upon a time", draws)] * 4}
    ((first, again),) = (ranks(1, asked_on_rank, folder, asked) + ranks(1, asked_on_rank, folder, asked),)
    assert first == again and len(set(first["generate_until"])) == 4


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"do_sample": True}, "expected a temperature above 0"),
        ({"max_gen_toks": 512}, "expected fewer than the model's 512 positions"),
        ({"guidance_scale": 2}, "guidance_scale is 2, expected no field of this name"),
        ({"num_beams": 0}, "num_beams is 0, expected"),
    ],
)
def test_a_task_that_asks_for_what_is_not_to_be_had_is_refused_in_one_line(kwargs, message):
    with pytest.raises(UserError, match=message):
        settings_of(kwargs, seed=0, positions=512)


WRITING = {"until": ["."], "max_gen_toks": 12}
TASKS = ["tiny_choice", "tiny_writing", "tiny_text"]


def write_tasks(folder: Path, gold: str) -> Path:
    """A multiple choice, a text to write, and a perplexity, each of local files."""
    rows = {
        "choice": [{"q": f"The {a} said: ", "options": ["hello", "Lily", "blue sky"], "gold": i % 3}
                   for i, a in enumerate(["cat", "dog", "girl", "boy", "bird"])],
        "writing": [{"q": f"Once upon a time, a {a}", "gold": gold} for a in ("cat", "dog")],
        "text": [{"q": text} for text in TEXTS if text],
    }  # fmt: skip
    kinds = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "options", "doc_to_target": "gold",
                   "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "writing": {"output_type": "generate_until", "doc_to_target": "gold", "generation_kwargs": WRITING,
                    "metric_list": [{"metric": "exact_match"}]},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{q}}", "doc_to_text": "",
                 "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    }  # fmt: skip
    folder.mkdir()
    for name, about in kinds.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        task = {"task": f"tiny_{name}", "dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(file)}}, "doc_to_text": "{{q}}"} | about  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def tasks_on_rank(folder: Path, tasks: Path) -> dict:
    settings = EvaluationSettings(model=str(folder), harness=",".join(TASKS), harness_path=str(tasks), batch_size=4)
    harness = harness_on_rank(folder)
    tokenizer = harness.texts
    return Tasks(settings, tokenizer, harness.stop_ids, None).score(harness.model, this_process()).values


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_tasks_of_local_files_give_the_numbers_of_lm_evals_hf_model(ranks, folder, peer, tmp_path, monkeypatch, size):
    """All three kinds of request, through lm-eval's own evaluation, on any number of ranks."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = requests_of("generate_until", [("Once upon a time, a cat", WRITING)])
    tasks = write_tasks(tmp_path / "tasks", *peer.generate_until(asked, disable_tqdm=True))
    expected = lm_eval.simple_evaluate(peer, tasks=TASKS, task_manager=find_tasks(TASKS, str(tasks)))["results"]
    assert expected["tiny_writing"]["exact_match,none"] == 0.5
    found = ranks(size, tasks_on_rank, folder, tasks)[0]
    assert list(found["tasks"]) == list(expected) and found["n"] == 10
    for name, metrics in expected.items():
        for metric, value in metrics.items():
            assert found["tasks"][name][metric] == (
                pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            ), (name, metric)


@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_way_out():
    with pytest.raises(UserError, match="--harness: without --harness_path, lm-eval has not a task 'nope'"):
        find_tasks(["nope"], None)
