"""What the files beside a tokenizer say about it: its control tokens, BOS, the end token, and what an export copies.

Whatever they hold that is not used, and could change the ids, is announced in `notes`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from llama.boundary.errors import UserError, as_user_error, first_few
from llama.boundary.untrusted import inside, read_json
from llama.data.added_tokens import AddedToken, check_ids
from llama.data.layouts import CONTROL_TOKENS
from llama.data.tokenizer import TokenizerFacts

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
EOS_FILES = ("generation_config.json", "config.json")

# The keys of tokenizer_config.json: those that are used here (and all that end in _token), and those that change no id.
# A key that stands in neither list is announced.
USED_KEYS = """
    added_tokens_decoder additional_special_tokens extra_special_tokens model_specific_special_tokens
    add_bos_token add_eos_token add_prefix_space legacy tokenizer_class chat_template
""".split()
HARMLESS_KEYS = """
    model_max_length max_length truncation truncation_side truncation_strategy stride
    padding padding_side pad_to_multiple_of pad_token_type_id
    bos_token_id eos_token_id pad_token_id unk_token_id
    clean_up_tokenization_spaces spaces_between_special_tokens split_special_tokens errors
    tokenizer_file vocab_file merges_file special_tokens_map_file name_or_path _commit_hash is_local local_files_only
    processor_class model_type model_input_names return_token_type_ids response_schema transformers_version
    use_default_system_prompt use_fast from_slow backend device_map init_inputs trust_remote_code
""".split()


def read_folder(
    path: Path,
    file: Path,
    vocab: dict[str, int],
    own: Sequence[AddedToken],
    bos_id: int | None,
    eos_id: int | None,
    spelled: Sequence[str],
) -> TokenizerFacts:
    """What a tokenizer's `file` says (`vocab`, its `own` added tokens, BOS and end token), completed by the JSON files
    beside it: they may add tokens, say which are control tokens, and name another end token.

    `spelled`: control tokens that texts may spell. Raises UserError where the files contradict each other.
    """
    folder = file.parent
    settings = read_settings(folder)
    with as_user_error(f"{folder}: tokenizer_config.json or a file beside it", "tokens by their names"):
        tokens = _read_tokens(file, folder, settings, own)
        named = _named_tokens(settings)
    check_ids(file, vocab, tokens.values())
    ids = vocab | {token.content: token.id for token in tokens.values()}
    eos_id = _end_token(file, settings, ids, eos_id)

    control = {name: ids[name] for name in named if name in ids}
    # A chat layout adds its tokens by their ids. So they are control tokens, whatever the files call them.
    of_layouts = {token for layout in CONTROL_TOKENS.values() for token in layout}
    for token in tokens.values():
        if token.special or token.content in of_layouts:
            control[token.content] = token.id
    control |= {token: id for token, id in ids.items() if id == eos_id}

    unknown = [name for name in spelled if name not in control and name not in tokens]
    if unknown:
        known = first_few([*control])
        raise UserError(f"--control_tokens: {file} has no control token {first_few(unknown)}, expected some of {known}")
    in_texts = [token for token in tokens.values() if token.content not in control or token.content in spelled]
    in_texts += [AddedToken(name, ids[name], special=True) for name in spelled if name not in tokens]

    bos_id, notes = _begin_token(file, settings, ids, bos_id)
    notes += [*_unused(folder, settings, ids, named), *_other_ends(folder, ids, eos_id)]
    return TokenizerFacts(
        path, _files(file), 1 + max(ids.values()), control, in_texts, bos_id, eos_id, notes, tuple(spelled)
    )


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json. Where that declares no tokens, special_tokens_map.json wins, as in transformers."""
    settings = read_if_there(folder, "tokenizer_config.json")
    if settings.get("added_tokens_decoder") is None:
        settings |= read_if_there(folder, "special_tokens_map.json")
    return settings


def _read_tokens(file: Path, folder: Path, settings: dict, own: Sequence[AddedToken]) -> dict[str, AddedToken]:
    """{text: added token} from the tokenizer's own file and the two places beside it. tokenizer_config.json wins."""
    more = read_if_there(folder, "added_tokens.json")
    declared = settings.get("added_tokens_decoder") or {}
    listed = [AddedToken(text, id, normalized=True) for text, id in more.items()]
    listed += own
    listed += [AddedToken.read(values, int(id)) for id, values in declared.items()]
    tokens: dict[str, AddedToken] = {}
    for token in listed:
        before = tokens.get(token.content, token)
        if before.id != token.id:
            found = f"the added token {token.content!r:.100} has the ids {before.id} and {token.id}"
            raise UserError(f"{file}: {found} in this and the files beside it, expected one id")
        tokens[token.content] = token
    return tokens


