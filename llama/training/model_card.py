"""The model card: README.md beside the weights, which says what they are, how to load them, and how they were made.

https://huggingface.co/docs/hub/model-cards. It is made from run.json, so that the export of a checkpoint has one, too.
It names no path of the machine that trained, except the base as --model gave it, and it shows no row of the data.
"""

import json
import re
from dataclasses import fields
from pathlib import Path

from llama.boundary.errors import as_user_error, printable
from llama.boundary.untrusted import read_json, read_text
from llama.data.chat import Renderer
from llama.data.chat_template import spelled_out
from llama.data.sources import PUBLIC_DATASETS, DataSettings
from llama.data.templates import Template
from llama.data.tokenizer import Tokenizer
from llama.evaluation.score import answer_ids
from llama.storage.base import Base
from llama.storage.companions import CARD, Companions, of_adapter
from llama.storage.manifest import Manifest, checkpoint_at, read_manifest
from llama.training.card_code import LOAD_MODEL, commands, python_code
from llama.training.journal import read_metrics
from llama.training.settings import HowToTrain, WhatToTrain, WhereToTrain

RUN = "run.json"
LOADING, PROMPTS, TRAINING = "How to load it", "Prompts", "How it was trained"  # the sections
SAMPLE_CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! How can I help you?"}]
SAID_IN_WORDS = {"model", "data", "data_dir", "template"}


def companions_of_run(run: dict, identity: dict, base: Base, held_out: dict[str, dict]) -> Companions:
    """What the export of a run writes beside the weights.

    `run`: the content of its run.json; `identity`: that of its plan and checkpoints; `held_out`: metrics on held-out
    data, {"before training": ..., ...}.
    """
    is_adapter = identity["lora"] is not None
    name = _name(base.name) if base.folder else "a small Llama from random weights"
    data = "the bundled sample of made-up reviews" if identity["bundled_sample"] else _name(identity["data"])
    prompt = run["prompt"]
    code = python_code(prompt, base.name if is_adapter else None)
    sections = {LOADING: _loading_section(code, commands(prompt, identity))}
    sections |= _sections(run, identity, held_out)
    kind = "A LoRA adapter for " if is_adapter else ""
    title = f"{kind}{name}, trained on {data}"
    card = _card(base, is_adapter, title, sections, _hub_name(identity))
    chat_template = prompt["chat_template"]
    end_of_turn = prompt["end_of_turn"]
    return Companions.of(base.tokenizer, base.config_json, chat_template, end_of_turn, card)


def companions_of_checkpoint(run: Path, base: Base, manifest: Manifest) -> Companions:
    """The same for one checkpoint of a run, as far as the run's folder tells. Raises UserError for a run.json that is
    not what a run writes."""
    about = _about(run)
    if "prompt" not in about:
        return Companions.of(base.tokenizer, base.config_json)
    with as_user_error(run / RUN, "what a run writes"):
        return companions_of_run(about, manifest.identity, base, _held_out(run, manifest))


def companions_of_merge(base: Base, adapter: Path) -> Companions:
    """What the export of a base with an adapter folded in writes beside the weights. Raises UserError where the
    adapter's folder holds what does not fit the base."""
    sections = {LOADING: _fenced(LOAD_MODEL, "python")}
    saved = checkpoint_at(adapter)
    about = _about(saved.parents[1]) if saved else {}
    if saved and "prompt" in about:
        run = saved.parents[1]
        manifest = read_manifest(saved)
        with as_user_error(run / RUN, "what a run writes"):
            sections |= _sections(about, manifest.identity, _held_out(run, manifest))
    elif (adapter / CARD).is_file():
        heading = rf"^## ({LOADING}|{PROMPTS}|{TRAINING})$"
        text = read_text(adapter / CARD)
        _, *parts = re.split(heading, text, flags=re.MULTILINE)
        found = dict(zip(parts[::2], parts[1::2], strict=True))
        for title in (PROMPTS, TRAINING):
            if title in found:
                sections[title] = found[title].strip()
    card = _card(base, False, f"{_name(base.name)} with a LoRA adapter folded in", sections)
    return of_adapter(adapter, base.tokenizer, base.config_json, card)


def prompt_of(template: Renderer, tokenizer: Tokenizer) -> dict:
    """What run.json keeps of a template, so that others can build prompts as it does.

    example:   a whole example: a template's own text, or a short conversation with its control tokens
    prompt:    what comes before the answer, with {field} for a field of the row; None for a chat
    fields:    the fields of a row that it holds
    answers:   {answer word: its first token}; {} where answers are free text
    chat_template and end_of_turn as in `Companions.of`
    """
    about: dict = {"answers": dict(zip(template.answers, answer_ids(template, tokenizer), strict=True))}
    if isinstance(template, Template):
        pieces = [piece for span in template.alternatives[0] if not span.answer for piece in span.pieces]
        texts = [piece if isinstance(piece, str) else f"{{{piece.name}}}" for piece in pieces]
        names = dict.fromkeys(piece.name for piece in pieces if not isinstance(piece, str))
        about["chat_template"] = None
        about["end_of_turn"] = tokenizer.eos_id
        about["fields"] = list(names)
        about["example"] = template.source
        about["prompt"] = "".join(texts)
        return about
    segments, _ = template.render({"messages": SAMPLE_CHAT}, "the model card")
    about["chat_template"] = template.chat_template(tokenizer)
    about["end_of_turn"] = template.end_of_turn(tokenizer)
    about["example"] = spelled_out(segments, tokenizer)
    about["prompt"] = None
    return about


