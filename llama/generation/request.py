"""What is asked of the model, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass

from llama.generation.settings import GenerationSettings


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    prompt:   its ids, at least one.
    settings: how it is continued.
    stop_ids: the ids that end an answer; none of them is part of it.
    on_token: called with each new id as soon as it is chosen (with beams: with one after the other, at the end). If it
              returns True, the answer ends behind this id. Stop strings are found so, and texts shown as they grow.
    name:     what messages call the prompt, such as "row 7"; "": its number among the requests.
    """

    prompt: list[int]
    settings: GenerationSettings = GenerationSettings()
    stop_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] | None = None
    name: str = ""


@dataclass(frozen=True)
class Answer:
    """The ids that continue a prompt, and why they end.

    reason: "stop" (a stop id came, which is not among `ids`), "stop_string" (`on_token` returned True), "length"
            (max_new_tokens), "context" (the model has no position for a further token), or "no_repeat"
            (no_repeat_ngram_size forbids every token).
    """

    ids: list[int]
    reason: str
