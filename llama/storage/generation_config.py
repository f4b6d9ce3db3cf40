"""What the files of a model say about generation: the ids that end an answer, and settings that only flags can set.

https://huggingface.co/docs/transformers/main_classes/text_generation#transformers.GenerationConfig
"""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama.boundary.errors import first_few
from llama.boundary.records import check_values
from llama.data.chat import Chat, Renderer
from llama.data.tokenizer_folder import eos_ids, read_if_there
from llama.generation.settings import GenerationSettings
from llama.storage.base import Base
from llama.storage.companions import GENERATION, learned_prompts, of_adapter

EOS_FILES = ("config.json", GENERATION)
# transformers uses the first four only if do_sample is true (here: a temperature above 0), and the last two only with
# several beams.
OF_DRAWS = ("temperature", "top_k", "top_p", "min_p")
OF_BEAMS = ("length_penalty", "early_stopping")
# These change no text, or are read elsewhere.
HARMLESS = {
    "do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "use_cache",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
}  # fmt: skip


def stop_ids(base: Base, template: Renderer | None = None, adapter: str | Path | None = None) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's end token; every eos_token_id of config.json and
    generation_config.json; the end of a turn, if `template` is a chat layout; the end of a turn that the run of a
    checkpoint has learned; and those that the files of an `adapter` name.

    Raises UserError for an eos_token_id that is neither a whole number nor a list of them, and for an adapter whose
    answers end in a token that the base does not have.
    """
    found = {base.tokenizer.eos_id}
    for folder in (base.folder, adapter):
        if folder is not None:
            for name in EOS_FILES:
                found.update(eos_ids(Path(folder), name))
    if isinstance(template, Chat):
        found.add(template.end_of_turn(base.tokenizer))
    if base.checkpoint:
        _, end_of_turn = learned_prompts(base.checkpoint, base.tokenizer)
        if end_of_turn is not None:
            found.add(end_of_turn)
    if adapter is not None:
        found.update(of_adapter(Path(adapter), base.tokenizer, base.config_json).eos_ids)
    return frozenset(found)


def generation_notes(base: Base, adapter: str | Path | None = None) -> list[str]:
    """Sentences on what generation_config.json asks for and is not used: settings that have a flag here, and settings
    that have none. A generation_config.json in the adapter's folder counts instead of the base's.

    Raises UserError for a value that the flag of this name would not take.
    """
    holders = [Path(folder) for folder in (adapter, base.folder) if folder is not None]
    path = next((folder / GENERATION for folder in holders if os.path.lexists(folder / GENERATION)), None)
    if path is None:
        return []
    about = read_if_there(path.parent, GENERATION)
    asked = _asked_for(about)
    check_values(GenerationSettings, asked, path)
    defaults = {entry.name: entry.default for entry in fields(GenerationSettings)}
    flags = {name: value for name, value in asked.items() if value != defaults[name]}
    notes = []
    if flags:
        named = ", ".join(f"{name} {value}" for name, value in flags.items())
        typed = " ".join(f"--{name} {value}" for name, value in flags.items())
        notes.append(f"{path}: asks for {named}; they are used only as flags: {typed}")
    unused = [
        name
        for name, value in about.items()
        if name not in asked
        and name not in HARMLESS
        and not name.startswith("_")
        and value not in (None, False, [], {})
    ]
    if unused:
        notes.append(f"{path}: not used: {first_few(unused, 12)}")
    ends = [id for name in EOS_FILES for id in eos_ids(path.parent, name)]
    beyond = [id for id in ends if not 0 <= id < base.config.vocab_size]
    if beyond:
        notes.append(
            f"{path.parent}: eos_token_id {beyond[0]} is no id of the model, which has {base.config.vocab_size}"
        )
    return notes


def _asked_for(about: dict) -> dict[str, Any]:
    """The settings of generation_config.json that we have, under their names, as our flags take them."""
    draws = about.get("do_sample") is True
    has_beams = about.get("num_beams") not in (None, 1)
    asked = {"temperature": 1.0} if draws else {}  # where nothing else is said, transformers draws at this one
    for entry in fields(GenerationSettings):
        is_looked_at = (draws or entry.name not in OF_DRAWS) and (has_beams or entry.name not in OF_BEAMS)
        if is_looked_at and about.get(entry.name) is not None:
            asked[entry.name] = about[entry.name]
    early = asked.get("early_stopping")
    if isinstance(early, bool):
        asked["early_stopping"] = str(early).lower()
    return asked
