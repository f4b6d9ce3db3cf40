"""A file of answers that appears when all of them are complete. Until then, complete ones are kept beside it.

    answers.jsonl.unfinished-0    what rank 0 has answered so far: each line [number of the prompt, its answer]
    answers.jsonl                 when all prompts are answered: an answer in each line, in the order of the prompts

So an interruption loses no complete answer, and the same command then computes those that are missing.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llama.boundary.durable import locked, replace_durably
from llama.boundary.errors import UserError, as_user_error

SUFFIX = ".unfinished-"
KEPT = "what an interrupted run has left; delete it"


class AnswerFile:
    """The file that --output names. Use it as a context manager while answers are added.

    asked: {flag or other name: value} of everything that decides what the answers are.
    kept:  {number of a prompt: its answer}, from an interrupted run of the same command.

    Raises UserError if the file exists already, if it cannot be written, or if the kept answers are those of another
    command.
    """

    def __init__(self, path: str, asked: dict, rank: int):
        self.path = Path(path)
        self.asked = json.loads(json.dumps(asked))  # as it is read again: a tuple becomes a list
        self.own = self.path.with_name(f"{self.path.name}{SUFFIX}{rank}")
        if os.path.lexists(self.path):
            raise UserError(f"--output {path}: exists already, expected the name of a new file")
        with as_user_error(f"--output {path}", "a file that can be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.kept: dict[int, dict] = {}
            for file in self._unfinished():
                self.kept |= self._read(file)
            self.own.touch()  # where that is impossible, it fails now, and not after the first answer
            if not self.own.stat().st_size:
                self.own.unlink()

    def __enter__(self) -> "AnswerFile":
        self._lock = locked(self.own, wait=False, create=True)
        self._lock.__enter__()
        whole, _, _ = self.own.read_bytes().rpartition(b"\n")  # an unfinished last line is dropped
        if b"\n" not in whole:  # no answer is kept, only what was asked then
            whole = b""
        self._file = open(self.own, "r+b")
        self._file.truncate(len(whole) + 1 if whole else 0)
        self._file.seek(0, os.SEEK_END)
        if not whole:
            self._append(self.asked)
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # what has no room was reported when it was added
            self._file.close()
        if self.own.read_bytes().count(b"\n") < 2:  # no answer to keep
            self.own.unlink()
        self._lock.__exit__(None, None, None)

    def add(self, number: int, answer: dict) -> None:
        """Keep the answer to a prompt."""
        self._append([number, answer])

    def publish(self, answers: Iterable[dict]) -> None:
        """Write the file: all answers, in order. The files beside it are removed."""
        lines = [json_line(answer) + "\n" for answer in answers]
        with as_user_error(f"--output {self.path}", "a file that can be written"):
            replace_durably(self.path, "".join(lines))
            for file in self._unfinished():
                file.unlink(missing_ok=True)

    def _append(self, value: object) -> None:
        with as_user_error(self.own, "room for more answers; the same command goes on with those that are missing"):
            self._file.write(json_line(value).encode() + b"\n")
            self._file.flush()

    def _unfinished(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{_literal(self.path.name)}{SUFFIX}*"))

    def _read(self, file: Path) -> dict[int, dict]:
        """What a rank has answered: {number of a prompt: its answer}."""
        if not file.is_file():
            raise UserError(f"{file}: is no file, expected {KEPT}")
        *lines, _ = file.read_bytes().split(b"\n")  # behind the last line end there is nothing, or half a line
        answers = {}
        with as_user_error(file, KEPT):
            asked, *kept = [json.loads(line) for line in lines] or [{}]
            for line, (number, answer) in enumerate(kept, 2):
                if type(number) is not int or not isinstance(answer, dict):
                    raise ValueError(f"line {line} is no answer")
                answers[number] = answer
            differing = [name for name in self.asked if asked.get(name) != self.asked[name]]
        if answers and differing:
            names = ", ".join(differing[:3])
            way_out = "repeat that command, delete this file, or name another one"
            raise UserError(f"{file}: keeps answers of a command that differs from this one in {names}; {way_out}")
        return answers


def _literal(name: str) -> str:
    """A pattern of glob that matches only this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def json_line(value: object) -> str:
    """JSON on one line, with letters of every script as they are. Characters that could control a terminal, or that a
    reader could take for a line end, are escaped. They occur in strings only, where JSON allows it."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
