"""What an export writes beside the weights, so that other programs build the prompts that were trained on, stop where
an answer ends, and people know what they have before them.

    the tokenizer's files                copied, with what was learned written into them:
      generation_config.json             eos_token_id: the learned end first, then those of the base
      tokenizer_config.json              eos_token, chat_template
      chat_template.jinja                transformers, vLLM and llama.cpp build prompts with it
      additional_chat_templates/*.jinja  the base's other templates; the one that was replaced is called `base`
    README.md                            the model card
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama.boundary.durable import sync, write_durably
from llama.boundary.errors import UserError, as_user_error
from llama.boundary.untrusted import inside, read_json
from llama.data.chat_template import chat_templates
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_folder import CHAT_TEMPLATES
from llama.storage.manifest import checkpoint_at

CARD, CHAT_TEMPLATE = "README.md", "chat_template.jinja"
GENERATION, SETTINGS, SPECIAL = "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"
# The names of what is written here. A left-over folder with any other file in it is not ours to delete.
OURS = re.compile(
    rf"README\.md|chat_template\.jinja|{CHAT_TEMPLATES}(/[^/]+\.jinja)?|generation_config\.json|tokenizer[^/]*|"
    r"special_tokens_map\.json|added_tokens\.json"
)


@dataclass(frozen=True)
class Companions:
    """What an export writes beside the weights.

    files:         the tokenizer's files, to copy.
    eos_ids:       the ids that end an answer, the learned one first; (): as the files say.
    eos_token:     the token that ends an answer, where it is another than the tokenizer's own; None: as the files say.
    chat_template: Jinja text that builds the prompts that were trained on; None: as the files say.
    card:          the text of README.md; None: no such file.
    """

    files: Sequence[Path] = ()
    eos_ids: Sequence[int] = ()
    eos_token: str | None = None
    chat_template: str | None = None
    card: str | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        config_json: dict,
        chat_template: str | None = None,
        end_of_turn: int | None = None,
        card: str | None = None,
    ) -> "Companions":
        """Those of a base whose answers now end in the token `end_of_turn`; None: in the tokenizer's own end token."""
        learned = tokenizer.eos_id if end_of_turn is None else end_of_turn
        eos_ids: list[int | None] = [learned]
        for values in (config_json, _read_if_among(tokenizer.files, GENERATION)):
            known = values.get("eos_token_id")
            eos_ids += known if isinstance(known, list) else [known]
        unique = [id for i, id in enumerate(eos_ids) if id is not None and id not in eos_ids[:i]]
        eos_token = tokenizer.control_name(learned) if learned != tokenizer.eos_id else None
        return cls(tokenizer.files, unique, eos_token, chat_template, card)

    @property
    def special_tokens(self) -> dict:
        """The eos_token_id of config.json and generation_config.json: a number, or a list of several; {}: unknown."""
        if not self.eos_ids:
            return {}
        if len(self.eos_ids) == 1:
            return {"eos_token_id": self.eos_ids[0]}
        return {"eos_token_id": list(self.eos_ids)}

    def write(self, folder: Path, special_tokens: dict | None = None) -> None:
        """Write all of it into a folder; it is on disk when this returns. For one process, and not collective.

        `special_tokens`: what a generation_config.json says where the base has none. Raises UserError for a file of the
        base that is not what its name says, OSError where nothing can be read or written.
        """
        texts = self._texts(special_tokens or {})
        copies = {_name_in_export(path): path for path in self.files}
        for name in texts.keys() | copies.keys():
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            if name in texts:
                write_durably(target, texts[name])
            else:
                shutil.copyfile(copies[name], target)
                sync(target)
            sync(target.parent)

    def owns(self, name: str) -> bool:
        """Whether `write` may have left a file or folder of this name."""
        return bool(OURS.fullmatch(name)) or self._has(name)

    def _texts(self, special_tokens: dict) -> dict[str, str]:
        """{name: text} of the files that differ from those of the base, or that it does not have."""
        settings = {} if self.eos_token is None else {"eos_token": self.eos_token}
        texts = {} if self.card is None else {CARD: self.card}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template  # transformers before 4.43 reads it nowhere else
            texts |= self._template_files(self.chat_template)
        special = {"eos_token": self.eos_token} if self.eos_token and self._has(SPECIAL) else {}
        generation = special_tokens if not self._has(GENERATION) else {}
        changes = {SETTINGS: settings, SPECIAL: special, GENERATION: generation | self.special_tokens}
        for name, values in changes.items():
            old = _read_if_among(self.files, name)
            new = old | values
            if new != old:
                texts[name] = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
        return texts

    def _has(self, name: str) -> bool:
        return name in map(_name_in_export, self.files)

    def _template_files(self, trained: str) -> dict[str, str]:
        """{name: text} of the chat template that was trained on, and of the base's others under other names."""
        others = chat_templates(self.files)
        replaced = others.pop("default", trained)
        known = {text.strip() for text in (trained, *others.values())}
        if replaced.strip() not in known:
            name = "base"
            number = 2
            while name in others:
                name = f"base-{number}"
                number += 1
            others[name] = replaced
        files = {CHAT_TEMPLATE: trained}
        for name, text in others.items():
            files[f"{CHAT_TEMPLATES}/{name}.jinja"] = text
        return files


