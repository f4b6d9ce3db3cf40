"""What generate.py asks a model: from its flags to prompts."""

from pathlib import Path

from llama.boundary.errors import UserError
from llama.boundary.terminal import read_all
from llama.data.chat import Chat, Renderer
from llama.data.formats import find_template
from llama.data.prompting import Prompts, Room, one_prompt, read_prompts
from llama.data.rows import KINDS
from llama.data.sources import Source
from llama.data.tokenizer import Tokenizer
from llama.evaluation.settings import GenerateSettings


def template_of(settings: GenerateSettings, tokenizer: Tokenizer) -> Renderer | None:
    """How prompts are rendered. None: a text is continued as it is."""
    name = settings.template or ("chat" if settings.chat else None)
    if name is None and not settings.prompts:
        if settings.system is not None:
            raise UserError("--system: only conversations have a system turn, expected --template chat with it")
        return None
    files: dict[str, tuple[Path, ...]] = {}
    if settings.prompts:
        files["rows"] = (Path(settings.prompts),)
        if not Path(settings.prompts).is_file():
            found = "is no file" if Path(settings.prompts).exists() else "no such file"
            way_out = "; --prompt - takes one text from stdin" if settings.prompts == "-" else ""
            raise UserError(f"--prompts {settings.prompts}: {found}, expected {KINDS}{way_out}")
    template = find_template(name, Source("", files), tokenizer, settings.system, asks=True)
    if settings.chat and not isinstance(template, Chat):
        raise UserError(f"--template {name}: expected chat, or one of its layouts, with --chat")
    return template


def prompts_of(settings: GenerateSettings, template: Renderer | None, tokenizer: Tokenizer, room: Room) -> Prompts:
    """What to answer; of a conversation, nothing yet."""
    if settings.prompts:
        assert template is not None
        skip = settings.skip_bad_rows
        return read_prompts([Path(settings.prompts)], template, tokenizer, room, skip_bad_rows=skip)
    prompts = []
    if settings.prompt is not None:
        text = read_all() if settings.prompt == "-" else settings.prompt
        prompts.append(one_prompt(template, text, tokenizer, room))
    return Prompts(prompts, 0, [], [])
