"""Which template a data set gets: the one that the user names, or the one that the fields of its rows belong to. Where
none fits, an error shows a template of these fields, ready to save.
"""

import re
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from llama.boundary.errors import UserError, printable
from llama.data.chat import LAYOUTS, Chat, Renderer, find_chat, find_served_chat
from llama.data.conversation import PAIR
from llama.data.rendering import PROMPT_FIELDS, is_absent
from llama.data.rows import read
from llama.data.sources import PUBLIC_DATASETS, Source
from llama.data.templates import NAMES, TEMPLATES, Template, described
from llama.data.tokenizer import Tokenizer
from llama.data.unlabelled import UnlabelledTemplate

GUESSED_FROM = 200  # rows
MOST_WORDS = 20  # that a suggested template makes an answer of
LONGEST_WORD = 40
MOST_FIELDS = 50  # of rows for which a template is suggested
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
WORD = re.compile(rf"[^\s,{{}}[\]]([^\n,{{}}[\]]{{0,{LONGEST_WORD - 2}}}[^\s,{{}}[\]])?")
NAME = re.compile(r"[^\s=.{}[\]]([^\n=.{}[\]]{0,38}[^\s=.{}[\]])?")
# Names of what an answer is often called, of which the first that a row has is the answer of a suggested template.
ANSWER_NAMES = ("completion", "response", "output", "answer", "chosen", "target", "label", "summary", "translation")


class NoTemplate(UserError):
    """No template fits: a line that says so, and the lines of a template that would."""

    def __init__(self, message: str, template: str | None):
        known = ", ".join([*NAMES, "chat"])
        own = "or save this one in a file, adapt it and name that:" if template else "or a file of your own"
        self._lines = [f"{message}; name one with --template ({known}), {own}", *(template or "").splitlines()]
        super().__init__("\n".join(self._lines))

    @property
    def lines(self) -> list[str]:
        return [printable(line) for line in self._lines]


