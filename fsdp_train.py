"""Fine-tune a Llama: read, plan, build, train, export.

    torchrun --nproc_per_node 4 fsdp_train.py --data imdb                       a tiny Llama, from scratch
    torchrun --nproc_per_node 8 fsdp_train.py --model DIR --data imdb           a Hugging Face folder, on 8 GPUs
    python fsdp_train.py --model DIR --data reviews.jsonl                       one process, GPU or not
    torchrun --nproc_per_node 8 fsdp_train.py --model DIR --sharding zero1 --tensor_parallel 2 ...
    torchrun --nnodes 2 --node_rank R --master_addr HOST --nproc_per_node 8 fsdp_train.py ...

The same code runs each of them: CUDA and NCCL where there are GPUs, CPU and gloo where there are none.
"""

from llama.boundary.command_line import parse, run
from llama.training.settings import FilledSettings, TrainingSettings, is_due

if __name__ == "__main__":  # --help and mistyped flags need not wait until torch is imported
    run(lambda: parse(TrainingSettings, description=__doc__))

import math
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from data import DataSet, load_data, run_name
from llama.boundary.errors import UserError
from llama.boundary.launch import launch
from llama.data.batches import pack
from llama.data.examples import EncodedData
from llama.evaluation.score import answer_ids, evaluate
from llama.model import Llama
from llama.parallel import gradients, tensor
from llama.parallel.collectives import fail_together
from llama.parallel.distribute import distribute, on_meta
from llama.parallel.mesh import mesh_shape
from llama.parallel.processes import Process, join
from llama.parallel.zero1 import ZeRO1
from llama.storage.base import Base
from llama.storage.checkpoint import Saver
from llama.storage.peft import save_adapter
from llama.storage.pretrained import export_model
from llama.training.optim import build_adamw, clip_gradients, gradient_norm, learning_rate
from llama.training.plan import COUNTS, Plan, make_plan
from llama.training.planner import refuse_what_cannot_fit
from llama.training.report import Report
from llama.training.state import Optimizer, restore, save_state
from llama.training.stopping import STOPPED, StopRequests
from lora import Changes


@dataclass(frozen=True)
class Task:
    """What each rank reads on its own, before it communicates: config and tokenizer, changes to the model, data."""

    base: Base
    changes: Changes  # what is done to the model before it is sharded
    data: DataSet
    examples: EncodedData  # data.train, with labels on the prompts, too, if --train_on_prompt
    words: list[int] | None  # token ids: the first of each answer word; None where answers are free text


@dataclass(frozen=True)
class Run:
    """What every step needs."""

    settings: FilledSettings
    task: Task
    process: Process
    plan: Plan  # what the ranks have agreed on: the batches, the run's folder, the checkpoint to continue from
    model: Llama
    optimizer: Optimizer
    saver: Saver  # writes checkpoints
    report: Report  # writes metrics.jsonl and the screen; on other ranks than 0 it does nothing


