"""EleutherAI's lm-eval over this project's models: its tasks, prompts and metrics, our forwards.

`python evaluate.py --model DIR --harness TASK` uses this class. So may `lm_eval.simple_evaluate(model=...)`, to which
it is also known as "llama_finetuning". https://github.com/EleutherAI/lm-evaluation-harness

Numbers are only comparable if texts become the same ids. So this follows lm-eval's own `hf` model, not training here:
context and continuation are encoded as one text and then split (`_encode_pair`, which first moves spaces at the end of
the context to the continuation); what is too long loses its start; and a text is decoded as if it began one. One thing
differs: a text that spells a control token stays text, unless --control_tokens names it.
"""

from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama.boundary.errors import UserError, as_user_error, one_line
from llama.boundary.progress import Progress
from llama.boundary.records import read_record
from llama.data.tokenizer import Tokenizer
from llama.evaluation.losses import few_enough, in_memory, label_losses, sums_of_examples
from llama.evaluation.outcome import Outcome
from llama.evaluation.score import own_batches
from llama.evaluation.settings import EvaluationSettings
from llama.evaluation.shared_prefix import Packer
from llama.generation.decode import generate
from llama.generation.request import Request
from llama.generation.settings import GenerationSettings
from llama.generation.step import lay_out
from llama.generation.text import TextStream
from llama.model import Llama
from llama.parallel.collectives import fail_together, gather_dict, group_that_waits
from llama.parallel.processes import Process

ANSWER = 256  # tokens, where a task does not say
TOP_K = 50  # where a task draws and does not say, as in transformers
OF_DRAWS = ("top_k", "top_p", "min_p")  # hf does not look at them either where a task does not draw


@register_model("llama_finetuning")
class Harness(TemplateLM):
    """A model as lm-eval asks it. Every rank gets all requests, computes a share of them, and has all results.

    model:     on each rank as a whole.
    stop_ids:  the ids that end an answer. prefix_id: what is read before a text that has nothing before it.
    seed:      of the draws: a text depends on it, on its prompt, and on how often the same was asked before.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        process: Process,
        stop_ids: frozenset[int],
        prefix_id: int,
        batch_size: int = 16,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.texts = tokenizer
        self.process = process
        self.stop_ids = stop_ids
        self.prefix_id = prefix_id
        self.at_once = batch_size
        self.seed = seed
        self.positions = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.texts.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = self.texts.encode(string)
        if add_special_tokens is False and ids[:1] == [self.texts.bos_id]:
            return ids[1:]
        return ids

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_) -> list[tuple[float, bool]]:
        """Of each (texts, context ids, continuation ids): log p(continuation | context) in nats, and whether each of
        its tokens is the likeliest one. Raises UserError for a continuation that is longer than the model reads."""
        examples = []
        for _, context, continuation in requests:
            if len(continuation) > self.positions:
                raise UserError(f"a continuation has {len(continuation)} tokens, the model reads {self.positions}")
            whole = np.array([*context, *continuation], np.int32)
            ids = whole[-self.positions - 1 :]
            is_label = np.arange(len(ids)) >= len(ids) - len(continuation)
            examples.append((ids, is_label))
        data = in_memory(examples)
        most_labels = int(data.label_counts.max(initial=0))
        together = few_enough(self.at_once, most_labels, self.model.config.vocab_size)
        indices = range(len(data))
        packer = Packer(self.model, data, indices, self.process)
        mine = own_batches(indices, packer.data.lengths, self.process, together)
        own: dict[int, tuple[float, bool]] = {}
        for part in self.progress("reading texts", "batches", len(mine)).over(mine):
            batch = packer.pack(part)
            logits = self.model.logits(batch.tokens, batch.documents, batch.rows).float()
            losses_of_labels = label_losses(logits, batch.targets)
            losses = sums_of_examples(losses_of_labels, batch)
            is_other = logits.argmax(-1) != batch.targets
            others = sums_of_examples(is_other.float(), batch)
            for i, loss, count in zip(part, losses.tolist(), others.tolist(), strict=True):
                own[i] = (-loss, count == 0)
        return self.of_all_ranks(own)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """log p of each text, in windows as long as the model reads; each token is predicted once."""
        windows = []
        of_text = []  # of each window: the number of its text
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_id, self.positions, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                of_text.append(number)
        sums = [0.0] * len(requests)
        for number, (likelihood, _) in zip(of_text, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += likelihood
        return sums

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to the first of its stop strings."""
        mine = range(self.process.data_rank, len(requests), self.process.data_ranks)
        asked = Counter[str]()
        prompts = []
        until = []
        for request in requests:
            context, kwargs = request.args
            key = str(request.args)
            seed = self.seed + asked[key]
            asked[key] += 1
            settings, stops = settings_of(kwargs, seed, self.positions)
            room = self.positions - settings.max_new_tokens
            ids = self.tok_encode(context)[-room:]
            if not ids:
                ids = [self.prefix_id]
            stream = TextStream(self.texts.decode_new, stops)
            prompts.append(Request(ids, settings, self.stop_ids, stream))
            until.append(stops)
        self.model = lay_out(self.model, self.at_once)
        own: dict[int, str] = {}
        progress = self.progress("writing answers", "prompts", len(mine))
        group = group_that_waits()  # answers of other ranks may take hours longer
        with fail_together("writing answers", group), progress:
            for place, answer in generate(self.model, [prompts[i] for i in mine], self.at_once):
                i = mine[place]
                ids = [id for id in answer.ids if id < self.texts.vocab_size]  # a model may have more
                text = self.texts.decode(ids)
                own[i] = postprocess_generated_text(text, until[i], None)
                progress.update()
        return self.of_all_ranks(own, group)

    def progress(self, what: str, unit: str, total: int) -> Progress:
        return Progress(what, unit, total, silent=not self.process.is_rank_zero)

    def of_all_ranks(self, own: dict, group=None) -> list:
        """The results of all requests in order, of which each rank has its `own`."""
        found = gather_dict(own, group)
        return [found[i] for i in range(len(found))]


