"""The chat template of a model's folder: the prompt that transformers, vLLM and llama.cpp will ask the model with.

It is a program in Jinja, which a stranger wrote: it is rendered in a process with limits (`jinja_process`).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from llama.boundary.errors import UserError, as_user_error, one_line
from llama.boundary.untrusted import LARGEST_TEXT, read_json, read_text
from llama.data.conversation import Turn
from llama.data.encoding import encode_rows
from llama.data.layouts import LAYOUTS
from llama.data.templates import END, Segment
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_folder import read_if_there

# Limits of the process that renders. An ordinary template takes milliseconds and some MB.
SECONDS = 5  # of its CPU; of the clock ten times as much, because a busy disk may be slow to start it
BYTES = 1 << 30
CHARACTERS = LARGEST_TEXT  # of the template, and of what it writes
RENDERER = Path(__file__).with_name("jinja_process.py")
TEMPLATE_NAME = re.compile(r"\w[\w .-]{0,99}")
DAYS = ("2001-02-03", "2014-05-06")  # a template that writes different texts on these days writes a date
SYSTEM = Turn("system", "Be brief.")
TALK = [Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "Bye")]


class Inserted(NamedTuple):
    """What is put into a conversation: a system turn where it has none (`alone`), or the start of the one it has."""

    alone: str
    before: str


NOTHING_INSERTED = Inserted("", "")


class Written(NamedTuple):
    """What a chat template writes for a conversation, or why it writes nothing."""

    text: str
    error: str


class ChatTemplate:
    """A chat template, and what it writes.

    probes: what it writes for TALK on each of DAYS, and for TALK behind a system turn.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self.source = source
        self.tokenizer = tokenizer
        try:
            self.probes = self.write([(TALK, DAYS[0]), (TALK, DAYS[1]), ([SYSTEM, *TALK], DAYS[0])])
        except UserError as error:
            self.probes = [Written("", str(error))] * 3

    @property
    def problem(self) -> str:
        """Why it does not even write a plain conversation; "" where it does."""
        return self.probes[0].error

    @property
    def writes_date(self) -> bool:
        return self.probes[0] != self.probes[1]

    def write(self, talks: Sequence[tuple[Sequence[Turn], str | None]]) -> list[Written]:
        """The prompts behind which the assistant answers. `talks`: (turns, the day that it is, None: today).

        Raises UserError for a template that exceeds the limits.
        """
        conversations = []
        for turns, day in talks:
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            conversations.append({"messages": messages, "date": day})
        request = {
            "template": self.source,
            "variables": _special_tokens(self.tokenizer),
            "conversations": conversations,
            "seconds": SECONDS,
            "bytes": BYTES,
            "characters": CHARACTERS,
        }
        command = [sys.executable, "-P", str(RENDERER)]  # -P: files beside it are not modules
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
                timeout=10 * SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"takes more than {10 * SECONDS} seconds") from None
        if done.returncode < 0:
            raise UserError(f"takes more than {SECONDS} seconds of CPU or {BYTES >> 30} GiB of memory")
        if done.returncode > 0:
            raise UserError(f"cannot be rendered ({one_line(RuntimeError(done.stderr[-200:]))})")
        return [Written(*pair) for pair in json.loads(done.stdout)]

    def inserts(self, layout: str) -> Inserted | None:
        """What it inserts into conversations that it otherwise writes as our layout does. None where it writes them in
        another way. A BOS that only one of the two writes is no difference here."""
        without, _, with_system = self.probes
        plain = self._without_bos(prompt_text(layout, TALK, self.tokenizer))
        spoken = self._without_bos(prompt_text(layout, [SYSTEM, *TALK], self.tokenizer))
        start, _, end = spoken.partition(SYSTEM.content)

        def system_turn(written: Written) -> str | None:
            text = self._without_bos(written.text)
            found = text.startswith(start) and text.endswith(end) and len(text) >= len(start + end)
            return text[len(start) : len(text) - len(end)] if found else None

        alone = "" if self._without_bos(without.text) == plain else system_turn(without)
        given = system_turn(with_system) or ""
        return None if alone is None else Inserted(alone, given.removesuffix(SYSTEM.content))

    def ids(self, text: str) -> list[int]:
        """The ids that transformers makes of the whole text, in which it looks for control tokens: by the library of
        tokenizer.json, or, for a tokenizer.model and its LlamaTokenizer, by transformers' rule for the space before a
        text."""
        names = self.tokenizer.control_names
        if self._codec and all(self._codec.token_to_id(name) is not None for name in names):
            return self._codec.encode(text, add_special_tokens=False).ids
        is_legacy = bool(_settings(self.tokenizer, "tokenizer_config.json").get("legacy"))
        names = sorted(names, key=len, reverse=True)
        ids = []
        for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            if self.tokenizer.has_control(piece):
                ids.append(self.tokenizer.control_id(piece))
            elif piece:
                # The old rule puts a space behind every control token, unless there is one.
                starts_text = not ids or (is_legacy and not piece.startswith(" "))
                encoded = self.tokenizer.encode(piece, starts_text)
                has_bos = starts_text and self.tokenizer.bos_id is not None
                ids += encoded[1:] if has_bos else encoded
        return ids

    @cached_property
    def _codec(self) -> Any:
        from tokenizers import Tokenizer as Codec

        file = _folder(self.tokenizer) / "tokenizer.json"
        try:
            codec = Codec.from_file(str(file)) if file.exists() else None
        except Exception:  # of any class; `Tokenizer` reads a part of the file, and the library all of it
            return None
        name = str(_settings(self.tokenizer, "tokenizer_config.json").get("tokenizer_class")).removesuffix("Fast")
        # transformers' LlamaTokenizer has steps of its own, those of a tokenizer.model, unless the file is byte-level.
        return None if name == "LlamaTokenizer" and codec and "ByteLevel" not in str(codec.pre_tokenizer) else codec

    def _without_bos(self, text: str) -> str:
        bos_id = self.tokenizer.bos_id
        bos = None if bos_id is None else self.tokenizer.control_name(bos_id)
        return text.removeprefix(bos or _special_tokens(self.tokenizer).get("bos_token", ""))


