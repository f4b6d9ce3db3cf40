"""How generate.py asks a model: one prompt whose text is shown as it comes, or the rows of a file."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from llama.boundary.command_line import announce
from llama.boundary.progress import Progress
from llama.boundary.terminal import show
from llama.data.prompting import Prompt
from llama.data.tokenizer import Tokenizer
from llama.evaluation.settings import GenerateSettings
from llama.generation.answer_file import AnswerFile, json_line
from llama.generation.batch import Batch
from llama.generation.decode import generate
from llama.generation.listener import Listener
from llama.generation.request import Answer, Request
from llama.generation.text import TextStream
from llama.model import Llama
from llama.parallel.collectives import any_rank, gather, gather_dict, group_that_waits
from llama.parallel.processes import Process

INTERRUPTED = "Ctrl-C"


@dataclass(frozen=True)
class Asked:
    """A model, and how it is asked. `words`: the ids of each answer word, if the template has answer words."""

    settings: GenerateSettings
    tokenizer: Tokenizer
    words: list[list[int]]
    stop_ids: frozenset[int]
    process: Process
    model: Llama

    def request(self, ids: list[int], shown: Callable[[str], object] | None = None) -> tuple[Request, Listener]:
        """Ask for the text behind these ids."""
        stream = TextStream(self.tokenizer.decode_new, self.settings.stop, shown)
        listener = Listener(stream, self.words, at_once=self.settings.num_beams > 1)
        return Request(ids, self.settings, self.stop_ids, listener), listener

    def show_answer(self, ids: list[int], batch: Batch) -> tuple[str, str]:
        """Continue one prompt, show the text as it comes, and say how long it took. Returns the text, and why it ended.

        In a conversation, Ctrl-C is one of the reasons. Then the batch cannot be used any longer.
        """
        is_main = self.process.is_rank_zero
        request, listener = self.request(ids, show if is_main else None)
        try:
            ended = [(0, Answer([], "length"))]
            if self.settings.max_new_tokens:
                ended = batch.add([(0, request)])
            while not ended:
                ended = batch.step()
            reason = listener.reason(ended[0][1].reason)
        except KeyboardInterrupt:
            if not self.settings.chat:
                raise
            reason = INTERRUPTED
        text = listener.stream.finish()
        if is_main:
            show("\n")
            announce([listener.speed(len(ids), reason)])
        return text, reason

    def answer_rows(self, prompts: list[Prompt], output: AnswerFile | None) -> None:
        """Answer the prompts that have no answer yet, each rank its share. Rank 0 writes all answers, in order."""
        group = group_that_waits()
        rows = Rows(self, prompts, output)
        began = time.perf_counter()
        try:
            with output or nullcontext():
                rows.answer()
        except KeyboardInterrupt:
            if output and output.own.exists():
                announce([f"{output.own}: keeps the answers so far; the same command goes on with the others"])
            raise
        seconds = time.perf_counter() - began
        rows.answers = gather_dict(rows.answers, group)
        tokens = sum(gather(rows.tokens, group))
        if not self.process.is_rank_zero:
            return
        if output:
            output.publish(rows.answers[number] for number in sorted(rows.answers))
        else:
            rows.print_ready()
        announce([f"{len(prompts)} prompts, {tokens} new tokens in {seconds:.1f} s: {tokens / seconds:.1f} per second"])


class Rows:
    """The prompts of a file, and the answers that this rank has.

    answers: {number of the prompt: its line}; those that `output` has kept are there from the start.
    tokens:  how many this rank has written.
    """

    def __init__(self, asked: Asked, prompts: list[Prompt], output: AnswerFile | None):
        self.asked = asked
        self.prompts = prompts
        self.output = output
        self.answers: dict[int, dict] = dict(output.kept) if output else {}
        self.tokens = 0
        self.printed = 0

    def answer(self) -> None:
        """Answer this rank's share of what is missing."""
        settings = self.asked.settings
        process = self.asked.process
        missing = [number for number in range(len(self.prompts)) if number not in self.answers]
        mine = missing[process.data_rank :: process.data_ranks]
        requests = []
        listeners = []
        for number in mine:
            prompt = self.prompts[number]
            request, listener = self.asked.request(prompt.ids)
            requests.append(replace(request, name=f"row {prompt.row}"))
            listeners.append(listener)
        together = any_rank if settings.sharding == "full" else bool
        is_main = self.output is not None
        silent = not process.is_rank_zero
        with Progress("answering", "prompts", len(mine), silent=silent, is_main=is_main) as progress:
            for i, answer in generate(self.asked.model, requests, settings.batch_size, together):
                self.add(mine[i], listeners[i], answer)
                progress.update()

    def add(self, number: int, listener: Listener, answer: Answer) -> None:
        """Keep an answer. Without a file, a process that is alone prints what is complete."""
        prompt = self.prompts[number]
        line = {
            "row": prompt.row,
            "prompt": prompt.text,
            "text": listener.stream.finish(),
            "tokens": len(answer.ids),
            "reason": listener.reason(answer.reason),
        }
        self.answers[number] = line
        self.tokens += len(answer.ids)
        if self.output:
            self.output.add(number, line)
        elif self.asked.process.world_size == 1:
            self.print_ready()

    def print_ready(self) -> None:
        """Print the answers up to the first that is missing."""
        while self.printed in self.answers:
            show(json_line(self.answers[self.printed]) + "\n")
            self.printed += 1
