"""data.py: what is held out, which template a data set gets, and what the command shows."""

import json
import random
import re
import shutil
import statistics
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from samples import bundled_with, loaded, write_rows

import data
import llama.data.sources
from data import find_template, hold_out, load_data
from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.examples import BadRows, encode_file
from llama.data.sources import ASSETS, BUNDLED_SAMPLE, HELD_OUT, PUBLIC_DATASETS, TINY_TOKENIZER, DataSettings, Source
from llama.data.templates import TEMPLATES, Template
from llama.data.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """A cache and a working folder of its own for each test, and no hub."""
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(llama.data.sources, "download_dataset", unreachable)


def unreachable(*_):
    raise UserError("the hub, where it is ORG/NAME, cannot be reached")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return loaded(ASSETS / "tiny")


def reviews(count: int, seed: int = 0) -> list[dict]:
    """Reviews of very different lengths, a third of them positive."""
    generator = random.Random(seed)
    words = "a slow dull weak plot and bright quick strong films".split()
    texts = [" ".join(generator.choices(words, k=generator.randrange(1, 40))) for _ in range(count)]
    return [{"text": f"{text} {i}", "label": int(i % 3 == 0)} for i, text in enumerate(texts)]


def questions(count: int) -> list[dict]:
    return [{"instruction": f"Say {i}.", "input": "word " * (i % 5), "output": f"It is {i}."} for i in range(count)]


def texts_of(encoded, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(encoded[i][0]) for i in range(len(encoded))]


# What is held out


@pytest.mark.parametrize("examples", [2, 3, 19, 20, 1000, 15_011])
@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 0.9])
def test_what_is_held_out_and_what_is_left_are_disjoint_and_complete(examples, fraction):
    """C51: in the order of the file; at least one example is tested on, and one trained on."""
    train, test = (part.tolist() for part in hold_out(examples, fraction))
    assert sorted(train + test) == list(range(examples)) and train == sorted(train) and test == sorted(test)
    assert len(test) == min(max(1, round(examples * fraction)), examples - 1)
    assert [part.tolist() for part in hold_out(examples, fraction)] == [train, test]


def test_what_is_held_out_is_a_random_choice_that_no_global_seed_changes():
    """Files come sorted: half of the choice, more or less, is of either half; and it never changes between versions."""
    np.random.seed(1)
    _, test = hold_out(10_000, 0.1)
    assert 400 < (test < 5000).sum() < 600
    np.random.seed(2)
    assert np.array_equal(hold_out(10_000, 0.1)[1], test)
    assert hold_out(20, 0.2)[1].tolist() == [2, 4, 6, 19]


@pytest.mark.parametrize("examples, fraction", [(1, 0.5), (1, 0.05), (10, 0.0), (1, 0.0)])
def test_nothing_is_held_out_of_a_single_example_or_without_a_fraction(examples, fraction):
    """R19: there is always something to train on."""
    train, test = hold_out(examples, fraction)
    assert train.tolist() == list(range(examples)) and len(test) == 0


def load(tokenizer: Tokenizer, splits=("train", "test"), **flags) -> data.DataSet:
    return load_data(DataSettings(**flags), tokenizer, splits=splits)


def test_a_folder_with_both_files_is_loaded_as_it_is(tmp_path, tokenizer):
    """Nothing is held out of the train file; of two parts only those asked for are encoded."""
    for split, seed in (("train", 0), ("test", 1)):
        write_rows(tmp_path / "set" / f"{split}.jsonl", reviews(30 - 10 * seed, seed))
    both = load(tokenizer, data=str(tmp_path / "set"), template="imdb")
    assert (len(both.train), len(both.test), both.held_out) == (30, 20, None) and both.template is TEMPLATES["imdb"]
    assert set(texts_of(both.train, tokenizer)).isdisjoint(texts_of(both.test, tokenizer))
    only = load(tokenizer, splits=("test",), data=str(tmp_path / "set"), template="imdb", test_fraction=0.0)
    assert only.train is None and only.test.fingerprint == both.test.fingerprint


