"""Score a model folder on a data set: accuracy of the answer word, loss of the answers, or perplexity of all the text.

    python evaluate.py --model runs/imdb-tiny/model --data imdb --data_dir assets/imdb_sample
    torchrun --nproc_per_node 4 evaluate.py --model DIR --data imdb --data_dir DIR --limit 1000 --output result.json

Every example is scored exactly once. The number of ranks and the batch size do not change the result.
"""

from llama.boundary.command_line import announce, parse, run
from llama.evaluation.settings import EvaluationSettings

if __name__ == "__main__":  # --help and mistyped flags need not wait until torch is imported
    run(lambda: parse(EvaluationSettings, description=__doc__))

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.distributed.elastic.multiprocessing.errors import record

from data import DataSet, load_data
from llama.boundary.errors import UserError, reason
from llama.data.examples import EncodedData
from llama.data.sources import PUBLIC_DATASETS
from llama.data.tokenizer import Tokenizer
from llama.evaluation.score import answer_ids, evaluate
from llama.parallel.collectives import gather
from llama.parallel.processes import compute_dtype, join
from llama.storage.base import Base
from llama.storage.peft import adapter_notes, read_adapter
from llama.training.finished_run import from_runs
from lora import Changes, open_model


def main() -> None:
    settings = from_runs(parse(EvaluationSettings, description=__doc__))
    base = Base.pretrained(settings.model, settings.max_length, settings.control_tokens)
    found, data, split = read(settings, base)
    words = answer_ids(found.template, base.tokenizer) if settings.metric in (None, "accuracy") else None
    metric = settings.metric or ("accuracy" if words else "loss")
    if metric == "perplexity":
        data = data.labelling_prompts()
    adapter = read_adapter(settings.adapter) if settings.adapter else None
    announce([*base.notes, *adapter_notes(settings.adapter)])
    changes = Changes(settings.quantize, adapter, train_layers="none", adapter_folder=settings.adapter)
    with join() as process:
        model = open_model(base, changes, process, compute_dtype(settings.dtype, process.device))
        began = time.perf_counter()
        metrics, predicted = evaluate(model, data, process, settings.batch_size, settings.limit, words or None)
        seconds = time.perf_counter() - began
        probabilities = {i: list(scored.probabilities) for part in gather(predicted) for i, scored in part.items()}
        if not process.is_rank_zero:
            return
        if metric == "perplexity":
            metrics["perplexity"] = float(np.exp(metrics["loss"]))
        result = describe(settings, found, data, split) | {"ranks": process.world_size} | metrics
        if settings.predictions:
            result["without_label"] = len(probabilities) - metrics["n"]
            note_missing_labels(metrics["n"], result["without_label"])
        count = len(probabilities) or metrics["n"]
        result |= {"seconds": round(seconds, 3), "examples_per_second": count / seconds}
        if settings.output:
            write("output", settings.output, json.dumps(result, indent=2) + "\n")
        if settings.predictions:
            lines = prediction_lines(found, data, probabilities, base.tokenizer)
            write("predictions", settings.predictions, lines)
        print(json.dumps(result, indent=2))  # last: nobody may be there to read it


def read(settings: EvaluationSettings, base: Base) -> tuple[DataSet, EncodedData, str | None]:
    """The data set, the part of it to score, and that part's name; None where a file is scored whole."""
    # Nothing says which part of a single file to hold out, so all of it is scored.
    is_whole = (
        settings.data not in PUBLIC_DATASETS and Path(settings.data).is_file() and not settings.test_fraction
    )
    split = "train" if is_whole else settings.split
    data_settings = replace(settings, test_fraction=0.0) if is_whole else settings
    found = load_data(data_settings, base.tokenizer, splits=(split,), predict=settings.predictions is not None)
    data = found.train if split == "train" else found.test
    if data is None:
        parts = ", ".join(found.source.files)
        raise UserError(f"--split {split}: {settings.data} has no such part, only {parts}")
    announce(found.warnings())
    if not found.template.answers and settings.metric == "accuracy":
        raise UserError(f"--metric accuracy: expected a template with answer words, found {found.template.name}")
    return found, data, None if is_whole else split


def describe(settings: EvaluationSettings, found: DataSet, data: EncodedData, split: str | None) -> dict:
    """What was scored, for the result."""
    return {
        "model": settings.model,
        "adapter": settings.adapter,
        "quantize": settings.quantize,
        "data": settings.data,
        "template": found.template.name,
        "bundled_sample": found.source.bundled_sample,
        "split": split,
        "held_out": found.held_out if split else None,
        "bad_rows": data.bad_row_count,
    }


def note_missing_labels(labelled: int, unlabelled: int) -> None:
    if unlabelled:
        scored = f"loss and accuracy are of the other {labelled}" if labelled else "nothing is scored"
        announce([f"rows without a label: {unlabelled}; they are predicted, and {scored}"])


def prediction_lines(
    found: DataSet, data: EncodedData, probabilities: dict[int, list[float]], tokenizer: Tokenizer
) -> str:
    """A JSON line for each predicted example: its row in the file, the prompt as the model read it, the most probable
    answer word, the probability of each, and the right one where the row has it."""
    answers = [answer.strip() for answer in found.template.answers]
    lines = []
    for i in sorted(probabilities):
        ids, is_answer = data[i]
        of_words = dict(zip(answers, probabilities[i], strict=True))
        prediction = max(of_words, key=lambda word: of_words[word])
        line = {
            "row": int(data.rows[i]),
            "prompt": tokenizer.decode(ids[~is_answer]),
            "prediction": prediction,
            "probability": of_words[prediction],
            "probabilities": of_words,
        }
        if data.answers[i] >= 0:
            line["answer"] = answers[data.answers[i]]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def write(flag: str, path: str, text: str) -> None:
    """Write a file that a flag names. Raises UserError where that is not possible."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--{flag} {path}: {reason(error)}, expected a file that can be written") from None


if __name__ == "__main__":
    record(run)(main)  # record gives torchrun the traceback of the rank that failed first
