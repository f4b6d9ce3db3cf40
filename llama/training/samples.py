"""Answers to a few held-out prompts, before training and after it: what a loss looks like as text."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from llama.boundary.errors import UserError, printable
from llama.data.chat import Renderer
from llama.data.examples import EncodedData
from llama.data.prompting import answers_of
from llama.evaluation.score import sample_indices
from llama.generation.decode import generate
from llama.generation.request import Request
from llama.generation.settings import GenerationSettings
from llama.model import Llama
from llama.parallel.collectives import any_rank, gather
from llama.parallel.processes import Process
from llama.storage.base import Base
from llama.storage.generation_config import stop_ids

LONGEST_ANSWER = 64  # tokens
LONGEST_WAIT = 20.0  # seconds: packed weights are slow on a CPU, as is gathering sharded ones over a slow network
CUT = " ..."  # follows an answer that the model had not ended
SIDE_BY_SIDE = 16  # prompts of a rank
SHOWN = 96  # characters of a text on the screen


class Samples:
    """A few held-out prompts, and the model's answers to them. There are none if nothing is held out.

    found: for each prompt {"row": its number in its file, "prompt": its text, "expected": the right answer, "before",
           "after"}. The last two are the model's answers, None if they are not known.
    """

    def __init__(self, test: EncodedData | None, template: Renderer, base: Base, count: int, adapter: str | None):
        """`count`: how many examples, the same ones in every run. `adapter`: the one whose training goes on."""
        self.tokenizer = base.tokenizer
        self.found: list[dict] = []
        self.requests: list[Request] = []
        if test is None or not count:
            return
        words = answers_of(template, self.tokenizer)
        self.cut = "" if words else CUT  # behind answer words training has no end token
        settings = GenerationSettings(max_new_tokens=max(map(len, words), default=LONGEST_ANSWER))
        ends = stop_ids(base, template, adapter)
        for i in sample_indices(len(test), count).tolist():
            ids, is_answer = test[i]
            first = _start_of_answer(is_answer.tolist())
            prompt = ids[:first].tolist()
            self.requests.append(Request(prompt, settings, ends))
            sample = {
                "row": int(test.rows[i]),
                "prompt": self.tokenizer.decode(prompt),
                "expected": self._text(ids[first:].tolist()),
                "before": None,
                "after": None,
            }
            self.found.append(sample)

    def _text(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode_new(ids).strip()

    def answer(self, model: Llama, process: Process, when: str) -> None:
        """Ask the model, when = "before" or "after". It answers greedily, so no random number is drawn. Ranks share the
        prompts. Collective. Raises UserError on every rank if a score is NaN or infinite."""
        if not self.requests:
            return
        mine = range(process.data_rank, len(self.requests), process.data_ranks)
        deadline = time.monotonic() + LONGEST_WAIT
        group = process.mesh["tensor"].get_group()

        def is_late(_) -> bool:  # of a whole tensor group: its ranks write the same texts, and have clocks of their own
            return any_rank(time.monotonic() > deadline, group)

        requests = [replace(self.requests[i], on_token=is_late) for i in mine]
        texts: dict[int, str] = {}
        problem = None
        was_training = model.training
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled again for other shapes
                for i, answer in generate(model, requests, SIDE_BY_SIDE, any_rank):
                    texts[mine[i]] = self._text(answer.ids) + ("" if answer.reason == "stop" else self.cut)
        except UserError as error:
            problem = f"--sample_prompts: {error}"
        model.train(was_training)
        for texts_of_rank, problem_of_rank in gather((texts, problem)):
            if problem_of_rank:
                raise UserError(problem_of_rank)
            for i, text in texts_of_rank.items():
                self.found[i][when] = text

    def recall(self, earlier: list[dict]) -> None:
        """Take over the answers before training from what an earlier part of this run has found."""
        before = {(sample["row"], sample["prompt"]): sample["before"] for sample in earlier}
        for sample in self.found:
            sample["before"] = before.get((sample["row"], sample["prompt"]))

    def lines(self) -> list[str]:
        """What the screen shows."""
        lines = []
        for sample in self.found:
            lines.append(f"held-out row {sample['row']}: {_shortened(sample['prompt'])}")
            for name in ("expected", "before", "after"):
                if sample[name] is not None:
                    lines.append(f"  {name + ':':10}{_shortened(sample[name]) or '(nothing)'}")
        return lines


def _start_of_answer(is_answer: list[bool]) -> int:
    """Where the last answer of an example begins. The first token always belongs to the prompt."""
    first = max(1, len(is_answer) - 1)
    while first > 1 and not is_answer[first]:  # what follows the last answer, such as a newline after its turn
        first -= 1
    while first > 1 and is_answer[first - 1]:
        first -= 1
    return first


def _shortened(text: str) -> str:
    """A text on one line. Of a long text, its end and a little of its start: prompts of one template begin alike."""
    line = printable(" ".join(text.split()))
    if len(line) <= SHOWN:
        return line
    start = line[: SHOWN // 4].rstrip()
    end = line[-3 * SHOWN // 4 :].lstrip()
    return f"{start} ... {end}"
