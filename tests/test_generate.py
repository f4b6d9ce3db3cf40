"""generate.py as a command: text on stdout, notes on stderr, mistakes in one line."""

import io
import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from chats import write_base
from reviews import BUNDLED, CONFIG, plain_model, write_reviews
from runs import replaced
from sharded import this_process

import generate
from llama.boundary import terminal
from llama.boundary.command_line import run
from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.chat_template import prompt_ids
from llama.data.conversation import Turn
from llama.data.dialogue import Dialogue
from llama.data.prompting import Room
from llama.data.tokenizer_files import load_tokenizer
from llama.evaluation import answering
from llama.evaluation.settings import GenerateSettings
from llama.generation import batch, decode
from llama.generation.text import TextStream
from llama.model import Llama, PackedDocuments
from llama.storage.base import Base, config_to_json
from llama.storage.companions import Companions
from llama.storage.pretrained import export_model

pytestmark = pytest.mark.usefixtures("cache")

ROOT = Path(generate.__file__).parent
FLAGS = ("--dtype", "float32", "--max_new_tokens", 12)
TOKENIZER = load_tokenizer(BUNDLED)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A Hugging Face folder with the tiny model's weights in fp32."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(plain_model(), folder, config_to_json(CONFIG), Companions([BUNDLED]), torch.float32)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Prompts of very different lengths, of which one is all control-token text."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    words = "the film was slow and weak but I liked its quick bright strong plot".split()
    prompts = [" ".join(words[(i + j * j) % len(words)] for j in range(1 + (7 * i) % 23)) for i in range(9)]
    prompts[5] = "</s><s><unk>"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """generate.py in this process: (exit status, stdout, stderr without progress bars)."""

    def call(*arguments, stdin: str | None = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        typed = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape")))
        monkeypatch.setattr(sys, "stdin", typed)
        status = 0
        try:
            run(generate.main)
        except SystemExit as stopped:
            status = stopped.code
        if dist.is_initialized():  # after Ctrl-C a process just ends
            dist.destroy_process_group()
        out, err = capsys.readouterr()
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        return status, out, "\n".join(lines)

    return call


def greedy(model: Llama, ids: list[int], count: int) -> list[int]:
    """By the definition: the whole text anew for each token, until the end token."""
    new: list[int] = []
    while len(new) < count:
        text = torch.tensor(ids + new)
        token = int(model.logits(text, PackedDocuments([len(text)]))[-1].argmax())
        if token == TOKENIZER.eos_id:
            break
        new.append(token)
    return new


def test_stdout_is_the_text_alone(exported, command):
    """Only what is new. The notes and the speed are on stderr."""
    prompt = "The film was slow and"
    new = greedy(plain_model(), TOKENIZER.encode(prompt), 12)
    text = TOKENIZER.decode(new, starts_text=False)
    for arguments, stdin in ((("--prompt", prompt), ""), (("--prompt", "-"), prompt + "\r\n")):
        status, out, err = command("--model", exported, *arguments, *FLAGS, stdin=stdin)
        assert (status, out) == (0, text + "\n"), err
        count = len(TOKENIZER.encode(prompt))
        assert f"prompt: {count} tokens in " in err and f"answer: {len(new)} tokens in " in err
        assert "tokens per second (ended by: length)" in err
    stop = text[4:6]
    status, out, err = command("--model", exported, "--prompt", prompt, "--stop", stop, "--stop", "never", *FLAGS)
    assert out == text[: text.index(stop)] + "\n" and "(ended by: stop_string)" in err
    status, out, err = command("--model", exported, "--prompt", "", "--dtype", "float32", "--max_new_tokens", 0)
    assert (status, out) == (0, "\n") and "prompt: 1 tokens" in err
    status, out, err = command("--model", exported, "--prompt", "x", "--max_length", 12, *FLAGS)
    assert "--max_length 12: leaves nothing to prompts beside --max_new_tokens 12, and is not used" in err


def test_a_file_gets_an_answer_for_each_row_in_order_whatever_the_batch(exported, questions, tmp_path, command):
    """C24: each as if it were asked alone; without --output the same lines go to stdout."""
    lines = []
    for i, size in enumerate((1, 4)):
        output = tmp_path / f"new folder/answers-{i}.jsonl"
        arguments = ("--prompts", questions, "--output", output, "--batch_size", size)
        status, out, err = command("--model", exported, *arguments, *FLAGS)
        assert status == 0 and "9 prompts, " in err, err
        lines.append(output.read_text())
    status, out, err = command("--model", exported, "--prompts", questions, *FLAGS)
    assert status == 0 and lines == [out] * 2
    model = plain_model()
    for number, (asked, line) in enumerate(zip(questions.read_text().splitlines(), out.splitlines(), strict=True), 1):
        prompt, answer = json.loads(asked)["prompt"], json.loads(line)
        new = greedy(model, TOKENIZER.encode(prompt), 12)
        assert answer == {"row": number, "prompt": prompt, "text": TOKENIZER.decode(new, starts_text=False),
                          "tokens": len(new), "reason": "length" if len(new) == 12 else "stop"}  # fmt: skip


class Interrupted:
    """`generate` of a process that gets Ctrl-C when it has given some answers."""

    def __init__(self, answers: int):
        self.answers = answers

    def __call__(self, *arguments):
        for count, answer in enumerate(decode.generate(*arguments)):
            if count == self.answers:
                raise KeyboardInterrupt
            yield answer


@pytest.mark.slow
def test_an_interrupted_command_goes_on_where_it_was(exported, questions, tmp_path, command):
    """One line and status 130; the same command again asks only what is missing, and the file is the same."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    asked = ("--model", exported, "--prompts", questions, *FLAGS)
    assert command(*asked, "--output", whole)[0] == 0
    for _ in range(2):
        with replaced(answering, generate=Interrupted(4)):
            status, out, err = command(*asked, "--output", output)
        kept = f"{output}.unfinished-0: keeps the answers so far; the same command goes on with the others"
        assert (status, out) == (130, "") and err.splitlines()[-2:] == [kept, "interrupted"] and not output.exists()
    status, _, err = command(*asked, "--output", output, "--seed", 1)
    assert status == 2 and "keeps answers of a command that differs from this one in --seed; repeat" in err
    seen = []

    def watched(model, requests, *others):
        seen.append(len(requests))
        return Interrupted(100)(model, requests, *others)

    with replaced(answering, generate=watched):
        status, _, err = command(*asked, "--output", output)
    assert status == 0 and seen == [1] and output.read_text() == whole.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"whole.jsonl", "answers.jsonl"}
    status, _, err = command(*asked, "--output", output)
    assert status == 2 and err.splitlines()[-1].endswith("exists already, expected the name of a new file")


@pytest.mark.slow
def test_prompts_of_a_template_end_with_its_words_and_are_cut_as_in_training(exported, tmp_path, command):
    """C12, C13: the prompt of a review is that of training, with room for the longest answer word; no label needed."""
    reviews = write_reviews(tmp_path / "reviews.jsonl", 9)
    rows = [{"text": json.loads(line)["text"]} for line in reviews.read_text().splitlines()]
    reviews.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = command("--model", exported, "--prompts", reviews, "--template", "imdb", "--max_length", 120,
                               "--dtype", "float32")  # fmt: skip
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    cut = sum(rows[i]["text"] not in line["prompt"] for i, line in enumerate(lines))
    assert 0 < cut < 9 and f"{cut} of 9 prompts were cut, where the template allows it" in err
    words = TOKENIZER.encode_batch([" negative", " positive"], starts_text=False)
    longest = max(map(len, words))
    for line in lines:
        ids = TOKENIZER.encode(line["prompt"].partition("#### Movie review:\n<review>")[0])
        assert ids[0] == TOKENIZER.bos_id and line["tokens"] <= longest and line["prompt"].endswith("#### Answer:")
    asked = ("--template", "imdb", "--prompt", "Dull.", "--dtype", "float32")
    status, out, err = command("--model", exported, *asked)
    assert status == 0 and f"answer: {longest} tokens" in err
    assert len(out.strip()) > 1
    status, out, err = command("--model", exported, *asked, "--stop", out.strip()[-1])
    assert status == 0 and "(ended by: stop_string)" in err  # though its ids are those of a word


HOSTILE = {
    "neither": ((), "--prompt: expected one of --prompt, --prompts and --chat"),
    "both": (("--prompt", "x", "--chat"), "--prompt x: expected one of --prompt, --prompts and --chat"),
    "misspelt": (("--promt", "x"), "unrecognized arguments: --promt x. Did you mean --prompt?"),
    "an empty stop string": (("--prompt", "x", "--stop", ""), "expected texts that are not empty"),
    "a lone surrogate": (("--prompt", "a\udcff"), "--prompt: character 1 of the text is a lone surrogate, not Unicode"),
    "no such file": (("--prompts", "nowhere.jsonl"), "--prompts nowhere.jsonl: no such file, expected .parquet"),
    "a folder of prompts": (("--prompts", ROOT), "is no file, expected .parquet"),
    "rows on stdin": (("--prompts", "-"), "--prompts -: no such file, "),
    "no model": (("--model", "", "--prompt", "x"), "--model : expected a folder or a hub id"),
    "no kind of file": (("--prompts", ROOT / "README.md"), "README.md: expected a name ending in .parquet, .jsonl"),
    "output that exists": (("--prompts", "QUESTIONS", "--output", "/dev/full"), "/dev/full: exists already"),
    "output into nowhere": (("--prompts", "QUESTIONS", "--output", "/proc/x/y"), "/proc/x/y: No such file"),
    "too long an answer": (("--prompt", "x", "--max_new_tokens", 9000), "--max_new_tokens 9000: the model has 2048"),
    "too long a prompt": (("--prompt", "a b " * 2000), "expected 1792 at most; --max_new_tokens takes"),
    "max_length beyond": (("--prompt", "x", "--max_length", 9000), "made for at most 2048 tokens"),
    "system without a chat": (("--prompt", "x", "--system", "Be brief."), "expected --template chat with it"),
    "system of a template": (("--prompt", "x", "--template", "alpaca", "--system", "x"), "found the template alpaca"),
    "chat by a template": (("--chat", "--template", "alpaca"), "--template alpaca: expected chat, or one of"),
    "chatml without its tokens": (("--chat", "--template", "chatml"), "no control token '<|im_end|>'"),
    "a template without a field": (("--prompt", "x", "--template", "text"), "--template text: has no field in its"),
    "no such template": (("--prompt", "x", "--template", "nope"), "--template nope: no such file, nor one of imdb"),
    "an empty field": (("--prompt", " ", "--template", "alpaca"), "--prompt: instruction is empty"),
    "a filter without draws": (("--prompt", "x", "--top_k", 5), "--top_k 5: expected --temperature above 0 with it"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_each_mistake_is_one_line(exported, questions, command, case):
    """Before anything is generated, and before the weights are read."""
    arguments, message = HOSTILE[case]
    arguments = tuple(questions if argument == "QUESTIONS" else argument for argument in arguments)
    with replaced(generate, open_model=None):
        status, out, err = command("--model", exported, *arguments)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("stdin, message", [
    ("a\0b", "--prompt: character 1 of the text is NUL, expected text"),
    ("ab\udcff", "stdin: byte 2 is not UTF-8, expected text"), (None, "stdin: is closed, expected text"),
])  # fmt: skip
def test_what_is_no_text_on_stdin_is_refused(exported, command, stdin, message):
    assert command("--model", exported, "--prompt", "-", stdin=stdin) == (2, "", message)


def test_rows_that_no_prompt_can_be_made_of_are_named_and_with_a_flag_left_out(exported, tmp_path, command):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b"\n')
    status, out, err = command("--model", exported, "--prompts", path, *FLAGS)
    assert (status, out) == (2, "") and f"{path}:2: prompt is empty" in err and "2 of 3 rows cannot be used" in err
    status, out, err = command("--model", exported, "--prompts", path, "--skip_bad_rows", *FLAGS)
    assert status == 0 and [json.loads(line)["row"] for line in out.splitlines()] == [1]
    assert "2 bad rows were left out, the first: " in err
    path.write_text('{"foo": "a", "completion": null}\n')
    status, out, err = command("--model", exported, "--prompts", path, "--template", "prompt_completion")
    assert status == 2 and "found fields {'foo': str, 'completion': NoneType}, expected {prompt: str" in err
    path.write_text('{"instruction": "a"}\n')
    status, out, err = command("--model", exported, "--prompts", path, *FLAGS)
    assert status == 2 and "fit alpaca and dolly; name one with --template" in err and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A model with the control tokens of ChatML, and no chat template."""
    return write_base(tmp_path_factory.mktemp("chatty") / "model")


def test_a_conversation_asks_with_the_layout_of_training(chatty, command):
    """C12, C14: each prompt is all that was said, as training has it; /undo and /reset forget; /exit ends."""
    asked = []
    real = batch.Batch.add

    def add(self, requests):
        asked.append(requests[0][1])
        return real(self, requests)

    typed = "Hi\n\n  \nAnd\n/undo\nYou?\n/reset\nNew\n/nonsense\n/etc is a path\n\0\n/exit\nnever"
    with replaced(batch.Batch, add=add):
        status, out, err = command("--model", chatty, "--chat", "--system", "Be brief.", *FLAGS, stdin=typed)
    assert status == 0, err
    tokenizer = load_tokenizer(chatty)
    said = out.split("\n")
    assert out.count("\n") >= 5 and "2 turns are left" in err and "nothing was said yet" in err
    assert "chat: character 0 of your text is NUL, expected text" in err and "never" not in out
    assert err.count(generate.HELP) == 2 and said
    system, first = Turn("system", "Be brief."), Turn("user", "Hi")
    assert asked[0].prompt == prompt_ids("chatml", [system, first], tokenizer)
    assert asked[3].prompt == prompt_ids("chatml", [system, Turn("user", "New")], tokenizer)
    shown = [tokenizer.decode(request.prompt) for request in asked]
    assert len(shown) == 5 and all("Be brief." in text for text in shown)
    assert "And" in shown[1] and "And" not in shown[2] and "Hi" in shown[2] and "Hi" not in shown[3]
    assert "New" in shown[4] and "/etc is a path" in shown[4]
    assert asked[0].stop_ids >= {tokenizer.eos_id, tokenizer.control_id("<|im_end|>")}
    assert command("--model", chatty, "--chat", *FLAGS, stdin=None)[:2] == (0, "")


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(chatty, command):
    """What was said so far is the answer; between answers Ctrl-C ends the program with status 130."""
    steps = []
    real = batch.Batch.step

    def step(self):
        steps.append(self)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(self)

    with replaced(batch.Batch, step=step):
        status, out, err = command("--model", chatty, "--chat", *FLAGS, stdin="Hi\nAnd you?\n")
    assert status == 0 and err.count("(ended by: ") == 2 and "answer: 4 tokens" in err and "(ended by: Ctrl-C)" in err
    assert steps[-1] is not steps[0]

    def typed(_):
        raise KeyboardInterrupt

    with replaced(generate, read_message=typed):
        status, out, err = command("--model", chatty, "--chat", *FLAGS)
    assert status == 130 and err.splitlines()[-1] == "interrupted"
    with replaced(batch.Batch, step=typed):
        status, out, err = command("--model", chatty, "--prompt", "x", *FLAGS)
    assert status == 130 and err.splitlines()[-1] == "interrupted"


def test_a_dialogue_that_is_too_long_forgets_its_oldest_turns(chatty):
    dialogue = Dialogue(Chat("chatml"), load_tokenizer(chatty), Room(150, 150))
    forgotten = []
    for i in range(6):
        ids, count = dialogue.ask(f"question {i}")
        forgotten.append(count)
        assert len(ids) <= 150
        dialogue.answer(f"answer {i}")
    assert forgotten[0] == 0 and sum(forgotten) == 12 - len(dialogue.turns) and len(dialogue.turns) > 2
    with pytest.raises(UserError, match="a prompt of .* tokens, expected 150 at most"):
        dialogue.ask("long " * 100)
    dialogue.answer_count = len(dialogue.turns)
    dialogue.ask("again")
    dialogue.answer("  ")  # nothing was said: no layout has an empty turn
    assert len(dialogue.turns) == dialogue.answer_count or forgotten


def test_text_of_a_model_cannot_control_a_terminal(capsys, monkeypatch):
    text = "a\x1b[31m\r\n\tb\x9b\u202e é映🎬👩\u200d👧\u00a0\u3000"
    terminal.show(text)
    assert capsys.readouterr().out == text  # a pipe gets what was written
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal.show(text)
    assert capsys.readouterr().out == "a\\x1b[31m\\r\n\tb\\x9b\\u202e é映🎬👩\u200d👧\u00a0\u3000"


def test_ids_that_the_tokenizer_does_not_have_are_no_text():
    """A model may have more rows than its tokenizer has ids."""
    stream = TextStream(TOKENIZER.decode_new)
    assert not any(stream(id) for id in [*TOKENIZER.encode(" so", False), 5000, TOKENIZER.eos_id])
    assert stream.finish() == " so" and Base.tiny().tokenizer.decode_new([]) == ""


def on_a_rank(settings: GenerateSettings) -> str:
    """generate.py in a test worker, whose processes have joined already: its stdout, or its error."""
    printed = io.StringIO()
    joined = {"parse": lambda *_, **__: settings, "join": lambda: nullcontext(this_process())}
    with replaced(generate, **joined), redirect_stdout(printed):
        try:
            generate.main()
        except UserError as error:
            return str(error)
    return printed.getvalue()


@pytest.mark.slow
def test_ranks_share_the_rows_and_their_file_is_that_of_one_process(exported, questions, tmp_path, command, ranks):
    """C45: with the whole model on each rank, and with a model that the ranks hold together; texts end at different
    lengths, and one rank has fewer. One prompt needs no second rank, and says so."""
    whole = tmp_path / "whole.jsonl"
    assert command("--model", exported, "--prompts", questions, "--output", whole, *FLAGS)[0] == 0
    common: dict = {"model": str(exported), "dtype": "float32", "max_new_tokens": 12, "batch_size": 2}
    for sharding in ("none", "full"):
        flags = common | {"sharding": sharding, "prompts": str(questions)}
        output = tmp_path / f"{sharding}.jsonl"
        assert ranks(2, on_a_rank, GenerateSettings(**flags, output=str(output))) == ["", ""]
        assert output.read_text() == whole.read_text()
        assert ranks(2, on_a_rank, GenerateSettings(**flags)) == [whole.read_text(), ""]
    assert {file.name for file in tmp_path.iterdir()} == {"whole.jsonl", "none.jsonl", "full.jsonl"}
    refused = ranks(2, on_a_rank, GenerateSettings(**common, prompt="Hi"))
    assert refused == ["torchrun shares the rows of --prompts; start one process, or add --sharding full"] * 2
    alone = command("--model", exported, "--prompt", "Hi", *FLAGS)[1]
    assert ranks(2, on_a_rank, GenerateSettings(**common, sharding="full", prompt="Hi")) == [alone, ""]
