"""A file of answers that is there when all are; until then, those that are complete are kept beside it.

    answers.jsonl.unfinished-0    what rank 0 has answered so far: each line [number of the prompt, its answer]
    answers.jsonl                 when all prompts are answered: an answer in each line, in the order of the prompts

So an interruption loses no answer, and the same command goes on with those that are missing.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from llama.boundary.durable import locked, replace_durably
from llama.boundary.errors import UserError, as_user_error

SUFFIX = ".unfinished-"


class AnswerFile:
    """The file that --output names. Use it as a context manager while answers are added.

    asked: {flag or other name: value} of all that decides what the answers are.
    kept:  {number of a prompt: its answer} of what an interrupted run of the same command has left.

    Raises UserError for a file that is there already, for a folder in which none can be written, and where what is kept
    answers something else.
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
            self.own.touch()  # fails now, and not behind the first answer
            if not self.own.stat().st_size:
                self.own.unlink()

    def __enter__(self) -> "AnswerFile":
        self._lock = locked(self.own, wait=False, create=True)
        self._lock.__enter__()
        whole = self.own.read_bytes().rpartition(b"\n")[0]  # a line that was not finished is written again
        self._file = open(self.own, "r+b")
        self._file.truncate(len(whole) + 1 if whole else 0)
        self._file.seek(0, os.SEEK_END)
        if not whole:
            self._append(self.asked)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._lock.__exit__(None, None, None)

    def add(self, number: int, answer: dict) -> None:
        """Keep the answer to a prompt."""
        self._append([number, answer])

    def publish(self, answers: Iterable[dict]) -> None:
        """Write the file: all answers, in order. What was kept of them is removed."""
        with as_user_error(f"--output {self.path}", "a file that can be written"):
            replace_durably(self.path, "".join(json_line(answer) + "\n" for answer in answers))
            for file in self._unfinished():
                file.unlink(missing_ok=True)

    def _append(self, value: object) -> None:
        self._file.write(json_line(value).encode() + b"\n")
        self._file.flush()

    def _unfinished(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{_literal(self.path.name)}{SUFFIX}*"))

    def _read(self, file: Path) -> dict[int, dict]:
        """What a rank has answered: {number of a prompt: its answer}."""
        lines = file.read_bytes().split(b"\n")[:-1]  # behind the last line end there is nothing, or half a line
        with as_user_error(file, "what an interrupted run has left; delete it"):
            found = [json.loads(line) for line in lines]
        if not found:
            return {}
        differing = [name for name in self.asked if found[0].get(name) != self.asked[name]]
        if differing:
            names = ", ".join(differing[:3])
            way_out = "repeat that command, delete this file, or name another one"
            raise UserError(f"{file}: keeps answers of a command that differs from this one in {names}; {way_out}")
        return dict(found[1:])


def _literal(name: str) -> str:
    """A pattern of glob that matches only this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def json_line(value: object) -> str:
    """JSON on one line, readable in any script. Characters that could control a terminal, or end a line for some
    reader, are escaped: in JSON they stand in strings only."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