def main() -> None:
    asked = parse(TrainingSettings, description=__doc__)
    launched = launch()
    settings = asked.with_recipe(data_ranks=max(1, launched.world_size // asked.tensor_parallel))
    try:
        mesh_shape(asked.sharding, asked.tensor_parallel, launched.world_size, launched.local_world_size)
        task: Task | UserError = read(settings)
    except UserError as error:  # raised after join(): if this rank left now, the others would wait in join() for it
        task = error
    with join(settings.sharding, settings.tensor_parallel) as process, ExitStack() as locks:
        with fail_together(settings.data):
            if isinstance(task, UserError):
                raise task
            refuse_what_cannot_fit(settings, task.base.config, task.changes.apply, process)
        about_data = task.data.identity() | {"fingerprint": task.examples.fingerprint}
        identity = settings.identity(task.base.fingerprint, task.changes.adapter, about_data)
        folder = f"runs/{run_name(settings.data)}-{Path(settings.model).name}"
        plan = make_plan(settings, task.examples, identity, process, folder, locks)
        train(settings, task, process, plan)


def read(settings: FilledSettings) -> Task:
    """Read, check and encode everything. No collective here: encoding may take longer than a collective's timeout."""
    base = Base.open(settings.model, settings.max_length, settings.control_tokens)
    # The tiny preset (base.folder is None) with --data imdb uses the bundled sample; nothing is downloaded.
    data = load_data(settings, base.tokenizer, use_hub=base.folder is not None or settings.data != "imdb")
    if data.train is None:
        raise UserError(f"--data {settings.data}: has no train file")
    examples = data.train.labelling_prompts() if settings.train_on_prompt else data.train
    words = answer_ids(data.template, base.tokenizer) if data.template.answers else None
    changes = Changes(settings.quantize, settings.asked_adapter(), settings.train_layers, settings.adapter)
    shapes = on_meta(base.config)
    changes.apply(shapes)  # only to raise UserError now, e.g. for a --lora_targets that matches nothing
    tensor.unit_counts(shapes, settings.tensor_parallel)  # the same, for a model that so many ranks cannot share
    return Task(base, changes, data, examples, words)


def train(settings: FilledSettings, task: Task, process: Process, plan: Plan) -> None:
    """The whole run: build the model, train, evaluate and ask it before and after, export the model or adapter."""
    adapter, report = task.changes.adapter, Report(settings, plan, process)
    result = plan.output / ("adapter" if adapter else "model")
    if plan.is_finished(result):
        report.say(f"{plan.output} is finished already, after step {plan.steps} of {plan.steps}")
        return
    model, optimizer = build(settings, task, process, plan)
    report.begin(model, task.base, task.data)
    saver = Saver(plan.output / "checkpoints", settings.keep_checkpoints, settings.async_save)
    current = Run(settings, task, process, plan, model, optimizer, saver, report)
    report.sample(model)
    before = report.held_out(0, evaluate_held_out(current)) if plan.first_step == 0 else report.held_out_before()
    try:
        after, totals = run_steps(current)
    except UserError:  # all ranks raise it; before they end, they finish the checkpoint being written in the background
        with suppress(UserError):  # a save that failed has already warned
            saver.wait()
        raise
    saver.wait()
    report.sample(model, is_over=True)
    beside = report.companions(task.base, before, after)  # the tokenizer's files, a model card
    if adapter:
        save_adapter(model, result, adapter, task.base.name, beside, replace=True)
    else:
        export_model(model, result, task.base.config_json, beside, task.base.dtype, replace=True)
        report.say(task.base.about_export(model))
    report.finish(result.name, totals, before, after)


def build(settings: FilledSettings, task: Task, process: Process, plan: Plan) -> tuple[Llama, Optimizer]:
    """The sharded model with its weights, and its optimizer. The order of these calls cannot be changed."""
    model = on_meta(task.base.config)  # shapes without memory
    task.changes.apply(model)  # quantised linears, adapters, frozen parts
    recompute, offload = settings.activation_checkpointing, settings.cpu_offload
    distribute(model, process, plan.dtype, settings.sharding, recompute, settings.compile, offload)
    adamw = build_adamw(model, settings.learning_rate, settings.weight_decay, settings.beta2, settings.optimizer)
    task.base.load(model, settings.seed)  # each rank reads its own slices
    task.changes.load(model, settings.seed)
    optimizer = ZeRO1(adamw, model, process) if settings.sharding == "zero1" else adamw
    if plan.saved and plan.manifest:
        restore(plan.saved, plan.manifest, model, optimizer)
    return model, optimizer


def run_steps(current: Run) -> tuple[dict, Counter]:
    """Take the remaining optimizer steps. Returns the metrics after the last step, and the totals of the whole run.

    Raises UserError for a loss or weight that is not finite. When a signal asks for a stop, saves a checkpoint and
    raises SystemExit with status STOPPED.
    """
    settings, plan, report, optimizer = current.settings, current.plan, current.report, current.optimizer
    totals = Counter(plan.manifest.totals if plan.manifest else dict.fromkeys(COUNTS, 0))
    metrics = evaluate_held_out(current) if plan.first_step == plan.steps else {}  # resumed after the last step
    current.model.train()
    with report.progress_bar(), StopRequests(settings.save_minutes) as stop_requests:
        for step in range(plan.first_step, plan.steps):
            began = time.perf_counter()
            done = step + 1
            is_last = done == plan.steps
            loss, norm, counts = train_step(current, step)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                problem = f"loss {loss}, gradient norm {norm}: not finite, so the weights were left as they were"
                raise UserError(f"step {done}: {problem}; whole checkpoints: {current.saver.newest}")
            rate = learning_rate(step, plan.steps, settings.learning_rate, settings.lr_schedule, settings.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            counts["seconds"] = time.perf_counter() - began
            totals.update(counts)
            report.step(done, loss, norm, rate, counts)

            stop, failed, save = stop_requests.agreed(report.failed, is_due(done, settings.save_every))
            if failed:
                report.check()  # raises on all ranks: rank 0 could not write metrics.jsonl
            metrics = {}  # of this step only: the checkpoint records them as its own
            if is_last or (not stop and is_due(done, settings.eval_every)):
                metrics = report.held_out(done, evaluate_held_out(current))
            if is_last or save:
                report.check()  # before saving: a run resumed from this checkpoint will not write earlier lines again
                save_state(current.saver, done, current.model, optimizer, plan.identity, totals, metrics)
            if stop and not is_last:
                current.saver.wait()
                report.stopped(stop, done)
                raise SystemExit(STOPPED)
    return metrics, totals


def train_step(current: Run, step: int) -> tuple[float, float, dict]:
    """Compute and clip the gradients of one optimizer step. Returns its loss, the norm before clipping, and counts.

        loss = sum of the losses of all labels / number of labels, both over all micro-batches of all ranks

    Dividing per micro-batch and averaging the means would give a label more weight in a micro-batch with few
    labels, so the loss would depend on how examples are split over ranks.
    """
    settings, process, model, examples = current.settings, current.process, current.model, current.task.examples
    # Seeding dropout anew in each step means that a checkpoint need not hold the state of the random generators.
    dropout_seed = np.random.SeedSequence((settings.seed, step, process.data_rank)).generate_state(1)[0]
    torch.manual_seed(int(dropout_seed))
    micro_batches = current.plan.schedule.micro_batches(step)
    indices = [i for micro_batch in micro_batches for i in micro_batch]
    labels = int(examples.label_counts[indices].sum())
    if labels == 0:
        raise UserError(f"--data {settings.data}: examples {indices[:5]} ... of one step hold no label")
    mine = micro_batches[process.data_rank :: process.data_ranks]
    total = torch.zeros((), dtype=torch.float64, device=process.device)
    for i, micro_batch in enumerate(mine):
        batch = pack(examples, micro_batch, process.device)
        gradients.set_gradient_sync(model, i == len(mine) - 1, settings.defer_gradient_sync)
        loss = model(batch.tokens, batch.documents, batch.rows, batch.targets)
        # FSDP averages gradients over data ranks, but the loss is a sum over them: hence the factor data_ranks.
        (loss * (process.data_ranks / labels)).backward()
        total += loss.detach()
    process.sum_over_data_ranks(total)
    gradients.sum_over_tensor_ranks(model, process)
    norm = gradient_norm(model)
    if norm.isfinite():  # otherwise run_steps raises UserError
        clip_gradients(model, norm, settings.max_grad_norm)
    counts = {"examples": len(indices), "tokens": int(examples.lengths[indices].sum()), "labels": labels}
    return float(total) / labels, float(norm), counts


def evaluate_held_out(current: Run) -> dict:
    """Metrics on held-out answers (with --train_on_prompt, too, prompts do not count); {} where none are held out."""
    settings, task, model = current.settings, current.task, current.model
    if task.data.test is None:
        return {}
    metrics, _ = evaluate(model, task.data.test, current.process, settings.batch_size, settings.eval_limit, task.words)
    model.train()
    return metrics


if __name__ == "__main__":
    record(run)(main, keep_going=True)  # record gives torchrun the traceback of the rank that failed first
