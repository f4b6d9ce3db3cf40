"""A file of answers is there whole or not at all, and an interruption loses none of them."""

import json
import resource

import pytest

from llama.boundary.errors import UserError
from llama.generation.answer_file import AnswerFile, json_line

ASKED = {"--seed": 0, "--stop": ("a", "b"), "the prompts": 7}


def answer(number: int) -> dict:
    return {"row": number + 1, "text": f"answer\n{number} \u2028\x1b[2J é🎬"}


def test_the_file_appears_with_all_answers_in_order_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "answers[1].jsonl"
    with AnswerFile(str(path), ASKED, 0) as first, AnswerFile(str(path), ASKED, 1) as second:
        second.add(1, answer(1))
        first.add(2, answer(2))
        first.add(0, answer(0))
        assert not path.exists()
    first.publish(answer(i) for i in range(3))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [answer(i) for i in range(3)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_was_answered_before_an_interruption_is_kept_for_the_same_command(tmp_path):
    """Also half a line, as a kill leaves it; and with another number of ranks."""
    path = tmp_path / "answers.jsonl"
    for rank, number in ((0, 5), (1, 3)):
        with AnswerFile(str(path), ASKED, rank) as file:
            file.add(number, answer(number))
    with open(path.with_name("answers.jsonl.unfinished-0"), "ab") as unfinished:
        unfinished.write(b'[4, {"row": 5, "te')
    for kept in ([3, 5], [3, 5, 6]):
        with AnswerFile(str(path), ASKED, 0) as file:
            assert file.kept == {number: answer(number) for number in kept}
            file.add(kept[-1] + 1, answer(kept[-1] + 1))
    file.publish([answer(0)])
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]


def test_answers_of_another_command_are_never_mixed_in(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(str(path), ASKED, 0) as file:
        file.add(0, answer(0))
    with pytest.raises(UserError) as error:
        AnswerFile(str(path), ASKED | {"--seed": 1, "the prompts": 8}, 0)
    assert str(error.value).startswith(
        f"{path}.unfinished-0: keeps answers of a command that differs from this one in "
    )
    assert "in --seed, the prompts; repeat that command, delete this file, or name another one" in str(error.value)


def test_where_nothing_was_answered_nothing_is_left_and_another_command_may_begin(tmp_path):
    path = str(tmp_path / "answers.jsonl")
    with AnswerFile(path, ASKED, 0):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "answers.jsonl.unfinished-0").write_text(json_line(ASKED) + "\n")  # as a kill leaves it
    other = ASKED | {"--seed": 1}
    with AnswerFile(path, other, 0) as file:
        assert file.kept == {}
        file.add(0, answer(0))
    assert AnswerFile(path, other, 0).kept == {0: answer(0)}


@pytest.mark.parametrize(
    "kept",
    [b"\xff\0\n", b"[]\n[0, {}]\n", b"5\n", b"{}\n5\n", b"{}\n[0, 5]\n", b'{}\n["0", {}]\n', b"{}\n[0, {}, 3]\n"],
)
def test_what_no_interrupted_run_has_left_is_refused_and_not_touched(tmp_path, kept):
    file = tmp_path / "answers.jsonl.unfinished-1"
    file.write_bytes(kept)
    with pytest.raises(UserError, match="expected what an interrupted run has left; delete it") as error:
        AnswerFile(str(tmp_path / "answers.jsonl"), ASKED, 0)
    assert str(error.value).startswith(f"{file}: ") and file.read_bytes() == kept


def test_a_full_disk_is_named_and_what_was_answered_is_kept(tmp_path):
    """The limit on the size of a file stands for a disk that is full."""
    path = str(tmp_path / "answers.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with AnswerFile(path, ASKED, 0) as file:
            file.add(0, answer(0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.own.stat().st_size + 20, before[1]))
            with pytest.raises(UserError, match="unfinished-0: File too large, expected room for more answers; the"):
                file.add(1, answer(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert AnswerFile(path, ASKED, 0).kept == {0: answer(0)}


def test_a_place_where_no_file_can_be_written_is_refused_before_anything_is_answered(tmp_path):
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    for path in ("there.jsonl", "link.jsonl", "."):
        with pytest.raises(UserError, match="--output .*: exists already, expected the name of a new file"):
            AnswerFile(str(tmp_path / path), ASKED, 0)
    for path in (tmp_path / "there.jsonl" / "x.jsonl", "/proc/none/x.jsonl", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="--output .*, expected a file that can be written"):
            AnswerFile(str(path), ASKED, 0)
    AnswerFile(str(tmp_path / "good.jsonl"), ASKED, 0)
    assert {file.name for file in tmp_path.iterdir()} == {"there.jsonl", "link.jsonl"}


def test_two_processes_cannot_write_the_same_answers(tmp_path):
    path = str(tmp_path / "answers.jsonl")
    with AnswerFile(path, ASKED, 0), pytest.raises(UserError, match="in use by another run"):
        AnswerFile(path, ASKED, 0).__enter__()


def test_a_line_of_json_holds_no_character_that_ends_a_line_or_controls_a_terminal():
    text = "a\n\r\x1b[31m\x9b\x7f\u2028\u2029\u0085\u202e\ud800 é映🎬\u00ad\U000e0001"
    line = json_line({"text": text})
    assert json.loads(line)["text"] == text and line.isprintable() and len(line.splitlines()) == 1
    assert "é映🎬" in line