def _card(base: Base, is_adapter: bool, title: str, sections: dict[str, str], dataset: str | None = None) -> str:
    """The whole text: what the hub reads, between lines of dashes, and what people read."""
    front = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "lora"] if is_adapter else ["llama"],
    }
    is_of_hub = base.folder and base.folder != Path(base.name)
    if is_of_hub:  # the hub refuses a card whose base_model is the name of a folder
        front["base_model"] = base.name
    if dataset:
        front["datasets"] = [dataset]
    lines = ["---"]
    for name, value in front.items():
        lines.append(f"{name}: {json.dumps(value)}")  # JSON is YAML, too
    lines += ["---", "", f"# {title}"]
    if base.folder:
        lines += ["", f"The base model is {_code(base.name)}."]
    for name, text in sections.items():
        lines += ["", f"## {name}", "", text]
    return "\n".join(lines) + "\n"


def _loading_section(code: str, own_commands: str) -> str:
    ours = "The scripts that trained it use it, too; FOLDER is this folder:"
    return f"{_fenced(code, 'python')}\n\n{ours}\n\n{_fenced(own_commands, 'bash')}"


def _sections(run: dict, identity: dict, held_out: dict[str, dict]) -> dict[str, str]:
    return {PROMPTS: _prompts(run["prompt"]), TRAINING: _training(run, identity, held_out)}


def _about(run: Path) -> dict:
    return read_json(run, RUN) if (run / RUN).exists() else {}


def _held_out(run: Path, manifest: Manifest) -> dict[str, dict]:
    """The metrics of a checkpoint, and those before training."""
    lines = read_metrics(run / "metrics.jsonl")
    before: dict = next((line["held_out"] for line in lines if line["step"] == 0 and "held_out" in line), {})
    return {"before training": before, f"after step {manifest.step}": manifest.held_out}


def _prompts(prompt: dict) -> str:
    example = _fenced(prompt["example"])
    if prompt["prompt"] is None:
        return f"An example as it was trained on; the tokenizer's chat template builds the same prompt:\n\n{example}"
    return (
        "This is the template that every example was made with: {field} stands for a field of the row, and the answer "
        f"is between double brackets.\n\n{example}\n\n"
        "In training, the parts of an example were encoded one by one. Where a whole prompt is encoded at once, a few "
        "ids at the borders of its fields may differ. A chat template among the tokenizer's files is the base's own, "
        "and was not trained on."
    )


def _training(run: dict, identity: dict, held_out: dict[str, dict]) -> str:
    unit = "packs of examples" if run["settings"]["batch_tokens"] else "examples"
    parts = [
        f"On {run['examples']['train']:,} examples, made with the template {_code(_name(identity['template']))}; "
        f"{identity['steps']:,} steps of {identity['global_batch']} {unit} were planned."
    ]
    names = {name: None for metrics in held_out.values() for name in metrics}
    if names:
        rows = [["", *names]]
        for when, metrics in held_out.items():
            rows.append([when, *(_number(metrics.get(name)) for name in names)])
        parts += ["On held-out examples:", _table(rows)]
    rows = [["setting", "value"]]
    for name, value in _changed(run["settings"]).items():
        rows.append([_code(f"--{name}"), _code(_number(value))])
    parts += ["Settings that are not the defaults, and those that depend on the model or the machine:", _table(rows)]
    return "\n\n".join(parts)


def _changed(settings: dict) -> dict:
    """The settings of run.json that say what was trained, and how, and that are not their defaults."""
    found = {}
    for owner in (WhatToTrain, HowToTrain, WhereToTrain, DataSettings):
        for entry in fields(owner):
            value = settings.get(entry.name)
            if value not in (None, entry.default) and entry.name not in SAID_IN_WORDS:
                found[entry.name] = value
    return found


def _table(rows: list[list[str]]) -> str:
    """The first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    return "\n".join(lines)


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _name(path: str) -> str:
    """The last part of a name or path, and not where it lies on the machine that trained."""
    return _plain(Path(path).name or path)


def _hub_name(identity: dict) -> str | None:
    """The hub's name of a public data set."""
    public = PUBLIC_DATASETS.get(identity["data"].partition(":")[0])
    return public.repo if public and not identity["bundled_sample"] else None


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """Text that can neither leave its line nor be read as markup."""
    return re.sub(r"[`*<>\[\]|]", "'", printable(text))


def _fenced(text: str, language: str = "text") -> str:
    """A block of code, between fences that are longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, text.removesuffix("\n"), fence])