def test_without_a_test_file_part_of_the_rows_is_held_out_and_it_is_told_how(tmp_path, tokenizer):
    """C51, R7: the same rows whenever asked, one in twenty or as many as wished, and all rows exactly once."""
    path = write_rows(tmp_path / "rows.jsonl", reviews(60))
    everything = texts_of(encode_file(path, TEMPLATES["imdb"], tokenizer, 512), tokenizer)
    for flags, fraction, count in (({}, HELD_OUT, 3), ({"test_fraction": 0.25}, 0.25, 15)):
        first, second = (load(tokenizer, data=str(path), template="imdb", **flags) for _ in range(2))
        assert first.held_out == {"fraction": fraction, "seed": 0, "examples": count}
        assert (len(first.train), len(first.test)) == (60 - count, count)
        rows = first.train.rows.tolist() + first.test.rows.tolist()
        texts = texts_of(first.train, tokenizer) + texts_of(first.test, tokenizer)
        assert [everything[row - 1] for row in rows] == texts and sorted(rows) == list(range(1, 61))
        assert second.train.fingerprint == first.train.fingerprint != first.test.fingerprint == second.test.fingerprint
    whole = load(tokenizer, data=str(path), template="imdb", test_fraction=0.0)
    assert (len(whole.train), whole.test, whole.held_out) == (60, None, None)


def test_a_test_fraction_is_refused_where_there_is_a_test_file(tmp_path, tokenizer):
    """R7: or the train file's rows would be tested on, beside a file made for that."""
    for split in ("train", "test"):
        write_rows(tmp_path / "set" / f"{split}.jsonl", reviews(30))
    with pytest.raises(UserError, match=r"^--test_fraction 0.1: .*without a test file, found .*test.jsonl$"):
        load(tokenizer, data=str(tmp_path / "set"), template="imdb", test_fraction=0.1)


def test_settings_of_the_data_reach_the_encoder(tmp_path, tokenizer):
    """Length, side, category and leaving out bad rows, each as if asked of the encoder itself."""
    rows = [row | {"category": "ab"[i % 2]} for i, row in enumerate(reviews(40))]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "", "label": 1, "category": "a"}])
    with pytest.raises(BadRows):
        load(tokenizer, data="imdb:a", data_dir=str(path))
    found = load(tokenizer, data="imdb:a", data_dir=str(path), max_length=90, truncate_side="left", test_fraction=0.0,
                   skip_bad_rows=True).train
    expected = encode_file(path, TEMPLATES["imdb"], tokenizer, 90, "left", "a", True)
    assert len(found) == 20 and found.bad_row_count == 1 and found.fingerprint == expected.fingerprint
    assert found.rows.tolist() == list(range(1, 41, 2)) and found.was_cut.any() and found.lengths.max() <= 90


# Which template


ROWS = {
    "imdb": {"text": "fine", "label": 1},
    "alpaca": {"instruction": "Say it.", "input": "", "output": "It."},
    "dolly": {"instruction": "Say it.", "context": "", "response": "It.", "category": "open_qa"},
    "quotes": {"quote": "It is.", "author": "Me", "tags": ["a"]},
    "grammar": {"sentence": "It are.", "corrections": ["It is."]},
    "gsm8k": {"question": "1 + 1?", "answer": "2"},
    "prompt_completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "input_output": {"input": "1 + 1?", "output": "2"},
    "text": {"text": "Call me Ishmael."},
    "chat": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
}


@pytest.mark.parametrize("name", [name for name in ROWS if name != "imdb"])
def test_a_file_of_a_known_kind_finds_its_template_by_its_fields(tmp_path, tokenizer, name):
    """Also from compressed rows and Parquet, and where the first lines are bad."""
    rows = [ROWS[name]] * 3
    lines = "not JSON\n[]\n" + "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for file in ("rows.jsonl", "rows.parquet"):
        found = find_template(None, Source("mine", {"train": (tmp_path / file,)}), tokenizer)
        assert found is TEMPLATES[name] if name != "chat" else found.name == "llama2"
    if name in PUBLIC_DATASETS and name != "chat":
        assert find_template(None, Source(name, {"train": (tmp_path / "nobody looks here",)}), tokenizer) is found
    encoded = encode_file(tmp_path / "rows.parquet", found, tokenizer, 512)
    assert len(encoded) == 3 and encoded.label_counts.min() > 0