def read_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The usual chat template in the tokenizer's folder, None where there is none. Raises UserError as
    `chat_templates` does, also for the others: an export will copy them."""
    source: Any = chat_templates(tokenizer.files).get("default")
    if source is None:
        source = _settings(tokenizer, "chat_template.json").get("chat_template")
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > CHARACTERS:
        raise UserError(f"{_folder(tokenizer)}: chat_template, expected text of at most {CHARACTERS} characters")
    return ChatTemplate(source, tokenizer)


def chat_templates(files: Sequence[Path]) -> dict[str, str]:
    """{name: Jinja text} of the chat templates among a tokenizer's files. The usual one is called `default`.

    As transformers reads them: those of tokenizer_config.json, one text or a list of names and texts, unless there are
    files of their own. Raises UserError for what is neither, and for a name that cannot be a file's.
    """
    found: dict[str, str] = {}
    for path in files:
        if path.name == "tokenizer_config.json":
            found |= _listed_templates(path, read_json(path.parent, path.name).get("chat_template"))
    for path in files:
        if path.suffix == ".jinja":
            found["default" if path.name == "chat_template.jinja" else path.stem] = read_text(path)
    return found


def _listed_templates(where: Path, listed: Any) -> dict[str, str]:
    """{name: Jinja text} of the value of chat_template in tokenizer_config.json."""
    templates = {"default": listed} if isinstance(listed, str) else {}
    if listed is not None and not isinstance(listed, str):
        with as_user_error(where, "chat_template to be a text, or a list of names and templates"):
            templates = {one["name"]: one["template"] for one in listed}
    for name, text in templates.items():
        if not isinstance(name, str) or not TEMPLATE_NAME.fullmatch(name):
            raise UserError(
                f"{where}: names the chat template {name!r:.100}, expected letters, digits and spaces; rename it there"
            )
        if not isinstance(text, str) or len(text) > CHARACTERS:
            raise UserError(f"{where}: chat_template {name!r}, expected text of at most {CHARACTERS} characters")
    return templates


def prompt_text(layout: str, turns: Sequence[Turn], tokenizer: Tokenizer) -> str:
    """What is trained as the prompt of the next answer, with its control tokens by name."""
    return spelled_out(prompt_segments(layout, turns), tokenizer)


def spelled_out(segments: Sequence[Segment], tokenizer: Tokenizer) -> str:
    """The text of segments, with BOS, the end token and all other control tokens by name."""
    bos = None if tokenizer.bos_id is None else tokenizer.control_name(tokenizer.bos_id)
    text = ""
    for number, segment in enumerate(segments):
        if bos and (number == 0 or segment.starts_text):
            text += bos
        is_end = segment.control and segment.text == END
        text += tokenizer.control_name(tokenizer.eos_id) or "" if is_end else segment.text
    return text


def prompt_ids(layout: str, turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """The ids that are trained as the prompt of the next answer."""
    longest = 1 << 30
    (encoded,) = encode_rows([prompt_segments(layout, turns)], tokenizer, longest, "right")
    assert encoded is not None  # it has no answer of which no label could fit
    return encoded.ids


def prompt_segments(layout: str, turns: Sequence[Turn]) -> list[Segment]:
    """What is trained as the prompt of the next answer: all that comes before its text."""
    asked = [turn._replace(learned=False) for turn in turns]
    segments = []
    for segment in LAYOUTS[layout]([*asked, Turn("assistant", "x", learned=True)]):
        if segment.answer:
            break
        segments.append(segment)
    return segments


def _folder(tokenizer: Tokenizer) -> Path:
    return tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent


def _settings(tokenizer: Tokenizer, name: str) -> dict:
    return read_if_there(_folder(tokenizer), name)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """{bos_token: its text, ...}: what the folder names, and for BOS and end token else what the tokenizer has."""
    named = {}
    for id, name in ((tokenizer.bos_id, "bos_token"), (tokenizer.eos_id, "eos_token")):
        known = None if id is None else tokenizer.control_name(id)
        if known:
            named[name] = known
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _settings(tokenizer, file)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            text = values.get(name)
            text = text.get("content") if isinstance(text, dict) else text
            if isinstance(text, str):
                named[name] = text
    return named