@dataclass
class Seen:
    """What the first rows hold under one name: of which types, how much, and which short values."""

    types: set[type] = field(default_factory=set)
    characters: int = 0
    rows: int = 0
    words: set[str | int] = field(default_factory=set)

    def add(self, value: object) -> None:
        self.types.add(type(value))
        self.characters += len(value) if isinstance(value, str) else 0
        self.rows += 1
        if isinstance(value, str | int) and len(self.words) <= MOST_WORDS:
            self.words.add(value if isinstance(value, int) else value[: LONGEST_WORD + 1])

    def choices(self, name: str) -> list[str]:
        """The words that an answer of these values is one of; [] where it is free text."""
        words = {str(word) for word in self.words}
        is_few = 2 <= len(words) <= min(MOST_WORDS, self.rows // 2)
        numbers = [int(word) for word in words if re.fullmatch("[0-9]{1,2}", word)]
        if len(numbers) == len(words) and 0 <= max(numbers, default=-1) < MOST_WORDS:
            count = max(2, max(numbers) + 1)
            if self.types == {int} or (is_few and len(words) == count):  # a table holds numbers as text
                return [f"{name} {number}" for number in range(count)]
        are_words = self.types == {str} and all(map(WORD.fullmatch, words))
        if is_few and are_words:
            return sorted(words)
        return []


def find_template(
    name: str | None, source: Source, tokenizer: Tokenizer, system: str | None = None, asks: bool = False
) -> Renderer:
    """The template of this name or file, else of the public data set, else the one that the rows' fields belong to.
    `asks`: the rows may lack their answers.

    Raises UserError when there is none, or more than one, or its file is not well formed.
    """
    if name is None and source.name in PUBLIC_DATASETS:
        name = source.name
    elif name is None:
        name = _guess(next(iter(source.files.values()))[0], asks)
    if name == "chat" or name in LAYOUTS:
        find = find_served_chat if asks else find_chat
        return find(name, system, tokenizer, chain.from_iterable(source.files.values()))
    if system:
        raise UserError(f"--system {system!r:.40}: only conversations have a system turn, found the template {name}")
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        known = ", ".join([*TEMPLATES, "chat", *LAYOUTS])
        raise UserError(f"--template {name}: no such file, nor one of {known}")
    try:
        return Template(name, Path(name).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"--template {name}: byte {error.start} is not UTF-8") from None


def _guess(path: Path, asks: bool) -> str:
    """The template that uses most of the fields that the first rows have. `asks`: they may lack those of the answer.

    Never `imdb`: many files have a text and a label, and few of them are reviews of films.
    """
    row, seen = _look_at(path)
    uses = {}
    lacking = []
    for name in NAMES:
        template = TEMPLATES[name]
        unused = seen.keys() - template.columns
        is_whole_row = name != "text" or not unused  # beside other fields, a text is often what an answer is about
        needed = template.fields
        if asks:
            asked = UnlabelledTemplate(template).asked
            needed = template.fields & asked.keys()
            is_whole_row = bool(asked.keys() & seen.keys())
        if name == "imdb" or not needed <= seen.keys() or not is_whole_row:
            continue
        if unused & PROMPT_FIELDS:
            unread = " and ".join(sorted(unused & PROMPT_FIELDS))
            lacking.append(f"fit {name}, which does not use {unread}")
        else:
            uses[name] = len(template.columns & seen.keys())
    is_pair = all(_is_list(seen, name) for name in (PAIR[:1] if asks else PAIR))
    if is_pair:
        uses.pop("prompt_completion", None)  # which has texts under these names
    if is_pair or any(fields <= seen.keys() for fields in Chat.spellings):
        uses["chat"] = len(seen)
    best = [name for name, count in uses.items() if count == max(uses.values())]
    if len(best) == 1:
        return best[0]
    what = f"fit {' and '.join(best)}" if best else " and ".join(lacking) or "are those of no known template"
    if path.name.endswith(TABLES):
        what += " (the first row of a table names its columns)"
    raise NoTemplate(f"{path}: the fields {described(row)} {what}", None if asks else suggestion(seen))


def _is_list(seen: dict[str, Seen], name: str) -> bool:
    return name in seen and seen[name].types == {list}


def _look_at(path: Path) -> tuple[dict, dict[str, Seen]]:
    """A row with every field of the first rows, and what they hold, {name: Seen}. Null and empty values are as absent.
    """
    merged: dict = {}
    errors = []
    seen: dict[str, Seen] = {}
    rows = 0
    for _, row in islice(read(path), GUESSED_FROM):
        rows += 1
        if isinstance(row, UserError):
            errors.append(row)
            continue
        for name, value in row.items():
            merged.setdefault(name, value)
            if not is_absent(value):
                seen.setdefault(name, Seen()).add(value)
                merged[name] = value
    if not rows:
        raise UserError(f"{path}: no rows")
    if rows == len(errors):
        raise errors[0]
    return merged, seen


def suggestion(seen: dict[str, Seen]) -> str | None:
    """A template of these fields: texts, each under its name, and then the answer. None where no field can be one,
    where what seems to be the answer is neither text nor a few words, or where there are very many fields."""
    if len(seen) > MOST_FIELDS:
        return None
    names = [name for name in seen if NAME.fullmatch(name)]
    texts = [name for name in names if seen[name].types == {str}]
    possible = [name for name in names if name in texts or seen[name].choices(name)]
    answer = next((name for name in ANSWER_NAMES if name in seen), possible[-1] if possible else None)
    if answer not in possible:
        return None
    prompt = [name for name in texts if name != answer]
    if not prompt:
        return f"[[{{{answer}}}]]" if answer in texts else None
    longest = max(prompt, key=lambda name: seen[name].characters)
    parts = {name: f"{name}:\n{{{name}{'...' if name == longest else ''}}}\n\n" for name in prompt}
    choices = seen[answer].choices(answer)
    last = f"{answer}:[[ {{{answer}={','.join(choices)}}}]]" if choices else f"{answer}:\n[[{{{answer}}}]]"
    most = max(seen[name].rows for name in prompt)
    always = [name for name in prompt if seen[name].rows == most]
    alternatives = [prompt, always] if len(always) == len(prompt) - 1 else [prompt]
    return "\n=====\n".join("".join(parts[name] for name in fields) + last for fields in alternatives)
