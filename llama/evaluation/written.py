"""Metrics of what the model writes: it continues each prompt, and its text is compared with the row's own answer."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Protocol

from llama.boundary.errors import UserError
from llama.boundary.progress import Progress
from llama.data.prompting import Prompt
from llama.data.tokenizer import Tokenizer
from llama.evaluation.intervals import Interval
from llama.evaluation.outcome import Outcome
from llama.generation.decode import generate
from llama.generation.request import Answer, Request
from llama.generation.settings import GenerationSettings
from llama.generation.step import lay_out
from llama.model import Llama
from llama.parallel.collectives import fail_together, gather_dict, group_that_waits
from llama.parallel.processes import Process


class Comparison(Protocol):
    """Rouge or ExactMatch. `about`: what decides its numbers, for the result."""

    about: dict

    def compare(self, reference: str, text: str) -> dict:
        """What is found of one example, for its line in the file of predictions."""

    def summarise(self, found: Sequence[Mapping]) -> tuple[dict, dict[str, Interval | None]]:
        """The metrics of all examples, and their intervals."""


class Written:
    """A comparison of what the model writes with the reference of each prompt. Prompts without one are left out, and
    counted.

    Raises UserError if no prompt has a reference.
    """

    generates = True

    def __init__(
        self,
        comparison: Comparison,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        settings: GenerationSettings,
        stop_ids: frozenset[int],
        batch_size: int,
    ):
        self.comparison = comparison
        self.prompts = [prompt for prompt in prompts if prompt.reference is not None]
        if not self.prompts:
            raise UserError(f"none of {len(prompts)} rows has an answer, expected one to compare the model's text with")
        self.tokenizer = tokenizer
        self.settings = settings
        self.requests = []
        for prompt in self.prompts:
            self.requests.append(Request(prompt.ids, settings, stop_ids, name=f"row {prompt.row}"))
        self.batch_size = batch_size
        self.about = comparison.about | {
            "decoding": decoding(settings) | {"stop_ids": sorted(stop_ids)},
            "cut_prompts": sum(prompt.was_cut for prompt in self.prompts),
            "without_answer": len(prompts) - len(self.prompts),
        }

    def score(self, model: Llama, process: Process) -> Outcome:
        lines = []
        for prompt, answer in zip(self.prompts, self.answers(model, process), strict=True):
            text = self.tokenizer.decode_new(answer.ids).strip()
            line = {
                "row": prompt.row,
                "prompt": prompt.text,
                "prediction": text,
                "answer": prompt.reference,
                "tokens": len(answer.ids),
                "ended_by": answer.reason,
            }
            lines.append(line | self.comparison.compare(prompt.reference or "", text))
        values, intervals = self.comparison.summarise(lines)
        values["n"] = len(lines)
        values["empty"] = sum(line["prediction"] == "" for line in lines)
        values["reached_max_new_tokens"] = sum(line["ended_by"] == "length" for line in lines)
        return Outcome(values, intervals, lines, self.notes(values))

    def notes(self, values: dict) -> list[str]:
        """What a user should know because it may make the numbers too small."""
        counts = {
            "rows without an answer, which are left out": self.about["without_answer"],
            "texts that are empty": values["empty"],
            "texts that --max_new_tokens ended": values["reached_max_new_tokens"],
            "texts without a number behind ####": values.get("without_number"),
            "answers in which ROUGE sees no word, and gives 0": values.get("references_without_words"),
        }
        return [f"{what}: {count}" for what, count in counts.items() if count]

    def answers(self, model: Llama, process: Process) -> list[Answer]:
        """The answer to each prompt. Each rank has the whole model and writes its share: no rank waits for another."""
        mine = range(process.data_rank, len(self.requests), process.data_ranks)
        own: dict[int, Answer] = {}
        requests = [self.requests[i] for i in mine]
        fast = lay_out(model, self.batch_size * self.settings.num_beams)
        progress = Progress("writing answers", "prompts", len(mine), silent=not process.is_rank_zero)
        group = group_that_waits()  # answers of other ranks may take hours longer
        with fail_together("writing answers", group), progress:
            for place, answer in generate(fast, requests, self.batch_size):
                own[mine[place]] = answer
                progress.update()
        found = gather_dict(own, group)
        return [found[i] for i in range(len(self.requests))]


def decoding(settings: GenerationSettings) -> dict:
    """How the texts are continued, for the result: a name, and every setting."""
    method = "sampling" if settings.draws else "greedy"
    if settings.num_beams > 1:
        method = "beam sampling" if settings.draws else "beam search"
    return {"method": method} | {entry.name: getattr(settings, entry.name) for entry in fields(GenerationSettings)}
