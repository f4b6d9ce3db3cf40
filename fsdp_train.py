"""Fine-tune a Llama: set up, build, shard, train, save.

    torchrun --nproc_per_node 4 fsdp_train.py --data imdb                       a tiny Llama, from scratch
    torchrun --nproc_per_node 8 fsdp_train.py --model DIR --data imdb           a Hugging Face folder, on 8 GPUs
    python fsdp_train.py --model DIR --data reviews.jsonl                       one process, GPU or not
    torchrun --nnodes 2 --node_rank R --master_addr HOST --nproc_per_node 8 fsdp_train.py ...

The same code runs each of them: CUDA and NCCL where there are GPUs, CPU and gloo where there are none.
"""

import json
import math
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import lora
from data import BUNDLED_SAMPLE, TINY_TOKENIZER, DataSet, DataSettings, Source, load, run_name
from evaluate import answer_ids, evaluate
from llama.boundary.command_line import parse, run, setting
from llama.boundary.errors import UserError
from llama.boundary.hub import find_model
from llama.data.batches import pack
from llama.data.encoding import EncodedData
from llama.data.tokenizer import Tokenizer, load_tokenizer
from llama.model.config import TINY, ModelConfig
from llama.model.decoder import Llama
from llama.model.quantize import KINDS, bytes_per_weight
from llama.parallel.collectives import together
from llama.parallel.distribute import Ranks, build, on_meta, ranks
from llama.storage import checkpoint, pretrained
from llama.storage.atomic import replace_durably
from llama.storage.slices import all_finite
from llama.training.journal import Journal, draw_loss_curve
from llama.training.optim import OPTIMIZERS, SCHEDULES, build_adamw, clip_gradients, gradient_norm, learning_rate
from llama.training.plan import BEGUN, COUNTS, Plan, make_plan
from llama.training.stopping import STOPPED, StopRequests
from lora import ALL_LINEAR, LARGEST_RANK, VARIANTS, Adapter


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """Every setting of a run, its default, and what it means; those of the data are in data.py."""

    script = "fsdp_train.py"

    # What
    model: str = setting("tiny", "tiny (a preset trained from scratch), a Hugging Face folder, or a hub id")
    adapter: str | None = setting(None, "continue training this LoRA adapter, a folder in PEFT's format")
    quantize: str = setting("none", "keep the frozen linears in 8 or 4 bits", choices=("none", *KINDS))
    train_layers: str = setting("all", "all, or last:N and any of norm, lm_head, embed_tokens, with commas: the rest "
                                "is frozen")
    lora_rank: int = setting(0, "train an adapter of this rank instead of the model; 0: train the model")
    lora_alpha: float = setting(16.0, "the adapter's weight: scaled by alpha / rank (rslora: / sqrt(rank))")
    lora_dropout: float = setting(0.0, "part of an adapter's input that is dropped in training")
    lora_targets: str = setting(ALL_LINEAR, f"linears with an adapter, with commas: {ALL_LINEAR} (those of the "
                                "layers), or ends of names like q_proj,v_proj")
    lora_variant: str = setting("lora", "kind of adapter", choices=VARIANTS)
    train_on_prompt: bool = setting(False, "learn to predict prompts too, not only answers")
    # How
    epochs: float | None = setting(None, "passes over the data; 1, and for tiny what its recipe says")
    max_steps: int = setting(0, "at most so many optimizer steps, over which the rate runs its course; 0: as --epochs")
    batch_size: int | None = setting(None, "examples per rank and micro-batch; 16, and for tiny what its recipe says")
    batch_tokens: int = setting(0, "instead of counting examples, fill each rank's micro-batch with whole ones up to "
                                "so many tokens; 0: count examples")
    group_by_length: bool = setting(False, "put examples of similar length into the same step")
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step")
    learning_rate: float | None = setting(None, "peak rate; 2e-5, for an adapter 2e-4, and for tiny what its "
                                         "recipe says")
    lr_schedule: str = setting("cosine", "what the rate does after the warm-up", choices=SCHEDULES)
    warmup_ratio: float = setting(0.05, "part of the steps over which the rate rises from 0")
    optimizer: str = setting("adamw", "adamw8bit keeps its moments in 8 bits", choices=tuple(OPTIMIZERS))
    beta2: float | None = setting(None, "AdamW's memory of squared gradients; 0.999, and for tiny what its recipe says")
    weight_decay: float = setting(0.0, "decay of matrices, per unit of learning rate; norms and biases never decay")
    max_grad_norm: float = setting(1.0, "clip the gradient's norm to this; 0: never")
    seed: int = setting(0, "of the data order and of random weights")
    # On what
    dtype: str | None = setting(None, "what to compute in and to keep frozen weights in (trained ones are kept in "
                                "float32); bfloat16 where the device has it, else float32",
                                choices=("bfloat16", "float32"))
    sharding: str = setting("full", "full: a layer's weights are gathered twice a step, grad: once, and kept",
                            choices=("full", "grad"))
    cpu_offload: bool = setting(False, "on a GPU: keep weights and optimizer in the host's memory")
    defer_gradient_sync: bool = setting(False, "reduce gradients once a step instead of once a micro-batch; keeps "
                                        "whole fp32 gradients on every rank")
    activation_checkpointing: str = setting("none", "full: keep only each layer's input and compute the rest again "
                                            "in the backward", choices=("none", "full"))
    compile: bool = setting(False, "compile each layer (half a minute at the start)")
    # What to keep
    output: str | None = setting(None, "the run's folder; runs/DATA-MODEL, or the next free number of it")
    eval_every: int | None = setting(None, "evaluate every N steps; 0, only before and after; for tiny its recipe's")
    eval_limit: int = setting(1000, "held-out examples to evaluate on, a fixed random choice; 0: all")
    save_every: int = setting(0, "save a checkpoint every N steps; 0: only at the end")
    async_save: bool = setting(False, "write checkpoints from a copy in the host's memory, while training goes on")
    keep_checkpoints: int = setting(2, "newest checkpoints to keep, besides the one with the lowest held-out loss and "
                                    "those in which somebody put a file named keep; -1: all")
    resume: str | None = setting(None, "continue the run in the output folder from its newest checkpoint, or from the "
                                 "one that is named, as step-100", bare="newest")
    allow_changed: str = setting("", "settings in which a resumed run may differ from its checkpoint, with commas: the "
                                 "names that its refusal lists")
    log_every: int = setting(1, "write every Nth step to metrics.jsonl")

    def checks(self):
        return [
            *super().checks(),
            ("epochs", "more than 0, at most 1e6", self.epochs is None or 0 < self.epochs <= 1e6),
            ("max_steps", "0 or more", self.max_steps >= 0),
            ("batch_size", "1 or more", self.batch_size is None or self.batch_size >= 1),
            ("batch_tokens", f"0, or --max_length {self.max_length} or more",
             self.batch_tokens == 0 or self.batch_tokens >= self.max_length),
            ("batch_tokens", "0 with --group_by_length", not (self.batch_tokens and self.group_by_length)),
            ("lora_rank", f"0 to {LARGEST_RANK}", 0 <= self.lora_rank <= LARGEST_RANK),
            ("adapter", "a folder", self.adapter != ""),
            ("lora_rank", "0 with --adapter, which has its own", not (self.adapter and self.lora_rank)),
            ("lora_rank", "0 with --model tiny, whose random weights nobody else has",
             not (self.lora_rank and self.model == "tiny")),
            ("lora_alpha", "more than 0", 0 < self.lora_alpha < math.inf),
            ("lora_dropout", "0 to 1, without 1", 0 <= self.lora_dropout < 1),
            *((name, "--lora_rank with it", bool(self.lora_rank) or getattr(self, name) == getattr(type(self), name))
              for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_variant")),
            ("adapter", "a pretrained --model", not (self.adapter and self.model == "tiny")),
            ("quantize", "--lora_rank or --adapter: what is packed cannot be trained",
             self.quantize == "none" or self.has_adapter),
            ("train_layers", "all with an adapter", self.train_layers == "all" or not self.has_adapter),
            ("train_layers", "all, or last:N and any of norm, lm_head, embed_tokens",
             self.train_layers == "all" or all(re.fullmatch(r"last:[1-9][0-9]{0,5}|norm|lm_head|embed_tokens", part)
                                               for part in self.train_layers.split(","))),
            ("gradient_accumulation_steps", "1 or more", self.gradient_accumulation_steps >= 1),
            ("learning_rate", "more than 0", self.learning_rate is None or 0 < self.learning_rate < math.inf),
            ("beta2", "0 to 1, without 1", self.beta2 is None or 0 <= self.beta2 < 1),
            ("warmup_ratio", "0 to 1", 0 <= self.warmup_ratio <= 1),
            ("weight_decay", "0 or more", 0 <= self.weight_decay < math.inf),
            ("max_grad_norm", "0 or more", 0 <= self.max_grad_norm < math.inf),
            ("seed", "0 or more", self.seed >= 0),
            ("eval_every", "0 or more", self.eval_every is None or self.eval_every >= 0),
            ("eval_limit", "0 or more", self.eval_limit >= 0),
            ("save_every", "0 or more", self.save_every >= 0),
            ("keep_checkpoints", "1 or more, or -1", self.keep_checkpoints >= 1 or self.keep_checkpoints == -1),
            ("resume", "nothing after it, or step-N", self.resume is None or bool(
                re.fullmatch(r"newest|step-\d{1,9}", self.resume))),
            ("allow_changed", "--resume with it", not self.allow_changed or self.resume is not None),
            ("log_every", "1 or more", self.log_every >= 1),
        ]

    @property
    def has_adapter(self) -> bool:
        return bool(self.lora_rank or self.adapter)

    def with_recipe(self, ranks: int) -> "Settings":
        """Fill what was left open: a pretrained model wants a gentle rate, a new one a strong one and more passes."""
        rate = 2e-4 if self.has_adapter else 2e-5
        recipe = {"epochs": 1.0, "batch_size": 16, "learning_rate": rate, "beta2": 0.999, "eval_every": 0}
        if self.model == "tiny":  # 64 examples a step on any number of ranks, so the curve is the same everywhere
            per_rank = max(1, 64 // (ranks * self.gradient_accumulation_steps))
            recipe = {"epochs": 5.0, "batch_size": per_rank, "learning_rate": 5e-3, "beta2": 0.95, "eval_every": 50}
        return replace(self, **{name: value for name, value in recipe.items() if getattr(self, name) is None})


@dataclass(frozen=True)
class Task:
    """All that is known before the processes join: the model's shape, its tokenizer, the encoded data."""

    config: ModelConfig
    config_json: dict
    folder: Path | None  # of the pretrained weights; None: start from random ones
    tokenizer: Tokenizer
    data: DataSet
    train: EncodedData  # with the labels to train on
    words: list[int] | None  # the first token of each answer word; None where answers are free text
    adapter: Adapter | None

    @property
    def result(self) -> str:
        """The folder, within the run's, of what comes of it."""
        return "adapter" if self.adapter else "model"


def open_model(name: str, max_length: int = 0) -> tuple[Path | None, dict, ModelConfig, Tokenizer]:
    """What --model names: its folder (none for tiny), its config.json, its shape and its tokenizer."""
    if name != "tiny":
        folder = find_model(name)
        return folder, *pretrained.open_folder(folder, max_length)
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    pretrained.check_fit(TINY, tokenizer, max_length)
    return None, TINY.to_dict() | {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}, TINY, tokenizer


def prepare(settings: Settings) -> Task:
    """Read, check and encode everything. Each process does this alone: nobody waits in a collective for it."""
    folder, config_json, config, tokenizer = open_model(settings.model, settings.max_length)
    # The tiny preset belongs to the bundled sample: nothing is downloaded for it.
    data = load(settings, tokenizer, use_hub=folder is not None or settings.data != "imdb")
    if data.train is None:
        raise UserError(f"--data {settings.data}: has no train file")
    train = data.train.labelling_prompts() if settings.train_on_prompt else data.train
    words = answer_ids(data.template, tokenizer) if data.template.answers else None
    adapter = None
    if settings.adapter:
        adapter = lora.read_adapter(settings.adapter)
    elif settings.lora_rank:
        adapter = Adapter(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_variant,
                          tuple(settings.lora_targets.split(",")))
    # Refuses what does not fit.
    on_meta(config, torch.float32, lambda model: adapt(model, settings.quantize, settings.train_layers, adapter))
    return Task(config, config_json, folder, tokenizer, data, train, words, adapter)


def adapt(model: Llama, quantize: str, train_layers: str, adapter: Adapter | None) -> None:
    """Quantise, put the adapter on, freeze: what is to be done to a model before it is sharded."""
    lora.prepare(model, adapter, quantize)
    if train_layers != "all":
        train_only(model, train_layers.split(","))


def train_only(model: Llama, parts: list[str]) -> None:
    """Freeze all but the named parts. What lies below the lowest of them costs no backward: autograd never gets there.

    Raises UserError for a part that the model has not.
    """
    model.requires_grad_(False)
    tied = model.config.tie_word_embeddings
    for part in parts:
        name, _, count = part.partition(":")
        if name == "last":
            if int(count) > len(model.layers):
                raise UserError(f"--train_layers {part}: the model has {len(model.layers)} layers")
            model.layers[-int(count):].requires_grad_(True)
            continue
        if tied and name != "norm" and not {"lm_head", "embed_tokens"} <= set(parts):
            raise UserError(f"--train_layers {part}: lm_head and embed_tokens are one matrix in this model, expected "
                            "both or neither")
        getattr(model, name).requires_grad_(True)


def train(settings: Settings, task: Task, here: Ranks) -> None:
    """The whole run, from empty shards to the exported model."""
    folder = f"runs/{run_name(settings.data)}-{Path(settings.model).name}"
    with ExitStack() as locks:
        _train(settings, task, here, make_plan(settings, task, here, folder, locks))


def _train(settings: Settings, task: Task, here: Ranks, plan: Plan) -> None:
    began, say = time.perf_counter(), print if here.is_first else _nothing
    output, steps, first_step = plan.output, plan.steps, plan.first_step
    finished = [first_step == steps and (output / task.result).exists() and (output / "summary.json").exists()]
    dist.broadcast_object_list(finished)  # as rank 0 sees it
    if finished[0]:
        return say(f"{output} is finished already, after step {steps} of {steps}")

    model = build(task.config, here, plan.dtype, settings.sharding == "full",
                  settings.activation_checkpointing == "full", settings.compile,
                  lambda model: adapt(model, settings.quantize, settings.train_layers, task.adapter),
                  settings.cpu_offload)
    if task.folder is None:
        pretrained.initialize(model, settings.seed)
    else:
        pretrained.load(model, task.folder)
    if settings.adapter:
        lora.load(model, settings.adapter)
    elif task.adapter:
        lora.initialize(model, settings.seed)
    optimizer = build_adamw(model, settings.learning_rate, settings.weight_decay, settings.beta2, settings.optimizer)
    if plan.saved:
        checkpoint.verify(plan.saved, plan.manifest)
        checkpoint.load(plan.saved, model, optimizer, first_step)
        with together(plan.saved):
            for moved in checkpoint.set_aside(plan.saved.parent, first_step) if here.is_first else []:
                say(f"{moved}: set aside, it was after step {first_step}")
    with together(output):
        if here.is_first:
            (output / "summary.json").unlink(missing_ok=True)  # of a run that ended where this one goes on
        _announce(settings, task, here, model, plan, say)
        journal = Journal(output, first_step) if here.is_first else None
        if here.is_first and here.store:
            here.store.set(BEGUN, "")

    def held_out() -> dict:  # the loss of answers, also with --train_on_prompt
        if task.data.test is None:
            return {}
        metrics, _ = evaluate(model, task.data.test, here, settings.batch_size, settings.eval_limit, task.words)
        model.train()
        return metrics

    before = next((line["held_out"] for line in journal.lines if line["step"] == 0), {}) if journal else {}
    if first_step == 0:
        before = held_out()
        if journal and before:
            journal.write(step=0, held_out=before)
        say(f"before training: {_told(before)}")
    saver = checkpoint.Saver(output / "checkpoints", settings.keep_checkpoints, settings.async_save)
    try:
        after, totals = run_steps(settings, task, here, plan, model, optimizer, journal, saver, held_out)
    except UserError:  # on all ranks: what they have begun to save is worth having
        with suppress(UserError):  # it has warned already
            saver.wait()
        raise
    saver.wait()
    if first_step == steps:
        after = held_out()
    _finish(settings, task, here, model, output, steps, totals, before, after, journal, began)


def run_steps(
    settings: Settings, task: Task, here: Ranks, plan: Plan, model: Llama, optimizer: torch.optim.Optimizer,
    journal: Journal | None, saver: checkpoint.Saver, held_out: Callable[[], dict],
) -> tuple[dict, dict]:
    """Every optimizer step that is still to be done. Returns the last evaluation, and what the run has counted.

    Raises UserError for a loss or weight that is not finite; SystemExit with status STOPPED, once a checkpoint is
    there, when a signal asked for it.
    """
    data, steps, output, after = task.train, plan.steps, plan.output, {}
    totals = dict(plan.manifest.totals) if plan.manifest else dict.fromkeys(COUNTS, 0)
    model.train()
    progress = tqdm(total=steps, initial=plan.first_step, unit=" steps", disable=not here.is_first)
    with progress, StopRequests() as stop_requests:
        for step in range(plan.first_step, steps):
            step_began = time.perf_counter()
            micro_batches = plan.schedule.micro_batches(step)
            # Dropout, too, is a function of the step: a resumed run needs no generator's state.
            torch.manual_seed(int(np.random.SeedSequence((settings.seed, step, here.rank)).generate_state(1)[0]))
            indices = [i for part in micro_batches for i in part]
            loss, norm, labels = train_step(settings, model, data, micro_batches, here)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite, so the weights were "
                                f"left as they were; whole checkpoints: {_newest(output) or 'none yet'}")
            rate = learning_rate(step, steps, settings.learning_rate, settings.lr_schedule, settings.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            seconds, tokens = time.perf_counter() - step_began, int(data.lengths[indices].sum())
            for name, count in (("examples", len(indices)), ("tokens", tokens), ("labels", labels),
                                ("seconds", seconds)):
                totals[name] += count
            last, done = step + 1 == steps, step + 1
            if journal and (done % settings.log_every == 0 or last):
                journal.write(step=done, loss=loss, grad_norm=norm, learning_rate=rate, tokens=tokens, labels=labels,
                              examples_per_second=len(indices) / seconds, tokens_per_second=tokens / seconds,
                              peak_memory_bytes=_peak_memory(here.device), seconds=seconds)
            progress.update()
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            (stop, failed), after = stop_requests.agreed(bool(journal and journal.error)), {}
            if failed:
                raise journal.error if journal else UserError(f"{output}: rank 0 could not write there")
            if last or (not stop and settings.eval_every and done % settings.eval_every == 0):
                after = held_out()
                if journal and after:
                    journal.write(step=done, held_out=after)
                    progress.write(f"step {done}: {_told(after)}")
            if last or stop or (settings.save_every and done % settings.save_every == 0):
                with together(output):  # a run that goes on from here would not write this step's lines again
                    if journal and journal.error:
                        raise journal.error
                if not all_finite(model):
                    raise UserError(f"step {done}: a weight is no longer finite, so nothing was saved; whole "
                                    f"checkpoints: {_newest(output) or 'none yet'}")
                saver.save(done, model, optimizer, plan.binding, totals, after)
            if stop and not last:
                saver.wait()
                if journal:
                    progress.write(f"{stop}: saved and stopped after step {done} of {steps}; continue with --resume "
                                   f"--output {output}")
                raise SystemExit(STOPPED)
    return after, totals


def _finish(
    settings: Settings, task: Task, here: Ranks, model: Llama, output: Path, steps: int, totals: dict, before: dict,
    after: dict, journal: Journal | None, began: float,
) -> None:
    """Export the model; on rank 0 draw the loss curve, and write and print what came of the run. Collective."""
    result = task.result
    with together(output):
        if journal and journal.error:
            raise journal.error
        if here.is_first and (output / result).exists():
            shutil.rmtree(output / result)  # of this very run, which died before its summary
    if task.adapter:
        lora.save(model, output / result, task.adapter, settings.model)
    else:
        pretrained.export(model, output / result, task.config_json, task.tokenizer.files)
    peak = torch.tensor(_peak_memory(here.device), dtype=torch.int64, device=here.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    with together(output):
        if journal:
            seconds = totals["seconds"]  # of the steps alone, without evaluations and saves
            speed = {f"{name}_per_second": totals[name] / seconds for name in ("examples", "tokens")}
            journal.close()
            if not journal.path.exists():
                raise UserError(f"{journal.path}: deleted during the run; {result}/ was written, nothing else")
            summary = {
                "data": settings.data, "bundled_sample": task.data.source.bundled_sample, "model": settings.model,
                "ranks": here.world_size, "steps": steps,
                **{name: totals[name] for name in ("examples", "tokens", "labels")},
                "train_seconds": seconds, "total_seconds": time.perf_counter() - began, **speed,
                "peak_memory_bytes": int(peak), "before": before, "after": after,
            }
            draw_loss_curve(journal.lines, output / "loss.png", f"{settings.model} on {_named(task.data.source)}")
            replace_durably(output / "summary.json", json.dumps(summary, indent=2) + "\n")  # the last: the run is over
            print(f"before: {_told(before)}\nafter:  {_told(after)}")
            print(f"{speed['examples_per_second']:.1f} examples and {speed['tokens_per_second']:.0f} tokens a second; "
                  f"{result}/, loss.png, metrics.jsonl and summary.json are in {output}")


def train_step(
    settings: Settings, model: Llama, data: EncodedData, micro_batches: list[list[int]], here: Ranks
) -> tuple[float, float, int]:
    """Gradients of one optimizer step, clipped. Returns its loss, the gradient's norm before clipping, its labels.

    loss = sum of token losses over the whole global batch / number of labels in the whole global batch: all
    micro-batches, all ranks. A mean of means would give tokens of a batch with few labels too much weight.
    """
    labels = sum(int(data.label_counts[part].sum()) for part in micro_batches if part)
    if labels == 0:
        examples = [i for part in micro_batches for i in part][:5]
        raise UserError(f"--data {settings.data}: examples {examples} ... of one step hold no label")
    mine = micro_batches[here.rank :: here.world_size]
    total = torch.zeros((), device=here.device)
    for i, part in enumerate(mine):
        batch = pack(data, part, here.device)
        model.set_requires_gradient_sync(not settings.defer_gradient_sync or i == len(mine) - 1)
        loss = model(batch.tokens, batch.documents.positions, batch.documents, batch.rows, batch.targets)
        # FSDP averages gradients over ranks; the loss is a sum over them, hence the factor.
        (loss * (here.world_size / labels)).backward()
        total += loss.detach()
    dist.all_reduce(total)
    norm = gradient_norm(model)
    if norm.isfinite():
        clip_gradients(model, norm, settings.max_grad_norm)
    return float(total) / labels, float(norm), labels


def _newest(output: Path) -> Path | None:
    found = checkpoint.published(output / "checkpoints")
    return found[-1] if found else None


def _announce(settings: Settings, task: Task, here: Ranks, model: Llama, plan: Plan, say) -> None:
    """Print and save what this run is, with every default resolved."""
    binding, output, imbalance = plan.binding, plan.output, plan.schedule.imbalance(here.world_size)
    resolved = asdict(settings) | {k: binding[k] for k in ("template", "dtype", "steps", "global_batch")}
    if task.adapter:
        resolved |= {f"lora_{name}": value for name, value in binding["lora"].items()}
    resolved |= {"bundled_sample": task.data.source.bundled_sample, "output": str(output), "ranks": here.world_size,
                 "device": str(here.device.type)}
    train, test = task.train, task.data.test
    if here.is_first:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        data = {"train": len(train), "test": len(test) if test else 0, "truncated": int(train.was_cut.sum()),
                "bad_rows": task.data.bad_row_count,
                "held_out": task.data.held_out, "imbalance": round(imbalance, 5)}
        about = {"settings": resolved, "examples": data, "versions": versions}
        replace_durably(output / "run.json", json.dumps(about, indent=2) + "\n")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = bytes_per_weight(model)
    say(f"{trained:,} trainable parameters" + (f"; frozen linears at {packed:.3f} bytes a weight" if packed else ""))
    say(" ".join(f"{name}={value}" for name, value in resolved.items() if value is not None))
    if task.data.source.bundled_sample:
        say(BUNDLED_SAMPLE)
    if task.data.bad_row_count:
        say(f"{task.data.bad_row_count} bad rows were left out, the first: {task.data.bad_rows[0]}")
    say(f"{len(train)} examples of {train.lengths.mean():.0f} tokens, {train.was_cut.mean():.1%} of them cut; the rank "
        f"with the most tokens has {imbalance:.2%} more than the mean")
    for left_over in sorted((output / "checkpoints").glob("step-*.tmp")):
        say(f"{left_over}: was not finished, and is left out")
    if plan.saved:
        say(f"resuming after step {plan.first_step} of {plan.steps} in {output}")
    elif settings.resume:
        say(f"resuming after step 0 of {plan.steps} in {output} (it has no checkpoint)")


def _named(source: Source) -> str:
    return f"{source.name} (bundled sample)" if source.bundled_sample else source.name


def _told(metrics: dict) -> str:
    if not metrics:
        return "no held-out data"
    return ", ".join(f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in metrics.items())


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator where there is one, else the most this process ever had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def export_checkpoint(saved: Path, out: Path, base: str | None = None) -> None:
    """Write what the run would have left, had it ended with this checkpoint: a model that transformers opens, or an
    adapter that PEFT does. Needs the model that the run began with, too, for its tokenizer and what was frozen: `base`
    says where it is, if no longer where it was."""
    manifest = checkpoint.read_manifest(saved)
    try:
        binding = manifest.settings
        quantize, train_layers, seed, kind = (binding[key] for key in ("quantize", "train_layers", "seed", "lora"))
        adapter = Adapter(**kind | {"targets": tuple(kind["targets"])}) if kind else None
        name = base or binding["model"]
        folder, config_json, config, tokenizer = open_model(name)
        on_meta(config, torch.float32, lambda model: adapt(model, quantize, train_layers, adapter))
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{saved}: its manifest does not say what the run was ({error!r:.100})") from None
    if folder and pretrained.fingerprint(folder) != binding["base"]:
        raise UserError(f"{saved}: the run began with other weights than those that are at {folder} now")
    with ranks() as here:
        checkpoint.verify(saved, manifest)
        model = build(config, here, torch.float32, adapt=lambda model: adapt(model, quantize, train_layers, adapter))
        if folder and train_layers != "all":
            pretrained.load(model, folder)
        elif train_layers != "all":
            pretrained.initialize(model, seed)
        checkpoint.load(saved, model, None, manifest.step)
        if adapter:
            lora.save(model, out, adapter, name)
        else:
            pretrained.export(model, out, config_json, tokenizer.files)
        if here.is_first:
            print(f"{out}: {'the adapter' if adapter else 'the model'} after step {manifest.step}")


def _nothing(*_) -> None:
    pass


@record  # gives torchrun the real traceback of the rank that failed first
def main() -> None:
    settings = parse(Settings, description=__doc__).with_recipe(int(os.environ.get("WORLD_SIZE", 1)))
    try:
        task, error = prepare(settings), None
    except UserError as caught:  # told to the others before it is raised: they would wait for this process to join
        task, error = None, caught
    with ranks() as here:
        with together(Path(settings.data)):
            if error:
                raise error
        train(settings, task, here)


if __name__ == "__main__":
    run(main)
