"""Score a model on a data set or a text: how often it is right, how well it predicts, or what it writes.

    python evaluate.py --model runs/imdb-tiny/model --data imdb --data_dir assets/imdb_sample
    torchrun --nproc_per_node 4 evaluate.py --model DIR --data imdb --data_dir DIR --limit 1000 --output result.json
    python evaluate.py --model DIR --data dolly:open_qa --metric rouge --max_new_tokens 128
    python evaluate.py --model DIR --data wiki.txt --metric perplexity --max_length 1024 --stride 512
    python evaluate.py --model DIR --harness hellaswag,gsm8k

Every example is scored exactly once. The number of ranks and the batch size change the result by rounding alone. Each
number has its 95 % interval.
"""

from llama.boundary.command_line import announce, parse, run
from llama.evaluation.settings import EvaluationSettings

if __name__ == "__main__":  # --help and mistyped flags need not wait until torch is imported
    run(lambda: parse(EvaluationSettings, description=__doc__))

import json
import time
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from data import DataSet, load_data
from llama.boundary.errors import UserError, as_user_error
from llama.data.chat import Renderer
from llama.data.examples import EncodedData
from llama.data.options import OptionsTemplate
from llama.data.prompting import read_prompts, room_of
from llama.data.sources import PUBLIC_DATASETS
from llama.data.templates import Template
from llama.data.unlabelled import UnlabelledTemplate
from llama.evaluation.answers import Answers
from llama.evaluation.choices import Choices, read_questions
from llama.evaluation.exact_match import ExactMatch
from llama.evaluation.outcome import Metric
from llama.evaluation.rouge import Rouge
from llama.evaluation.score import sample_indices
from llama.evaluation.settings import GENERATING
from llama.evaluation.text_perplexity import TextPerplexity
from llama.evaluation.written import Written
from llama.parallel.collectives import fail_together
from llama.parallel.processes import compute_dtype, join
from llama.storage.base import Base
from llama.storage.generation_config import stop_ids
from llama.storage.peft import adapter_notes, read_adapter
from llama.training.finished_run import from_runs
from lora import Changes, open_model


def main() -> None:
    settings = from_runs(parse(EvaluationSettings, description=__doc__))
    base = Base.pretrained(settings.model, 0 if settings.harness else settings.max_length, settings.control_tokens)
    if settings.harness:
        metric, about = of_tasks(settings, base)
    else:
        metric, about = of_text(settings, base) if settings.is_text else of_rows(settings, base)
    adapter = read_adapter(settings.adapter) if settings.adapter else None
    announce([*base.notes, *adapter_notes(settings.adapter)])
    changes = Changes(settings.quantize, adapter, train_layers="none", adapter_folder=settings.adapter)
    with join() as process:
        with fail_together("the files of the result"):
            if process.is_rank_zero:
                try_files(settings)
        dtype = compute_dtype(settings.dtype, process.device)
        model = open_model(base, changes, process, dtype, whole=metric.generates)
        began = time.perf_counter()
        outcome = metric.score(model, process)
        seconds = time.perf_counter() - began
        if not process.is_rank_zero:
            return
        count = outcome.values["n"] + outcome.values.get("without_label", 0)
        result = about | metric.about
        result["dtype"] = str(dtype).removeprefix("torch.")
        result["ranks"] = process.world_size
        result |= outcome.as_json()
        result["seconds"] = round(seconds, 3)
        result["examples_per_second"] = count / seconds
        if settings.output:
            write("output", settings.output, json.dumps(result, indent=2) + "\n")
        if settings.predictions:
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in outcome.lines]
            write("predictions", settings.predictions, "".join(lines))
        announce([*outcome.notes, outcome.headline()])
        print(json.dumps(result, indent=2))  # last: nobody may be there to read it


def of_tasks(settings: EvaluationSettings, base: Base) -> tuple[Metric, dict]:
    """The tasks of lm-eval, and what they are of, for the result."""
    try:
        from llama.evaluation.harness import Tasks  # here: lm-eval is optional, and loads half of Hugging Face
    except ImportError as error:
        expected = "expected lm-eval to be installed: pip install lm-eval"
        raise UserError(f"--harness {settings.harness}: {error}, {expected}") from None
    stops = stop_ids(base, adapter=settings.adapter)
    about = {name: getattr(settings, name) for name in ("model", "adapter", "quantize", "limit")}
    return Tasks(settings, base.tokenizer, stops, base.config_json.get("bos_token_id")), about


def of_text(settings: EvaluationSettings, base: Base) -> tuple[Metric, dict]:
    """The perplexity of a text file, and what the result says about the data."""
    stride = settings.stride or settings.max_length // 2
    path = Path(settings.data)
    announce([f"{path}: read as one text, in windows of {settings.max_length} tokens that go on by {stride}"])
    metric = TextPerplexity(path, base.tokenizer, settings.max_length, stride, settings.batch_size, settings.limit)
    return metric, describe(settings, "perplexity")