@pytest.mark.parametrize("row, told", [
    ({"text": "WIN a prize", "label": 1}, "are those of no known template"),
    ({"text": "x", "id": 1}, "are those of no known template"),
    ({"context": "x", "question": "1?", "answer": "2"}, "fit gsm8k, which does not use context"),
    ({"instruction": "a", "output": "b", "system": "s", "history": [["c", "d"]]}, "does not use history and system"),
    ({"instruction": "a", "output": "b", "response": "c"}, "fit alpaca and dolly"),
    ({"review": "x", "stars": 3}, "are those of no known template"),
    ({}, "are those of no known template"),
    ({"prompt": "x", "\x1b[31m\nred": 3}, "are those of no known template"),
])  # fmt: skip
def test_fields_that_fit_no_template_or_more_than_one_are_named(tmp_path, tokenizer, row, told):
    """A4, D20, R15: with the flag that decides and what it may be, and a template to begin with, which is good."""
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        find_template(None, Source("mine", {"test": (path,)}), tokenizer)
    line, *template = error.value.lines
    assert line.startswith(f"{path}: the fields {{") and told in line and "--template (imdb, " in line
    assert all(repr(name) in line for name in row) and line.isprintable()
    if template:
        Template("my.txt", "\n".join(template)).render(row, "here")
    assert bool(template) == bool(row)
    assert find_template("quotes", Source("mine", {"test": (path,)}), tokenizer) is TEMPLATES["quotes"]


@pytest.mark.parametrize("row", [
    {f"field {number}": "x" for number in range(50_000)},
    {"text": "x", "label": True},
    {"title": "x", "text": "y", "label": 0.5},
    {"question": "x", "chosen": [{"role": "assistant", "content": "y"}]},
], ids=["many fields", "true or false", "a fraction", "messages"])  # fmt: skip
def test_no_template_is_suggested_that_would_fill_the_screen_or_forget_the_answer(tmp_path, tokenizer, row):
    """A4, R15: {"text": ..., "label": true} would be learned as text alone, without a word on its label."""
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match="are those of no known template.* or a file of your own") as error:
        find_template(None, Source("mine", {"test": (path,)}), tokenizer)
    assert len(error.value.lines) == 1 and len(error.value.lines[0]) < 1000


def test_a_prompt_and_completion_of_messages_are_a_chat(tmp_path, tokenizer):
    """TRL's rows of two lists; two texts under the same names are none."""
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    path = write_rows(tmp_path / "rows.jsonl", [row] * 3)
    assert find_template(None, Source("mine", {"test": (path,)}), tokenizer).name == "llama2"


def test_a_file_without_any_row_has_no_template_to_guess(tmp_path, tokenizer):
    """R15, R19: it is refused for what is wrong with it, not for its fields; with one named, just so."""
    path = tmp_path / "rows.jsonl"
    lines = "\n".join(map(json.dumps, reviews(3)))
    for content, told in ((b"", "rows.jsonl: no rows"), (b"text,label\nfine,1\n", "rows.jsonl:1: not valid JSON"),
                          (lines.encode("utf-16"), "rows.jsonl:1: byte 0 is not UTF-8")):
        path.write_bytes(content)
        for template in ("imdb", None):
            with pytest.raises(UserError, match=told):
                load(tokenizer, data=str(path), template=template)


def test_a_named_template_goes_before_what_the_data_would_have(tmp_path, tokenizer):
    """The named ones, chat as the tokenizer has it, each layout, and a file of one's own."""
    source = Source("imdb", {"train": (tmp_path / "nobody looks here",)})
    for name, template in TEMPLATES.items():
        assert find_template(name, source, tokenizer) is template
    for name, layout in (("chat", "llama2"), ("llama2", "llama2"), ("prompter", "prompter"), ("chatml", "chatml")):
        found = find_template(name, source, tokenizer)
        assert isinstance(found, Chat) and found.name == layout
    for start in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "my.txt").write_bytes(start + "Té: {text...}\n[[{label=no,yes}]]\n".encode())
        found = find_template(str(tmp_path / "my.txt"), source, tokenizer)
        assert found.answers == ("no", "yes") and found.source.startswith("Té: {")


