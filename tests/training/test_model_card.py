"""The model card of an export: true, complete, and with code that works."""

import json
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from chats import MESSAGES, TURN_END, write_base
from huggingface_hub import ModelCard
from runs import train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoints
import lora
from llama.boundary.command_line import parse
from llama.data.sources import PUBLIC_DATASETS
from llama.evaluation.settings import EvaluationSettings, GenerateSettings
from llama.training.model_card import _hub_name
from llama.training.settings import TrainingSettings

REVIEWS = [{"text": ["weak", "strong"][i % 2], "label": i % 2} for i in range(16)]
QUESTIONS = [{"question": f"{i} and 1?", "answer": f"{i + 1}"} for i in range(16)]
CHATS = [{"messages": MESSAGES}] * 16
TEXT = "Question | {question}\n```\n[[{answer}]]"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def run(ranks, base, tmp_path, tmp_path_factory):
    """run(rows, lora_rank=4, ...): a run on these rows; its folder."""

    def run(rows: list[dict], size: int = 1, **changes) -> Path:
        data, output = tmp_path / "secret place/rows.jsonl", tmp_path / "run"
        data.parent.mkdir()
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = dict(model=str(base), data=str(data), output=str(output), test_fraction=0.25, batch_size=4 // size,
                      max_length=128, max_steps=2, dtype="float32", learning_rate=1e-2)  # fmt: skip
        settings = TrainingSettings(**(common | changes)).with_recipe(size)
        ranks(size, train_here, tmp_path_factory.getbasetemp() / "cache", settings)
        return output

    return run


def execute(folder: Path, monkeypatch) -> dict:
    """What the card's code defines, and `printed`."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    defined, printed = {}, StringIO()
    monkeypatch.chdir(folder)
    with redirect_stdout(printed):
        exec(code, defined)
    return defined | {"printed": printed.getvalue()}


def commands(folder: Path) -> list[str]:
    """Those of the card, each with flags that its script has."""
    lines = re.search(r"```bash\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[1].splitlines()
    launcher, script, *flags = shlex.split(lines[-1])
    assert launcher == "python"
    parse({"generate.py": GenerateSettings, "evaluate.py": EvaluationSettings}[script], flags)
    return lines


@pytest.mark.slow
def test_after_messages_transformers_builds_the_prompt_and_stops_where_the_turn_ends(run, monkeypatch):
    """C12: the base ends in another token. The card's own code, with the question that was trained."""
    folder = run(CHATS, epochs=100.0, max_steps=30, lr_schedule="constant") / "model"
    card = folder / "README.md"
    card.write_text(card.read_text().replace('"content": "Hello"', f'"content": "{MESSAGES[0]["content"]}"'))
    found = execute(folder, monkeypatch)
    assert found["printed"] == "Hi there!\n"
    answer = found["output"][0, found["inputs"]["input_ids"].shape[1] :].tolist()
    assert answer[-1] == found["tokenizer"].eos_token_id == 2 and answer.count(2) == 1
    assert "<|im_start|>user\nHello<|im_end|>" in card.read_text()
    assert commands(folder) == ["python generate.py --model FOLDER --chat"]


@pytest.mark.parametrize("changes", [{}, pytest.param({"lora_rank": 2}, marks=pytest.mark.slow)])
def test_the_code_of_a_card_for_answer_words_gives_one_of_them(run, tmp_path, monkeypatch, changes):
    """With the words' first tokens, as the evaluation takes them."""
    (tmp_path / "words.txt").write_text("{text...}: [[{label=bad,good}]]")
    folder = run(REVIEWS, template=str(tmp_path / "words.txt"), **changes) / ("adapter" if changes else "model")
    assert execute(folder, monkeypatch)["printed"] in ("bad\n", "good\n")
    row, asking = commands(folder)[1:]
    assert row == """echo '{"text": "..."}' > rows.jsonl""" and asking.endswith("--predictions answers.jsonl")
    assert "--template template.txt" in asking and ("--adapter FOLDER" in asking) == bool(changes)