def settings_of(asked: dict, seed: int, positions: int) -> tuple[GenerationSettings, list[str]]:
    """How a task wants a text to be continued, and its stop strings. Raises UserError for what is unknown here."""
    kwargs = dict(normalize_gen_kwargs(asked, ANSWER))
    stops = [text for text in kwargs.pop("until") if text]
    kwargs["max_new_tokens"] = kwargs.pop("max_gen_toks")
    draws = kwargs.pop("do_sample")
    kwargs["temperature"] = float(kwargs.get("temperature", 0))
    if draws:
        kwargs.setdefault("top_k", TOP_K)
    else:
        kwargs = {name: value for name, value in kwargs.items() if name not in OF_DRAWS}
    where = f"generation_kwargs {asked!r:.200}"
    if bool(draws) != (kwargs["temperature"] > 0):
        raise UserError(f"{where}: do_sample is {draws}, expected a temperature above 0 with it")
    if kwargs["max_new_tokens"] >= positions:
        raise UserError(f"{where}: expected fewer than the model's {positions} positions")
    return read_record(GenerationSettings, kwargs | {"seed": seed}, where), stops


class Tasks:
    """The metrics that lm-eval's tasks ask for. `start`: the id that config.json says a text begins with, for models
    whose tokenizer puts none there. Raises UserError for a task that there is not."""

    generates = True

    def __init__(self, settings: EvaluationSettings, tokenizer: Tokenizer, stop_ids: frozenset[int], start: object):
        self.names = settings.tasks
        self.limit = settings.limit or None
        self.folder = settings.harness_path
        prefix = tokenizer.bos_id
        if prefix is None and type(start) is int and 0 <= start < tokenizer.vocab_size:
            prefix = start
        self.prefix_id = tokenizer.eos_id if prefix is None else prefix
        self.given = (tokenizer, stop_ids, settings.batch_size, settings.seed)
        self.manager = find_tasks(self.names, self.folder)
        self.about = {"harness": f"lm-eval {metadata.version('lm-eval')}", "stop_ids": sorted(stop_ids)}

    def score(self, model: Llama, process: Process) -> Outcome:
        """`tasks`: what lm-eval finds for each. Raises UserError where the data of a task is not to be had."""
        tokenizer, stop_ids, batch_size, seed = self.given
        asked = Harness(model, tokenizer, process, stop_ids, self.prefix_id, batch_size, seed)
        try:
            found = simple_evaluate(
                asked, tasks=self.names, limit=self.limit, task_manager=self.manager, log_samples=False
            )
        except OSError as error:
            raise UserError(f"--harness {','.join(self.names)}: {one_line(error)}") from None
        if found is None:  # lm-eval has results on one rank of each machine
            return Outcome({"n": 0}, {}, ())
        counts = found["n-samples"].values()
        values = {
            "n": sum(count["effective"] for count in counts),
            "tasks": found["results"],
            "versions": found["versions"],
            "shots": found["n-shot"],
        }
        return Outcome(values, {}, ())


def find_tasks(names: Sequence[str], folder: str | None) -> TaskManager:
    """lm-eval's tasks, and those of a folder. Raises UserError for a name that is none of them."""
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--harness_path {folder}: expected a folder with lm-eval's YAML files")
    with as_user_error(f"--harness_path {folder}"):
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            where = f"neither lm-eval nor {folder} has" if folder else "without --harness_path, lm-eval has not"
            raise UserError(f"--harness: {where} a task {name!r:.100}; python -m lm_eval ls tasks shows all")
    return manager