@pytest.mark.slow
def test_the_layout_of_a_chat_is_that_of_the_tokenizer(assets, tmp_path):
    """C19: chatml, where it has those control tokens."""
    source = Source("chat", {"train": (write_rows(tmp_path / "rows.jsonl", [ROWS["chat"]]),)})
    names = {"smollm2-135m-instruct-q4": "chatml", "llama3-tokenizer": "llama3", "llama2-tokenizer": "llama2"}
    for folder, layout in names.items():
        assert find_template(None, source, loaded(assets / folder)).name == layout


@pytest.mark.parametrize("content, told", [
    (None, "no such file, nor one of imdb, alpaca, "),
    (b"Caf\xe9: {text}\n[[{label=a,b}]]", "byte 3 is not UTF-8"),
    (b"", "no [[answer]] with a {field} in it at its end"),
    (b"{text}\n[[{label=a,b}", "no [[answer]] with a {field} in it at its end"),
    (b"one\n{te}xt}[[{a}]]", "my.txt:2: } without its other half"),
])  # fmt: skip
def test_a_template_file_that_cannot_be_used_is_an_error_of_one_line(tmp_path, tokenizer, monkeypatch, content, told):
    """R15, R16: not there, not UTF-8, not well formed."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("my.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        find_template("my.txt", Source("imdb", {}), tokenizer)
    (line,) = error.value.lines
    assert line.startswith("--template my.txt") and told in line


@pytest.mark.parametrize("given, name", [
    ("imdb", "imdb"), ("dolly:open_qa", "dolly-open_qa"), ("/x/y/rows.jsonl.gz", "rows"), ("/x/set/", "set"),
    ("./rows.parquet", "rows"), ("..", "outer"), (".", "here"), ("/", "data"),
])  # fmt: skip
def test_a_run_is_called_after_its_data(tmp_path, monkeypatch, given, name):
    """R17: always a plain name of one folder."""
    (tmp_path / "outer" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outer" / "here")
    assert data.run_name(given) == name


# What the command shows


@pytest.fixture
def no_charts(monkeypatch) -> None:
    """Charts take half a second each: for tests that do not look at them."""
    monkeypatch.setattr(data, "draw", lambda *_: None)


def command(monkeypatch, capsys, *arguments, terminal: bool = False) -> tuple[int, str, str]:
    """data.py in this process: (exit status, stdout, stderr without progress bars)."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    status = 0
    try:
        data.run(data.main)
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    lines = [line for line in re.split(r"[\r\n]", err) if line.strip() and not line.startswith("encoding")]
    return status, out, "\n".join(lines)


LENGTH = 150  # by which some reviews are cut, and most are not