@pytest.mark.slow
def test_an_adapters_card_and_files_are_what_its_merge_needs(run, base, tmp_path, monkeypatch):
    """As PEFT's: the tokenizer's files, a card with library_name peft. Its code loads the base, too."""
    output = run(CHATS, lora_rank=2)
    folder = output / "adapter"
    found = execute(folder, monkeypatch)
    assert found["model"].peft_config and found["model"].generation_config.eos_token_id == [2, 0]
    assert AutoTokenizer.from_pretrained(folder).eos_token == TURN_END
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["llama", "lora"]
    merged = tmp_path / "merged"
    flags = {"--model": base, "--adapter": folder, "--output": merged}
    monkeypatch.setattr("sys.argv", ["lora.py", *(str(word) for pair in flags.items() for word in pair)])
    lora.main()
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.eos_token_id == [2, 0]
    theirs, ours = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(merged)
    assert (ours.chat_template, ours.eos_token) == (theirs.chat_template, theirs.eos_token)
    of_merge = ModelCard.load(merged / "README.md")
    assert of_merge.data.library_name == "transformers" and "`--lora_rank` | `2`" in of_merge.text
    assert card.text.partition("\n## Prompts\n")[2] == of_merge.text.partition("\n## Prompts\n")[2] != ""
    flags |= {"--adapter": output / "checkpoints/step-000002", "--output": tmp_path / "again"}
    monkeypatch.setattr("sys.argv", ["lora.py", *(str(word) for pair in flags.items() for word in pair)])
    lora.main()
    for path in merged.iterdir():  # a checkpoint says the same as the folder that the run has left
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path


@pytest.mark.slow
def test_a_checkpoints_export_has_the_same_files_as_the_runs(run, tmp_path, monkeypatch, capsys):
    """Byte by byte, the card too: run.json and the manifest hold all that they are made of."""
    output = run(CHATS)
    monkeypatch.setattr("sys.argv", ["checkpoints.py", "export", str(output), str(tmp_path / "export")])
    checkpoints.main()
    files = sorted(path.relative_to(output / "model") for path in (output / "model").rglob("*") if path.is_file())
    assert Path("README.md") in files and Path("chat_template.jinja") in files
    for path in files:
        assert (tmp_path / "export" / path).read_bytes() == (output / "model" / path).read_bytes(), path
    (output / "run.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["checkpoints.py", "export", str(output), str(tmp_path / "without")])
    checkpoints.main()
    assert "run.json: does not say how prompts were made" in capsys.readouterr().err
    assert not (tmp_path / "without/README.md").exists()


def test_a_card_says_data_settings_and_result_and_no_path_of_this_machine(run, tmp_path):
    """Template text that would end its block of code, and a file's name, cannot change the card's structure."""
    template = tmp_path / "my_template.txt"
    template.write_text(TEXT)
    output = run(QUESTIONS, template=str(template), learning_rate=0.003)
    text = (output / "model/README.md").read_text()
    summary = json.loads((output / "summary.json").read_text())
    for when in ("before", "after"):
        assert f"| {summary[when]['loss']:.4g} | {summary[when]['n']} |" in text
    assert "trained on rows.jsonl" in text and "`my_template.txt`" in text and f"````text\n{TEXT}\n````" in text
    assert "| `--learning_rate` | `0.003` |" in text and "| `--test_fraction` | `0.25` |" in text
    assert "secret place" not in text and str(output) not in text and "--seed" not in text
    assert "base_model" not in text and "datasets" not in text
    assert commands(output / "model") == [
        "# template.txt holds the text under Prompts",
        """echo '{"question": "..."}' > rows.jsonl""",
        "python generate.py --model FOLDER --template template.txt --prompts rows.jsonl",
    ]


def test_a_card_names_the_data_set_of_the_hub_only_where_it_was_trained_on():
    """The bundled sample of imdb is made up."""
    assert _hub_name({"data": "imdb", "bundled_sample": False}) == PUBLIC_DATASETS["imdb"].repo
    assert _hub_name({"data": "imdb", "bundled_sample": True}) is None
    assert _hub_name({"data": "dolly:open_qa", "bundled_sample": False}) == PUBLIC_DATASETS["dolly"].repo
