"""Score a model folder on a data set: accuracy of the answer word, or perplexity of the whole text.

    python evaluate.py --model runs/imdb-tiny/model --data imdb --data_dir assets/imdb_sample
    torchrun --nproc_per_node 4 evaluate.py --model DIR --data imdb --data_dir DIR --limit 1000 --output result.json

Every example is scored exactly once, whatever the number of ranks and the batch size, and no padding is computed.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import lora
from data import BUNDLED_SAMPLE, NAMED, DataSettings, load
from llama.boundary.command_line import is_local_first, parse, run, setting
from llama.boundary.errors import UserError
from llama.boundary.hub import find_model
from llama.data.batches import deal, pack
from llama.data.encoding import EncodedData, Renderer
from llama.data.rows import DataError
from llama.data.tokenizer import Tokenizer
from llama.model.decoder import Llama
from llama.model.quantize import KINDS
from llama.parallel.distribute import Ranks, build, compute_dtype, ranks
from llama.storage import pretrained


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    script = "evaluate.py"

    model: str = setting(help="a Hugging Face folder, or a hub id")
    adapter: str | None = setting(None, "put this LoRA adapter on the model, a folder in PEFT's format")
    quantize: str = setting("none", "round the linears to 8 or 4 bits, as an adapter was trained over",
                            choices=("none", *KINDS))
    split: str = setting("test", "which part to score; a single file is scored whole unless --test_fraction is given",
                         choices=("train", "test"))
    limit: int = setting(0, "score a fixed random choice of this many examples; 0: all")
    metric: str | None = setting(None, "accuracy: of the answer word; loss: of the answers; perplexity: of every token "
                                 "of the rendered text; accuracy where there are answer words, else loss",
                                 choices=("accuracy", "loss", "perplexity"))
    batch_size: int = setting(16, "examples per rank and forward")
    dtype: str | None = setting(None, "what to compute in; bfloat16 where the device has it, else float32",
                                choices=("bfloat16", "float32"))
    output: str | None = setting(None, "write the metrics to this JSON file")
    predictions: str | None = setting(None, "write one JSON line per example, in the order of the file")

    def checks(self):
        return [
            *super().checks(),
            ("adapter", "a folder", self.adapter != ""),
            ("batch_size", "1 or more", self.batch_size >= 1),
            ("limit", "0 or more", self.limit >= 0),
            ("predictions", "another file than --output", not self.predictions or self.predictions != self.output),
            # nothing is predicted, so the file would be empty
            ("predictions", "--metric accuracy with it", not self.predictions or self.metric in (None, "accuracy")),
        ]


def answer_ids(template: Renderer, tokenizer: Tokenizer) -> list[int]:
    """The first token of each answer word. Raises DataError when two words begin with the same token."""
    ids = [(tokenizer.encode(word, continues=True) or [None])[0] for word in template.answers]
    if None in ids:
        raise DataError(f"{tokenizer.path}: has no token for {template.answers[ids.index(None)]!r}")
    if len(set(ids)) < len(ids):
        raise DataError(f"{tokenizer.path}: the answers {template.answers} begin with the same token, so one forward "
                        "cannot tell them apart")
    return ids


def choose(examples: int, limit: int) -> np.ndarray:
    """A fixed random choice of `limit` examples (0: all): files are often sorted by label, so not the first ones."""
    if not 0 < limit < examples:
        return np.arange(examples)
    return np.sort(np.random.default_rng(0).permutation(examples)[:limit])


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def evaluate(
    model: Llama, data: EncodedData, ranks: Ranks, batch_size: int, limit: int = 0, words: list[int] | None = None
) -> tuple[dict, dict[int, int]]:
    """Metrics over all ranks, and this rank's predictions {example: index of the answer word}.

    `loss` is the sum of the negative log-likelihoods of all labelled tokens divided by their number, in nats: neither
    batch size nor number of ranks enters. `accuracy`, given the token ids of the answer `words`: how often the right
    one is the likeliest of them. Collective.
    """
    model.eval()
    indices = choose(len(data), limit)
    # Every rank runs the same number of forwards, or a collective inside would wait forever.
    rounds = -(-len(indices) // (batch_size * ranks.world_size))
    mine = deal(indices.tolist(), data.lengths, rounds * ranks.world_size, batch_size)[ranks.rank :: ranks.world_size]
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)  # loss, labels, right answers, examples
    predicted = {}
    for part in tqdm(mine, desc="evaluating", unit=" batches", disable=not ranks.is_first, leave=False):
        batch = pack(data, part, ranks.device)
        inputs = (batch.tokens, batch.documents.positions, batch.documents, batch.rows)
        if words is None:
            sums += torch.stack([model(*inputs, batch.targets).double(), *_counts(batch, 0, ranks.device)])
            continue
        log_p = model(*inputs).float().log_softmax(-1)
        loss = -log_p.gather(1, batch.targets[:, None]).sum()
        firsts = np.cumsum([0, *batch.labels_per_example])[:-1]
        guesses = log_p[firsts][:, words].argmax(-1).tolist()
        right = sum(guess == data.answers[i] for i, guess in zip(part, guesses, strict=True))
        sums += torch.stack([loss.double(), *_counts(batch, right, ranks.device)])
        predicted |= dict(zip(part, guesses, strict=True))
    dist.all_reduce(sums)
    loss, labels, right, examples = sums.tolist()
    if not np.isfinite(loss):
        raise UserError(f"the loss over {int(examples)} held-out examples is {loss}: the model's weights are unusable")
    metrics = {"loss": loss / labels} | ({"accuracy": right / examples} if words is not None else {})
    return metrics | {"n": int(examples)}, predicted


def _counts(batch, right: int, device: torch.device) -> Tensor:
    return torch.tensor([len(batch.targets), right, len(batch.indices)], dtype=torch.float64, device=device)


@record  # gives torchrun the real error of the rank that failed first
def main() -> None:
    settings = parse(Settings, description=__doc__)
    folder = find_model(settings.model)
    _, config, tokenizer = pretrained.open_folder(folder, settings.max_length)
    # A file that nothing names a split of is scored whole.
    whole = settings.data not in NAMED and Path(settings.data).is_file() and not settings.test_fraction
    split = "train" if whole else settings.split
    found = load(replace(settings, test_fraction=0.0) if whole else settings, tokenizer, splits=(split,))
    data = found.train if split == "train" else found.test
    if data is None:
        raise DataError(f"--split {split}: {settings.data} has no such part, only {', '.join(found.source.files)}")
    if found.source.bundled_sample and is_local_first():
        print(BUNDLED_SAMPLE, file=sys.stderr)
    answers = found.template.answers
    metric = settings.metric or ("accuracy" if answers else "loss")
    if not answers and (metric == "accuracy" or settings.predictions):
        raise DataError(f"--metric accuracy: expected a template with answer words, found {found.template.name}")
    words = answer_ids(found.template, tokenizer) if metric == "accuracy" else None
    adapter = lora.read_adapter(settings.adapter) if settings.adapter else None

    def adapt(model: Llama) -> None:
        lora.prepare(model, adapter, settings.quantize)
        model.requires_grad_(False)  # so that it is kept in the dtype it computes in

    if metric == "perplexity":
        data = data.labelling_prompts()
    with ranks() as here:
        dtype = compute_dtype(settings.dtype, here.device)
        model = build(config, here, dtype, adapt=adapt)
        pretrained.load(model, folder)
        if adapter:
            lora.load(model, settings.adapter)
        started = time.perf_counter()
        metrics, predicted = evaluate(model, data, here, settings.batch_size, settings.limit, words)
        seconds = time.perf_counter() - started
        gathered = [None] * here.world_size
        dist.all_gather_object(gathered, predicted)
        if not here.is_first:
            return
        if metric == "perplexity":
            metrics["perplexity"] = float(np.exp(metrics["loss"]))
        about = {"model": settings.model, "adapter": settings.adapter, "quantize": settings.quantize,
                 "data": settings.data, "template": found.template.name,
                 "bundled_sample": found.source.bundled_sample, "split": None if whole else split,
                 "held_out": None if whole else found.held_out, "bad_rows": data.bad_rows, "ranks": here.world_size}
        result = about | metrics | {"seconds": round(seconds, 3), "examples_per_second": metrics["n"] / seconds}
        print(json.dumps(result, indent=2))
        if settings.output:
            _write("output", settings.output, json.dumps(result, indent=2) + "\n")
        if settings.predictions:
            guesses = {i: guess for part in gathered for i, guess in part.items()}
            lines = [{"row": int(data.rows[i]), "prediction": answers[guesses[i]].strip(),
                      "answer": answers[data.answers[i]].strip()} for i in sorted(guesses)]
            _write("predictions", settings.predictions, "".join(json.dumps(line) + "\n" for line in lines))


def _write(flag: str, path: str, text: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    except OSError as error:
        raise UserError(f"--{flag} {path}: {error.strerror}, expected a file that can be written") from None


if __name__ == "__main__":
    run(main)