def percentile(values: list[int], q: float) -> float:
    """By linear interpolation between the two nearest, as numpy and spreadsheets have it."""
    values, at = sorted(values), q * (len(values) - 1)
    low = int(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def test_statistics_are_those_of_the_lengths_by_definition(tmp_path, tokenizer):
    """Mean, median, 95th percentile and greatest, from the standard library and by hand."""
    path = write_rows(tmp_path / "rows.jsonl", reviews(43))
    encoded, whole = (encode_file(path, TEMPLATES["imdb"], tokenizer, n) for n in (LENGTH, 1000))
    lengths = [len(encoded[i][0]) for i in range(43)]
    told = data.statistics(encoded)
    assert told.pop("truncated") == sum(len(whole[i][0]) > LENGTH for i in range(43)) > 0
    assert told == {
        "examples": 43, "tokens": sum(lengths), "labels": 43, "mean": pytest.approx(statistics.mean(lengths)),
        "p50": statistics.median(lengths), "p95": pytest.approx(percentile(lengths, 0.95)), "max": max(lengths),
    }
    assert told["max"] == LENGTH and len(set(lengths)) > 10


def test_the_command_prints_the_counts_the_lengths_and_the_balance_of_labels(tmp_path, tokenizer, monkeypatch, capsys):
    """C51: of both files, every number as counted here; and draws two charts."""
    for split, count in (("train", 43), ("test", 20)):
        write_rows(tmp_path / "set" / f"{split}.jsonl", reviews(count))
    status, out, err = command(monkeypatch, capsys, "--data", tmp_path / "set", "--template", "imdb", "--max_length",
                               LENGTH, "--output", tmp_path / "charts")  # fmt: skip
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "template: imdb"
    assert lines[1].split() == ["examples", "tokens", "labels", "mean", "p50", "p95", "max", "cut"]
    for split, start in (("train", 2), ("test", 5)):
        path = tmp_path / "set" / f"{split}.jsonl"
        encoded = encode_file(path, TEMPLATES["imdb"], tokenizer, LENGTH)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lengths, positive = encoded.lengths.tolist(), sum(row["label"] for row in rows)
        assert lines[start].split() == [
            split, str(len(rows)), str(sum(lengths)), str(len(rows)), f"{statistics.mean(lengths):.1f}",
            f"{statistics.median(lengths):.0f}", f"{percentile(lengths, 0.95):.0f}", str(max(lengths)),
            f"{sum(encoded.was_cut) / len(rows):.1%}"]
        assert lines[start + 1].split() == ["negative:", str(len(rows) - positive),
                                            f"({(len(rows) - positive) / len(rows):.1%})"]
        assert lines[start + 2].split() == ["positive:", str(positive), f"({positive / len(rows):.1%})"]
    assert lines[8:] == [f"lengths.png and labels.png are in {tmp_path / 'charts'}"]
    charts_are_whole(tmp_path / "charts")


def charts_are_whole(folder: Path) -> None:
    """Two PNG files that open, as large as asked, with something drawn in colour."""
    assert {path.name for path in folder.iterdir()} == {"lengths.png", "labels.png"}
    for path in folder.iterdir():
        picture = matplotlib.image.imread(path)
        assert picture.shape[:2] == (480, 960)
        assert (np.ptp(picture[..., :3], axis=2) > 0.3).mean() > 0.01, path  # not only black on white


def test_the_plain_command_shows_the_bundled_sample_and_says_what_it_is(monkeypatch, capsys):
    """Without any flag; the charts go to a folder under runs, where a second time replaces them."""
    for _ in range(2):
        status, out, _ = command(monkeypatch, capsys, "--show", 2)
        assert status == 0 and out.startswith(BUNDLED_SAMPLE + "\n")
        assert len(re.findall(r"--- example |\[\[ (?:posi|nega)tive\]\]", out)) == 4
        assert sorted(path.name for path in Path("runs").iterdir()) == ["imdb-shown"]
    charts_are_whole(Path("runs/imdb-shown"))


@pytest.mark.usefixtures("no_charts")
def test_labels_stand_in_brackets_and_control_tokens_are_spelled_out(tmp_path, monkeypatch, capsys):
    """C12, C14, C15: exactly what was trained on, in the order of the file, each with its row and its counts."""
    rows = [{"instruction": "Say it.", "input": "", "output": "It: [[x]]."},
            {"instruction": "Go on.", "input": "</s> here", "output": "So\nit\tgoes."}]  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", rows)
    status, out, _ = command(monkeypatch, capsys, "--data", path, "--show", 9, "--test_fraction", 0)
    assert status == 0 and "template: alpaca\n" in out and "held out" not in out
    shown = out.split("--- example ")[1:]
    assert len(shown) == 2
    for number, (part, row) in enumerate(zip(shown, rows, strict=True), 1):
        head, text = part.split("\n", 1)
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        assert re.fullmatch(rf"{number}: row {number}, \d+ tokens, \d+ labels", head)
        assert text.startswith("<s>Below is an instruction")
        assert f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n[[{row['output']}</s>]]\n" in text


@pytest.mark.usefixtures("no_charts")
def test_labels_are_coloured_on_a_terminal_unless_no_colour_is_wanted(tmp_path, monkeypatch, capsys):
    """https://no-color.org: and what is printed is else the same."""
    path = write_rows(tmp_path / "rows.jsonl", reviews(3))
    flags = ("--data", path, "--template", "imdb", "--show", 2, "--test_fraction", 0)
    plain = command(monkeypatch, capsys, *flags)[1]
    assert plain.count("[[ positive]]") == plain.count("[[ negative]]") == 1 and "\x1b" not in plain
    coloured = command(monkeypatch, capsys, *flags, terminal=True)[1]
    assert coloured == plain.replace("[[ ", "\x1b[1;32m ").replace("ive]]", "ive\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "")
    assert command(monkeypatch, capsys, *flags, terminal=True)[1] == plain


@pytest.mark.usefixtures("no_charts")
def test_what_a_chat_template_says_never_steers_the_terminal(tmp_path, monkeypatch, capsys):
    """R15, R16: the message of its error is a part of one line."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_TOKENIZER, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"\x1b[1mkey": 1}))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no\x1b[2J\\n\\nway') }}")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": talk}] * 3)
    flags = ("--data", path, "--model", folder, "--template", "zephyr")
    status, out, _ = command(monkeypatch, capsys, *flags)
    assert status == 0 and out.count("PROMPT: ") == 1 and "no\\x1b[2J\\n\\nway; serve" in out
    assert all(c.isprintable() or c == "\n" for c in out)


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("terminal", [False, True])
def test_what_rows_say_never_steers_the_terminal(tmp_path, monkeypatch, capsys, terminal):
    """R16: escape sequences, carriage returns, and characters that turn the direction of text, are spelled out."""
    text = "x\x1b[2J\x1b]0;title\x07y\rz\x08\x9b1m\u202e\u2028!"
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text, "label": 1}])
    status, out, _ = command(monkeypatch, capsys, "--data", path, "--template", "imdb", "--show", 1, terminal=terminal)
    assert status == 0 and "x\\x1b[2J\\x1b]0;title\\x07y\\rz\\x08\\x9b1m\\u202e\\u2028!" in out
    left = out.replace("\x1b[1;32m positive\x1b[0m", "") if terminal else out
    assert all(c.isprintable() or c == "\n" for c in left)


@pytest.mark.usefixtures("no_charts")
def test_conversations_are_shown_with_the_control_tokens_of_their_layout(tmp_path, monkeypatch, capsys):
    """C15, C19: the end of a turn is learned, the names of roles are not."""
    path = write_rows(tmp_path / "rows.jsonl", [ROWS["chat"]])
    bundled_with(tmp_path / "chat", "<|im_start|>", "<|im_end|>")
    status, out, err = command(monkeypatch, capsys, "--data", path, "--model", tmp_path / "chat", "--show", 1)
    assert status == 0 and "template: chatml\n" in out, err
    expected = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]"
    assert out.split("labels\n")[-1].startswith(expected)


def test_a_held_out_part_is_told_and_free_answers_are_drawn_by_length(tmp_path, monkeypatch, capsys):
    """C51: the split is in the output, and the table has a line for each part."""
    path = write_rows(tmp_path / "set: 100 $x_{2}$.jsonl", questions(100))
    status, out, err = command(monkeypatch, capsys, "--data", path, "--output", tmp_path / "a/b")
    assert (status, err) == (0, "")
    first, _, train, test, last = out.splitlines()
    assert first == 'template: alpaca; held out: {"fraction": 0.05, "seed": 0, "examples": 5}'
    assert train.split()[:2] == ["train", "95"] and test.split()[:2] == ["test", "5"]
    charts_are_whole(tmp_path / "a/b")


@pytest.mark.usefixtures("no_charts")
def test_rows_that_were_left_out_are_told_once(tmp_path, monkeypatch, capsys):
    """R15: how many, and the first five of them, though both parts come from the same file."""
    rows = [row | ({"text": " "} if i % 4 == 1 else {}) for i, row in enumerate(reviews(40))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    status, out, _ = command(monkeypatch, capsys, "--data", path, "--template", "imdb", "--skip_bad_rows")
    assert status == 0 and out.count("were left out") == 1
    told = out.split("10 bad rows were left out:\n")[1].splitlines()[:-1]
    assert told == [f"  {path}:{number}: text is empty" for number in (2, 6, 10, 14, 18)]


MISTAKES = {
    "unknown flag": (["--shwo", "3"], "--shwo"),
    "not a number": (["--show", "all"], "--show"),
    "several numbers": (["--show", "-1", "--max_length", "1"], "--max_length 1: expected 2 or more; --show -1: "),
    "fraction": (["--test_fraction", "1"], "--test_fraction 1.0: expected 0 to 1, without 1"),
    "fraction beside a test file": (["--test_fraction", "0.5"], "--test_fraction 0.5: expected a data set without"),
    "no such data": (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file or folder"),
    "no such folder": (["--data_dir", "nowhere"], "nowhere: no such folder"),
    "no hub": (["--data", "dolly"], "--data dolly: the hub, "),
    "no such model": (["--model", "nowhere"], "--model nowhere: no such folder"),
    "no tokenizer": (["--model", "."], "no tokenizer, expected tokenizer.json or tokenizer.model"),
    "no such template": (["--template", "imbd"], "--template imbd: no such file"),
    "template of other rows": (["--template", "alpaca", "--data", "{good}"], "found fields {'text': str, 'label'"),
    "a system turn for reviews": (["--data", "imdb", "--system", "Hi"], "only conversations have a system turn"),
    "control tokens of others": (["--template", "chatml", "--data", "{chat}"], "no control token '<|im_start|>'"),
    "no such category": (["--data", "imdb:x", "--data_dir", "{good}"], "expected {category: str}"),
    "bad row": (["--data", "{bad}", "--template", "imdb"], "bad.jsonl:2: not valid JSON"),
    "too short": (["--data", "{good}", "--template", "imdb", "--max_length", "20"], "--max_length 20"),
    "no rows": (["--data", "{empty}", "--template", "imdb"], "empty.jsonl: no rows"),
    "charts in a file": (["--data", "imdb", "--output", "{good}"], "--output {good}: File exists"),
    "charts in no folder": (["--data", "imdb", "--output", "{good}/x"], "--output {good}/x: Not a directory"),
}


DRAWN = ("charts in a file", "charts in no folder")  # what can fail only once the charts are drawn


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in DRAWN else c for c in MISTAKES])
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(tmp_path, monkeypatch, capsys, case):
    """R15, R17: or the lines of bad rows and their number; never a traceback, and no charts."""
    good = json.dumps(reviews(1)[0]) + "\n"
    places = {name: tmp_path / f"{name}.jsonl" for name in ("good", "bad", "empty", "chat")}
    for name, content in (("good", good), ("bad", good + "{\n"), ("empty", ""), ("chat", json.dumps(ROWS["chat"]))):
        places[name].write_text(content)
    arguments, expected = MISTAKES[case]
    if "{" in expected:
        expected = expected.replace("{good}", str(places["good"]))
    arguments = [argument.format(**places) for argument in arguments]
    status, out, err = command(monkeypatch, capsys, *arguments)
    lines = err.splitlines()
    assert status == 2 and expected in lines[0] and not Path("runs").exists(), err
    about_rows = " of 1 rows cannot be used; " in lines[-1] or " of 2 rows cannot be used; " in lines[-1]
    assert len(lines) == (2 if about_rows else 1), err


class Hundred:
    """Examples of 1 to 100 tokens, of which 3 were cut."""

    lengths = np.arange(1, 101)
    label_counts = np.ones(100, int)
    was_cut = lengths > 97
    bad_row_count = 0

    def __len__(self):
        return 100


def test_a_summary_counts_what_was_cut_and_names_the_usual_lengths():
    found = {"examples": 100, "tokens": 5050, "labels": 100, "truncated": 3, "mean": 50.5, "p50": 50.5, "max": 100}
    assert data.statistics(Hundred()) == found | {"p95": pytest.approx(95.05)}
    counts = data.DataSet(None, None, Hundred(), None, None).counts()
    assert (counts["train"], counts["truncated"]) == (100, 3)


def test_bad_rows_of_both_files_are_counted_and_those_of_a_file_that_was_split_once():
    train, test = Hundred(), Hundred()
    train.bad_row_count, test.bad_row_count = 1, 2
    assert data.DataSet(None, None, train, test, held_out=None).bad_row_count == 3
    assert data.DataSet(None, None, train, train, held_out={"fraction": 0.5}).bad_row_count == 1