def of_rows(settings: EvaluationSettings, base: Base) -> tuple[Metric, dict]:
    """A metric on the examples of a data set, and what the result says about the data."""
    found, data, split = read(settings, base)
    template = found.template
    name = name_of(settings, template)
    about = describe(settings, name) | {
        "template": template.name,
        "bundled_sample": found.source.bundled_sample,
        "split": split,
        "held_out": found.held_out if split else None,
        "bad_rows": data.bad_row_count,
    }
    if name not in GENERATING and not isinstance(template, OptionsTemplate):
        return Answers(name, data, template, base.tokenizer, settings.batch_size, settings.limit), about
    # The encoded examples hold neither the options nor the whole text of an answer, so these rows are read once more.
    chosen = sample_indices(len(data), settings.limit)
    rows = set(data.rows[chosen].tolist())
    paths = found.source.files["test" if split == "test" and not found.held_out else "train"]
    if isinstance(template, OptionsTemplate):
        limits = (settings.max_length, settings.truncate_side)
        questions = read_questions(paths, rows, template, base.tokenizer, *limits)
        return Choices(questions, base.tokenizer, settings.batch_size), about
    comparison = Rouge() if name == "rouge" else ExactMatch()
    most = room_of(base.config.max_position_embeddings, None, settings.max_new_tokens, settings.truncate_side)
    cut_to = min(settings.max_length, most.cut_to)  # as long as in training, or shorter
    room = most._replace(cut_to=cut_to)
    found_prompts = read_prompts(paths, template, base.tokenizer, room, found.source.category, settings.skip_bad_rows)
    prompts = [prompt for prompt in found_prompts.prompts if prompt.row in rows]
    stops = stop_ids(base, template, settings.adapter)
    return Written(comparison, prompts, base.tokenizer, settings, stops, settings.batch_size), about


def read(settings: EvaluationSettings, base: Base) -> tuple[DataSet, EncodedData, str | None]:
    """The data set, the part of it to score, and the name of that part (None if a file is scored whole)."""
    # Without --test_fraction no part of a single file is held out, so all of it is scored.
    is_file = settings.data not in PUBLIC_DATASETS and Path(settings.data).is_file()
    is_whole = is_file and not settings.test_fraction
    split = "train" if is_whole else settings.split
    data_settings = replace(settings, test_fraction=0.0) if is_whole else settings

    def adapt(template: Renderer) -> Renderer:
        return as_metric_reads(settings, template)

    found = load_data(data_settings, base.tokenizer, splits=(split,), adapt=adapt)
    data = found.train if split == "train" else found.test
    if data is None:
        parts = ", ".join(found.source.files)
        raise UserError(f"--split {split}: {settings.data} has no such part, only {parts}")
    announce(found.warnings())
    return found, data, None if is_whole else split


def name_of(settings: EvaluationSettings, template: Renderer) -> str:
    return settings.metric or ("accuracy" if template.answers else "loss")


def as_metric_reads(settings: EvaluationSettings, template: Renderer) -> Renderer:
    """The template, or one that reads its rows as the metric needs them. Raises UserError for a template with whose
    answers the metric can do nothing."""
    name = name_of(settings, template)
    if name == "accuracy" and not template.answers:
        raise UserError(f"--metric accuracy: expected a template with answer words, found {template.name}")
    if name in GENERATING and template.answers:
        found = f"found {template.name}, whose answers are words: --metric accuracy and multiple_choice are for these"
        raise UserError(f"--metric {name}: expected a template whose answers are free text, {found}")
    if name == "multiple_choice":
        return OptionsTemplate(template)
    if name == "accuracy" and settings.predictions and isinstance(template, Template):
        return UnlabelledTemplate(template)
    return template


def describe(settings: EvaluationSettings, metric: str) -> dict:
    """What was scored, for the result."""
    return {
        "metric": metric,
        "model": settings.model,
        "adapter": settings.adapter,
        "quantize": settings.quantize,
        "data": settings.data,
        "limit": settings.limit,
        "max_length": settings.max_length,
    }


def try_files(settings: EvaluationSettings) -> None:
    """Raises UserError now, and not after hours of work, where a file that a flag names cannot be written. Changes no
    file."""
    for flag in ("output", "predictions"):
        path = getattr(settings, flag)
        if path is None or Path(path).is_fifo():  # whoever reads a pipe would see its end
            continue
        is_new = not Path(path).exists()
        write(flag, path, "", mode="a")
        if is_new:
            Path(path).unlink()


def write(flag: str, path: str, text: str, mode: str = "w") -> None:
    """Write a file that a flag names. Raises UserError where that is not possible."""
    with as_user_error(f"--{flag} {path}", "a file that can be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    record(run)(main)  # record gives torchrun the traceback of the rank that failed first