def _named_tokens(settings: dict) -> list[str]:
    """The control tokens that tokenizer_config.json names: bos_token, eos_token, ..., and lists of further ones."""
    named = {}
    for key, value in settings.items():
        if key.endswith("_token") and type(value) is not bool:  # add_bos_token is one
            named[key] = [value]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        more = settings.get(key)
        named[key] = list(more.values()) if isinstance(more, dict) else more or []
    found: list = []
    for key, tokens in named.items():
        texts = [text_of(token) for token in tokens if token is not None]
        # The letters of a text would each be a control token.
        if not isinstance(tokens, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{key} is {settings[key]!r:.100}")
        found += texts
    return found


def text_of(token: str | dict | None) -> str | None:
    """The text of a token that a JSON file names, or describes in an object."""
    return token["content"] if isinstance(token, dict) else token


def _begin_token(file: Path, settings: dict, ids: dict[str, int], bos_id: int | None) -> tuple[int | None, list[str]]:
    """BOS, and what is not used of the settings about it. A tokenizer.json says itself what comes before a text; beside
    a tokenizer.model tokenizer_config.json may."""
    asked = settings.get("add_bos_token")
    if file.suffix != ".json":
        if asked is False:
            return None, []
        named = text_of(settings.get("bos_token"))
        return (ids[named] if asked and named in ids else bos_id), []
    if asked is None or asked == (bos_id is not None):
        return bos_id, []
    found = "puts no token" if bos_id is None else f"puts token {bos_id}"
    return bos_id, [f"{file}: {found} before a text; add_bos_token {asked} is not used, as in transformers 5"]


def _end_token(file: Path, settings: dict, ids: dict[str, int], eos_id: int | None) -> int:
    """The end token: that of tokenizer_config.json, or else of the model's settings, or else the tokenizer file's own.
    Raises UserError if there is none."""
    eos = text_of(settings.get("eos_token"))
    if eos is not None:
        if eos not in ids:
            raise UserError(f"{file}: eos_token {eos!r:.100}, expected a token of the tokenizer")
        return ids[eos]
    for name in EOS_FILES:
        configured = eos_ids(file.parent, name)
        if configured:
            eos_id = configured[0]
            break
    if type(eos_id) is not int or eos_id not in ids.values():
        wanted = f"eos_token in tokenizer_config.json or an eos_token_id below {1 + max(ids.values())} in config.json"
        raise UserError(f"{file}: end token {eos_id!r:.100}, expected {wanted}")
    return eos_id


def eos_ids(folder: Path, name: str) -> list[int]:
    """Each eos_token_id in a JSON file of a folder; none where there is no such file. Raises UserError for anything but
    a whole number or a list of them."""
    found = read_if_there(folder, name).get("eos_token_id")
    if found is None:
        return []
    ids = found if isinstance(found, list) else [found]
    if not all(type(id) is int for id in ids):
        raise UserError(f"{folder / name}: eos_token_id is {found!r:.100}, expected a whole number or a list of them")
    return ids


def _other_ends(folder: Path, ids: dict[str, int], eos_id: int) -> list[str]:
    """What the model's settings say about the end token, where it is another one."""
    notes = []
    name = next(token for token, id in ids.items() if id == eos_id)
    for file in EOS_FILES:
        others = eos_ids(folder, file)
        if others and eos_id not in others:
            found = ", ".join(f"{id!r:.20}" for id in others[:8])
            notes.append(f"{folder}: answers end in {name!r:.60}, token {eos_id}; {file} names {found} as end token")
    return notes


def _unused(folder: Path, settings: dict, ids: dict[str, int], named: list[str]) -> list[str]:
    """What tokenizer_config.json holds that changes nothing here, and could change ids elsewhere."""
    notes = []
    given = [key for key, value in settings.items() if value not in (None, [], {}) and not key.endswith("_token")]
    unknown = [key for key in given if key not in USED_KEYS + HARMLESS_KEYS]
    if unknown:
        notes.append(f"{folder}: tokenizer_config.json has {first_few(unknown)}, which this code does not use")
    if settings.get("add_eos_token"):
        notes.append(f"{folder}: add_eos_token is not used: a template says where the end token comes")
    if settings.get("added_tokens_decoder") is not None:
        for key, value in read_if_there(folder, "special_tokens_map.json").items():
            if key.endswith("_token") and text_of(value) != text_of(settings.get(key)):
                found = f"special_tokens_map.json has {key!r:.60} {text_of(value)!r:.60}"
                notes.append(f"{folder}: {found}, which is not used: tokenizer_config.json declares the tokens")
    without_id = [name for name in dict.fromkeys(named) if name not in ids]
    if without_id:
        found = f"tokenizer_config.json names {first_few(without_id)}"
        notes.append(f"{folder}: {found} as control tokens, which the tokenizer does not have")
    return notes


def _files(file: Path) -> tuple[Path, ...]:
    """The tokenizer's file and those beside it that belong to it."""
    folder = file.parent
    names = [name for name in FILES if os.path.lexists(folder / name)]  # a link that leads nowhere is refused
    files = [file, *(folder / name for name in names)]
    for name in names:
        inside(folder, name, "")  # every export copies them: a link could make it copy any other file
    for template in sorted((folder / CHAT_TEMPLATES).glob("*.jinja")):
        inside(folder, template.name, ".jinja", CHAT_TEMPLATES)
        files.append(template)
    return tuple(dict.fromkeys(files))


def read_if_there(folder: Path, name: str) -> dict:
    """The object in a JSON file of the folder; {} where there is no such file."""
    return read_json(folder, name) if os.path.lexists(folder / name) else {}
