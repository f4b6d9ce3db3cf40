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
import zlib
from dataclasses import fields, replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from llama.boundary.errors import UserError
from llama.boundary.terminal import read_message
from llama.data.chat import Chat
from llama.data.dialogue import Dialogue
from llama.data.prompting import Prompts, answers_of, room_of
from llama.evaluation.answering import INTERRUPTED, Asked
from llama.evaluation.asking import prompts_of, template_of
from llama.generation.answer_file import AnswerFile
from llama.generation.batch import Batch
from llama.generation.settings import GenerationSettings
from llama.generation.step import lay_out
from llama.parallel.collectives import fail_together, gather, group_that_waits
from llama.parallel.processes import compute_dtype, join
from llama.storage.base import Base
from llama.storage.generation_config import generation_notes, stop_ids
from llama.storage.peft import adapter_notes, read_adapter
from llama.training.finished_run import from_runs
from lora import Changes, open_model

HELP = "/reset forgets what was said, /undo your last text and its answer; /exit or Ctrl-D ends; Ctrl-C stops an answer"


def main() -> None:
    settings = from_runs(parse(GenerateSettings, description=__doc__))
    base = Base.pretrained(settings.model, settings.max_length or 0, settings.control_tokens)
    template = template_of(settings, base.tokenizer)
    words = answers_of(template, base.tokenizer)
    longest = max(map(len, words), default=settings.max_new_tokens)
    if template and longest < settings.max_new_tokens:
        announce([f"--template {template.name}: an answer is one of its words, so it has at most {longest} tokens"])
        settings = replace(settings, max_new_tokens=longest)
    if settings.max_length and settings.max_length <= settings.max_new_tokens:
        problem = f"leaves nothing to prompts beside --max_new_tokens {settings.max_new_tokens}"
        announce([f"--max_length {settings.max_length}: {problem}, and is not used"])
    room = room_of(
        base.config.max_position_embeddings, settings.max_length, settings.max_new_tokens, settings.truncate_side
    )
    prompts = prompts_of(settings, template, base.tokenizer, room)
    stops = stop_ids(base, template, settings.adapter)
    adapter = read_adapter(settings.adapter) if settings.adapter else None
    announce([*base.notes, *adapter_notes(settings.adapter), *generation_notes(base, settings.adapter)])
    announce([*(template.notes if template else []), *prompts.notes()])
    changes = Changes(settings.quantize, adapter, train_layers="none", adapter_folder=settings.adapter)
    whole = settings.sharding == "none"
    with join() as process:
        if process.world_size > 1 and whole and not settings.prompts:
            raise UserError("torchrun shares the rows of --prompts; start one process, or add --sharding full")
        dtype = compute_dtype(settings.dtype, process.device)
        output = None
        if settings.output:
            decides = identity(settings, base, prompts, (str(dtype), sorted(stops)))
            with fail_together(settings.output):  # no rank writes before all have read what is kept
                output = AnswerFile(settings.output, decides, process.rank)
        model = open_model(base, changes, process, dtype, whole)
        if whole:
            texts = settings.batch_size if settings.prompts else 1
            model = lay_out(model, texts * settings.num_beams)
        asked = Asked(settings, base.tokenizer, words, stops, process, model)
        if isinstance(template, Chat) and settings.chat:
            converse(asked, Dialogue(template, base.tokenizer, room))
        elif settings.prompts:
            asked.answer_rows(prompts.prompts, output)
        else:
            asked.show_answer(prompts.prompts[0].ids, Batch(model))


def identity(settings: GenerateSettings, base: Base, prompts: Prompts, others: tuple) -> dict:
    """Everything that decides what the answers are, for the file that keeps them. `others`: dtype and stop ids."""
    flags = [*(entry.name for entry in fields(GenerationSettings)), "stop", "quantize", "adapter"]
    ids = json.dumps([prompt.ids for prompt in prompts.prompts])
    asked = zlib.crc32(ids.encode())
    weights = [base.fingerprint, str(base.checkpoint)]
    if settings.adapter:
        for path in sorted(Path(settings.adapter).rglob("*")):
            if path.is_file():
                state = path.stat()
                weights.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    of_flags = {f"--{name}": getattr(settings, name) for name in flags}
    return of_flags | {"the prompts": asked, "the model": weights, "dtype and stop ids": others}


def converse(asked: Asked, dialogue: Dialogue) -> None:
    """Answer what the user types, until the input ends."""
    group = group_that_waits()
    batch = Batch(asked.model, remember=True)  # each turn reads only the ids that no turn before it has read
    announce([HELP])
    while True:
        typed = read_message("> ") if asked.process.is_rank_zero else None
        text = gather(typed, group)[0]
        if text is None:
            return
        command = text.strip()
        if command in ("/exit", "/quit", "/bye"):
            return
        if command.startswith("/") and command[1:].isalpha():
            announce([dialogue.command(command) or HELP])
        elif command:
            try:
                ids, forgotten = dialogue.ask(text)
            except UserError as error:
                announce(error.lines)
                continue
            if forgotten:
                announce([f"the model has no position for all that was said: it forgets the oldest {forgotten} turns"])
            text, reason = asked.show_answer(ids, batch)
            dialogue.answer(text)
            if reason == INTERRUPTED:
                batch = Batch(asked.model, remember=True)


if __name__ == "__main__":
    record(run)(main)  # record gives torchrun the traceback of the rank that failed first
