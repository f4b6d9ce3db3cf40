"""Render a chat template in a process of its own: a stranger wrote it, and it may loop for ever or fill the memory.

`chat_template` starts this file as a script. Standard input holds the request, as JSON: the template, its variables,
the conversations, and the limits. Standard output gets a list of [text, error], one for each conversation.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationBlocks(Extension):
    """{% generation %} marks what the model says, for transformers' masks. It writes nothing of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    request = json.load(sys.stdin)
    _limit(resource.RLIMIT_CPU, request["seconds"])
    _limit(resource.RLIMIT_AS, request["bytes"])
    json.dump([render(request, conversation) for conversation in request["conversations"]], sys.stdout)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or hard > most:  # a lower one, as a cluster may set, stays
        resource.setrlimit(kind, (most, most))


def render(request: dict, conversation: dict) -> tuple[str, str]:
    """The text of a conversation, with the start of an answer behind it, and "". Or "", and what went wrong."""
    date = conversation["date"]
    now = datetime.fromisoformat(date) if date else datetime.now()
    try:
        template = _environment(now).from_string(request["template"])
        text = template.render(
            messages=conversation["messages"],
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **request["variables"],
        )
        text.encode()  # raises for half a character
        return (text, "") if len(text) <= request["characters"] else ("", f"it writes {len(text)} characters")
    except Exception as error:  # the template decides which
        return "", f"{type(error).__name__} {error}"[:300]


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """As transformers' utils/chat_template_utils.py sets it up."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, LoopControlExtension]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


if __name__ == "__main__":
    main()
