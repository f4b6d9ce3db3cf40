"""Rows of files become segments, and what a row holds that its template does not use is refused or noted by name."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llama.boundary.errors import UserError
from llama.data.chat import LAYOUTS, Chat, Renderer
from llama.data.conversation import PAIR
from llama.data.rows import column_names, read
from llama.data.templates import TEMPLATES, Segment, described

# In the data formats that people share, these belong to the prompt: without one, another answer would be right.
PROMPT_FIELDS = {"system", "system_prompt", "history", "tools", "functions", "context", "input", "instruction"}
MOST_NAMES = 50  # of fields that are not used


class Row(NamedTuple):
    """A row of a file: its segments and the index of its answer, or what is wrong with it."""

    file: int  # its index
    place: str  # as a message has it after the file's path: ":" and the number
    number: int  # in the file; in the second of several files it counts on from the last of the first
    segments: list[Segment]
    answer: int
    error: str = ""  # begins with the file's path


class RenderedRows:
    """The rows of files, one after the other, only of one `category` where one is given.

    unused: after all rows were asked for, the names of the fields that no row's prompt or answer uses.

    Raises UserError when no row is of the category.
    """

    def __init__(self, paths: Sequence[Path], template: Renderer, category: str | None):
        self.paths = paths
        self.unused: list[str] = []
        self._template = template
        self._category = category
        self._used = template.columns | ({"category"} if category else set())
        is_users_own = template.name not in (*TEMPLATES, *LAYOUTS)  # then its author has decided what is of use
        self._needed = set() if is_users_own else PROMPT_FIELDS - self._used

    def __iter__(self) -> Iterator[Row]:
        others: Counter[str] = Counter()
        found = False
        last = 0
        for file, path in enumerate(self.paths):
            rows_before = last
            for number, row in read(path, self._used | self._needed):
                last = rows_before + number
                place = f":{number}"
                where = f"{path}{place}"
                try:
                    if isinstance(row, UserError):
                        raise row
                    if self._category is not None and self._category_of(row, where) != self._category:
                        others[row["category"]] += 1
                        continue
                    found = True
                    self._check_fields(row, where)
                    segments, answer = self._template.render(row, where)
                    yield Row(file, place, last, segments, answer)
                except UserError as error:
                    yield Row(file, place, last, [], -1, str(error))
            self._note_unused(set(column_names(path)) - self._used - self._needed)
        if others and not found:
            known = ", ".join(f"{name!r:.40}" for name, _ in others.most_common(12))
            raise UserError(f"{self.paths[0]}: no row of category {self._category!r}, only of {known}")

    def _category_of(self, row: dict, where: str) -> str:
        if not isinstance(row.get("category"), str):
            raise UserError(f"{where}: found fields {described(row)}, expected {{category: str}}")
        return row["category"]

    def _check_fields(self, row: dict, where: str) -> None:
        """Note the fields that are not used. Raise UserError where one of them belongs to the prompt."""
        used = self._used
        if isinstance(self._template, Chat):  # some rows repeat a message as the text `prompt`: that one is not read
            used = used - {name for name in PAIR if isinstance(row.get(name), str)}
        unused = [name for name in row if name not in used and not is_absent(row[name])]
        needed = sorted(self._needed.intersection(unused))
        if needed:
            way_out = "write a --template that does, or leave it out of the file"
            raise UserError(f"{where}: has {' and '.join(needed)}, which {self._template.name} does not use; {way_out}")
        self._note_unused(unused)

    def _note_unused(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.unused and len(self.unused) < MOST_NAMES:
                self.unused.append(name)


def is_absent(value: object) -> bool:
    """Whether a field of this value says nothing: null, blank, or an empty list or object."""
    return value.strip() in ("", "[]") if isinstance(value, str) else value in (None, [], {})
