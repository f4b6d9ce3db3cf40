"""Ask a trained model: continue a text, answer the rows of a file, or have a conversation.

    python generate.py --model runs/alpaca-DIR --prompt "Tell me about Alpacas." --num_beams 4
    python generate.py --model DIR --prompts questions.jsonl --output answers.jsonl
    python generate.py --model DIR --chat

Only text goes to stdout. torchrun shares the rows of a file over its processes; the answers are the same.
"""

from llama.boundary.command_line import announce, parse, run
from llama.evaluation.settings import GenerateSettings

if __name__ == "__main__":  # --help and mistyped flags need not wait until torch is imported
    run(lambda: parse(GenerateSettings, description=__doc__))

import json
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from llama.boundary.errors import UserError
from llama.boundary.progress import Progress
from llama.boundary.terminal import read_message, show
from llama.data.chat import Chat
from llama.data.dialogue import Dialogue
from llama.data.prompting import Prompt, Prompts, answers_of, room_of
from llama.data.tokenizer import Tokenizer
from llama.evaluation.asking import prompts_of, template_of
from llama.generation.answer_file import AnswerFile, json_line
from llama.generation.batch import Batch
from llama.generation.decode import generate
from llama.generation.listener import Listener
from llama.generation.request import Answer, Request
from llama.generation.settings import GenerationSettings
from llama.generation.step import lay_out
from llama.generation.text import TextStream
from llama.model import Llama
from llama.parallel.collectives import any_rank, fail_together, gather, group_that_waits
from llama.parallel.processes import Process, compute_dtype, join
from llama.storage.base import Base
from llama.storage.generation_config import generation_notes, stop_ids
from llama.storage.peft import adapter_notes, read_adapter
from llama.training.finished_run import from_runs
from lora import Changes, open_model

INTERRUPTED = "Ctrl-C"
HELP = "/reset forgets what was said, /undo your last text and its answer; /exit or Ctrl-D ends; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Asked:
    """A model, and how it is asked. `words`: the ids of the answers that its template has a choice of."""

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

    def answer(self, ids: list[int], batch: Batch) -> tuple[str, str]:
        """Continue one prompt, show the text as it comes, and say how long it took. Returns the text, and why it ends:
        in a conversation also because of Ctrl-C, and then the batch is of no further use."""
        request, listener = self.request(ids, show if self.process.is_rank_zero else None)
        try:
            ended = batch.add([(0, request)]) if self.settings.max_new_tokens else [(0, Answer([], "length"))]
            while not ended:
                ended = batch.step()
            reason = listener.reason(ended[0][1].reason)
        except KeyboardInterrupt:
            if not self.settings.chat:
                raise
            reason = INTERRUPTED
        text = listener.stream.finish()
        if self.process.is_rank_zero:
            show("\n")
            announce([listener.speed(len(ids), reason)])
        return text, reason


def main() -> None:
    settings = from_runs(parse(GenerateSettings, description=__doc__))
    base = Base.pretrained(settings.model, settings.max_length or 0, settings.control_tokens)
    template = template_of(settings, base.tokenizer)
    words = answers_of(template, base.tokenizer)
    if words:  # training has no end token behind them
        longest = max(map(len, words))
        settings = replace(settings, max_new_tokens=min(longest, settings.max_new_tokens))
    room = room_of(
        base.config.max_position_embeddings, settings.max_length, settings.max_new_tokens, settings.truncate_side
    )
    prompts = prompts_of(settings, template, base.tokenizer, room)
    stops = stop_ids(base, template, settings.adapter)
    adapter = read_adapter(settings.adapter) if settings.adapter else None
    announce([*base.notes, *adapter_notes(settings.adapter), *generation_notes(base, settings.adapter)])
    announce([*(template.notes if template else []), *prompts.notes()])
    changes = Changes(settings.quantize, adapter, train_layers="none", adapter_folder=settings.adapter)
    with join() as process:
        if process.world_size > 1 and settings.sharding == "none" and not settings.prompts:
            raise UserError("torchrun shares the rows of --prompts; start one process, or add --sharding full")
        dtype = compute_dtype(settings.dtype, process.device)
        output = None
        if settings.output:
            of_answers = identity(settings, base, prompts, (str(dtype), sorted(stops)))
            with fail_together(settings.output):  # and no rank writes before all have read what is kept
                output = AnswerFile(settings.output, of_answers, process.rank)
        whole = settings.sharding == "none"
        model = open_model(base, changes, process, dtype, whole)
        side_by_side = settings.num_beams * (settings.batch_size if settings.prompts else 1)
        model = lay_out(model, side_by_side) if whole else model
        asked = Asked(settings, base.tokenizer, words, stops, process, model)
        if isinstance(template, Chat) and settings.chat:
            converse(asked, Dialogue(template, base.tokenizer, room))
        elif settings.prompts:
            answer_rows(asked, prompts.prompts, output)
        else:
            asked.answer(prompts.prompts[0].ids, Batch(model))