NO_COMPANIONS = Companions()


def of_adapter(folder: Path, tokenizer: Tokenizer, config_json: dict, card: str | None = None) -> Companions:
    """Those of a base that an adapter is merged into: the adapter's folder may hold a tokenizer's files, too, which say
    what its answers end in and how its prompts are built; for a checkpoint its run says it. Raises UserError where the
    base has no such end token."""
    saved = checkpoint_at(folder)
    if saved:
        chat_template, end_of_turn = learned_prompts(saved, tokenizer)
        return Companions.of(tokenizer, config_json, chat_template, end_of_turn, card)
    names = [name for name in (SETTINGS, CHAT_TEMPLATE) if (folder / name).exists()]
    files = [folder / name for name in names if inside(folder, name, "")]
    eos = _read_if_among(files, SETTINGS).get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos is not None and not (isinstance(eos, str) and tokenizer.has_control(eos)):
        expected = "a control token of the base; is it the one that the adapter was trained over?"
        raise UserError(f"{folder / SETTINGS}: eos_token is {eos!r:.100}, expected {expected}")
    end_of_turn = None if eos is None else tokenizer.control_id(eos)
    return Companions.of(tokenizer, config_json, chat_templates(files).get("default"), end_of_turn, card)


def learned_prompts(saved: Path, tokenizer: Tokenizer) -> tuple[str | None, int | None]:
    """The chat template that the run of a checkpoint has trained, and the id that ends its answers; None where its
    run.json does not tell. Raises UserError where that is not what a run writes."""
    path = saved.parents[1] / "run.json"
    if not path.is_file():
        return None, None
    with as_user_error(path, "what a run writes"):
        prompt = read_json(path.parent, path.name).get("prompt", {})
        chat_template, end_of_turn = prompt.get("chat_template"), prompt.get("end_of_turn")
        if not isinstance(chat_template, str | None):
            raise TypeError(f"chat_template is {chat_template!r:.60}")
        if end_of_turn is not None and (type(end_of_turn) is not int or end_of_turn not in range(tokenizer.vocab_size)):
            raise TypeError(f"end_of_turn is {end_of_turn!r:.60}")
    return chat_template, end_of_turn


def _read_if_among(files: Sequence[Path], name: str) -> dict:
    for path in files:
        if _name_in_export(path) == name:
            return read_json(path.parent, name)
    return {}


def _name_in_export(path: Path) -> str:
    """Where an export puts a file of the tokenizer's folder."""
    is_template = path.parent.name == CHAT_TEMPLATES and path.suffix == ".jinja"
    return f"{CHAT_TEMPLATES}/{path.name}" if is_template else path.name