def identity(settings: GenerateSettings, base: Base, prompts: Prompts, others: tuple) -> dict:
    """All that decides what the answers are, for the file that keeps them. `others`: dtype and ids that end one."""
    flags = [*(entry.name for entry in fields(GenerationSettings)), "stop", "quantize", "adapter"]
    asked = zlib.crc32(json.dumps([prompt.ids for prompt in prompts.prompts]).encode())
    weights = [base.fingerprint, str(base.checkpoint)]
    if settings.adapter:
        files = (path for path in sorted(Path(settings.adapter).rglob("*")) if path.is_file())
        weights += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    of_flags = {f"--{name}": getattr(settings, name) for name in flags}
    return of_flags | {"the prompts": asked, "the model": weights, "dtype and stop ids": others}


def answer_rows(asked: Asked, prompts: list[Prompt], output: AnswerFile | None) -> None:
    """Answer this rank's share of the prompts that are not answered yet. Rank 0 writes all answers, in order."""
    process, settings = asked.process, asked.settings
    group = group_that_waits()
    answers = dict(output.kept) if output else {}
    mine = [number for number in range(len(prompts)) if number not in answers][process.rank :: process.world_size]
    asked_for = [asked.request(prompts[number].ids) for number in mine]
    requests = [request for request, _ in asked_for]
    printed = 0
    began = time.perf_counter()
    together = any_rank if settings.sharding == "full" else bool
    progress = Progress("answering", "prompts", len(mine), silent=not process.is_rank_zero, is_main=output is not None)
    try:
        with output or nullcontext(), progress:
            for i, answer in generate(asked.model, requests, settings.batch_size, together):
                prompt = prompts[mine[i]]
                heard = asked_for[i][1]
                line = {"row": prompt.row, "prompt": prompt.text, "text": heard.stream.finish()}
                line |= {"tokens": len(answer.ids), "reason": heard.reason(answer.reason)}
                answers[mine[i]] = line
                if output:
                    output.add(mine[i], line)
                elif process.world_size == 1:
                    printed = print_ready(answers, printed)
                progress.update()
    except KeyboardInterrupt:
        if output:
            announce([f"{output.own}: keeps the answers so far; the same command goes on with the others"])
        raise
    seconds = time.perf_counter() - began
    parts = gather((answers, sum(answers[number]["tokens"] for number in mine)), group)
    if process.is_rank_zero:
        answers = {number: line for part, _ in parts for number, line in part.items()}
        if output:
            output.publish(answers[number] for number in sorted(answers))
        else:
            print_ready(answers, printed)
        tokens = sum(count for _, count in parts)
        announce([f"{len(prompts)} prompts, {tokens} new tokens in {seconds:.1f} s: {tokens / seconds:.1f} per second"])


def print_ready(answers: dict[int, dict], first: int) -> int:
    """Print the answers from this number on, up to one that is still missing. Returns its number."""
    while first in answers:
        show(json_line(answers[first]) + "\n")
        first += 1
    return first


def converse(asked: Asked, dialogue: Dialogue) -> None:
    """Answer what the user types, until the input ends."""
    group = group_that_waits()
    batch = Batch(asked.model, remember=True)  # a turn reads only what the turns before it have not read
    announce([HELP])
    while True:
        typed = read_message("> ") if asked.process.is_rank_zero else None
        text = gather(typed, group)[0]
        if text is None or text.strip() in ("/exit", "/quit", "/bye"):
            return
        if text.strip().startswith("/") and text.strip()[1:].isalpha():
            announce([dialogue.command(text.strip()) or HELP])
        elif text.strip():
            try:
                ids, forgotten = dialogue.ask(text)
            except UserError as error:
                announce(error.lines)
                continue
            if forgotten:
                announce([f"the model has no position for all that was said: it forgets the oldest {forgotten} turns"])
            text, reason = asked.answer(ids, batch)
            dialogue.answer(text)
            if reason == INTERRUPTED:
                batch = Batch(asked.model, remember=True)


if __name__ == "__main__":
    record(run)(main)  # record gives torchrun the traceback of the rank that failed first
