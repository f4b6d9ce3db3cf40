"""What a run reports: on the screen, in run.json, metrics.jsonl, loss.png and summary.json. Only rank 0 reports."""

import json
import math
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields

import torch
import torch.distributed as dist
from torch import nn

from llama import __version__
from llama.boundary.durable import replace_durably
from llama.boundary.errors import UserError, printable
from llama.boundary.progress import Progress, say
from llama.model import Llama
from llama.model.quantize import bytes_per_weight
from llama.parallel.collectives import fail_together, from_rank_zero
from llama.parallel.mesh import DIMENSIONS
from llama.parallel.processes import Process
from llama.parallel.shards import whole_shape
from llama.storage.base import Base
from llama.storage.checkpoint import set_aside
from llama.storage.companions import NO_COMPANIONS, Companions
from llama.storage.peft import adapter_notes
from llama.training.curve import Picture, name_of
from llama.training.figure import Curve
from llama.training.journal import Journal, read_metrics
from llama.training.model_card import companions_of_run, prompt_of
from llama.training.other_runs import changes, said_of_changes, said_of_replay
from llama.training.plan import BEGUN, Plan
from llama.training.samples import Samples
from llama.training.settings import FilledSettings
from llama.training.tracking import Tracker


class Report:
    """The reporter of a run. Every rank has one and calls it alike; those of ranks other than 0 are silent."""

    def __init__(self, settings: FilledSettings, plan: Plan, process: Process):
        self.settings = settings
        self.plan = plan
        self.process = process
        self.journal: Journal | None = None  # on rank 0, once the run has begun
        self.about: dict = {}  # what run.json holds; on rank 0
        self.progress: Progress | None = None  # from the first step on
        self.picture = Picture(plan.output / "loss.png", self.say)
        self.tracker: Tracker | None = None
        self.answers = 0  # how many answers there are to choose from
        self.samples: Samples | None = None  # of answers to held-out prompts; once the run has begun
        self.began = time.perf_counter()

    def say(self, text: str) -> None:
        if self.process.is_rank_zero:
            say(text)

    @property
    def _lines(self) -> list[dict]:
        """What metrics.jsonl holds, as far as this run goes; nothing on ranks other than 0."""
        return self.journal.lines if self.journal else []

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        """Show how many steps are done. If the run stops before its last step, draw the curve up to there.
        Collective."""
        first, steps, silent = self.plan.first_step, self.plan.steps, not self.process.is_rank_zero
        with Progress("training", "steps", steps, first, silent, is_main=True) as self.progress:
            try:
                yield
            except (UserError, SystemExit):  # on all ranks, which wait: torchrun ends rank 0 once another has ended
                from_rank_zero(lambda: self._show(is_last=True))
                raise

    def _show(self, is_last: bool = False) -> None:
        """Draw the lines of metrics.jsonl up to now; at the end of the run also let the tracker finish."""
        if self.journal:
            lines, on_prompts = self.journal.lines, self.settings.train_on_prompt
            self.picture.draw(Curve(name_of(self.plan.identity), lines, self.answers, on_prompts), is_last)
        if self.tracker and is_last:
            self.tracker.finish()

    def begin(self, model: nn.Module, base: Base, data) -> None:
        """Save and print what this run is, with every default resolved. `data`: the DataSet of data.py. Collective."""
        output = self.plan.output
        with fail_together(output):
            asked, adapter = self.settings.sample_prompts, self.settings.adapter
            self.samples = Samples(data.test, data.template, base, asked, adapter)
            if not self.process.is_rank_zero:
                return
            if self.plan.saved:
                for moved in set_aside(self.plan.saved.parent, self.plan.first_step):
                    self.say(f"{moved}: set aside, it was after step {self.plan.first_step}")
            (output / "summary.json").unlink(missing_ok=True)  # of a finished run that now goes on
            resolved = self._resolved_settings()
            self.answers = len(data.template.answers)
            imbalance = self.plan.schedule.imbalance(self.process.data_ranks)
            self.about = {
                "version": __version__,
                "settings": resolved,
                "identity": self.plan.identity,
                "changed": changes(self.plan),
                "ranks": self.process.world_size,
                "mesh": dict(zip(DIMENSIONS, self.process.mesh.shape, strict=True)),
                "device": self.process.device.type,
                "examples": data.counts() | {"answers": self.answers, "imbalance": round(imbalance, 5)},
                "prompt": prompt_of(data.template, base.tokenizer),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            }
            replace_durably(output / "run.json", json.dumps(self.about, indent=2) + "\n")
            earlier = read_metrics(output / "metrics.jsonl")
            self.journal = Journal(output, self.plan.first_step)
            notes = [*base.notes, *adapter_notes(self.settings.adapter), *data.notes()]
            self._introduce(model, resolved, notes, imbalance)
            if self.settings.track != "none":
                self._track(resolved, earlier)
            if self.process.store:
                self.process.store.set(BEGUN, "")

    def _resolved_settings(self) -> dict:
        """The flags that lead to this run, with nothing left to a default."""
        dtype = str(self.plan.dtype).removeprefix("torch.")
        chosen = {"template": self.plan.identity["template"], "dtype": dtype, "output": str(self.plan.output)}
        return asdict(self.settings) | chosen

    def _track(self, resolved: dict, earlier: list[dict]) -> None:
        first_step = self.plan.first_step
        self.tracker = Tracker(self.settings.track, self.plan.output, resolved, first_step, earlier, self.say)
        for line in self._lines:
            self.tracker.log(line)

    def _introduce(self, model: nn.Module, resolved: dict, notes: list[str], imbalance: float) -> None:
        trained = sum(math.prod(whole_shape(p)) for p in model.parameters() if p.requires_grad)
        packed = bytes_per_weight(model)
        packed_text = f"; frozen linears at {packed:.3f} bytes a weight" if packed else ""
        self.say(f"{trained:,} trainable parameters{packed_text}")
        defaults = {entry.name: entry.default for entry in fields(self.settings)}
        self.say("settings that differ from their defaults (run.json has all):")
        for name, value in resolved.items():
            if value != defaults[name]:
                self.say(f"  {name:28} {value}")
        units = f"packs of --batch_tokens {self.settings.batch_tokens}" if self.settings.batch_tokens else "examples"
        size = self.plan.identity["global_batch"]
        self.say(f"{self.plan.steps} steps of {size} {units}; ranks: {self.process.described}")
        for note in notes:
            self.say(printable(note))
        if self.process.data_ranks > 1:
            self.say(f"in a step, the rank with the most tokens has {imbalance:.2%} more than the mean of all ranks")
        for line in said_of_replay(self.settings.config, self.plan):
            self.say(line)
        for left_over in sorted((self.plan.output / "checkpoints").glob("step-*.tmp")):
            self.say(f"{left_over}: was not finished, and is left out")
        if self.settings.resume or self.plan.saved:
            lacking = "" if self.plan.saved else " (it has no checkpoint)"
            self.say(f"resuming after step {self.plan.first_step} of {self.plan.steps} in {self.plan.output}{lacking}")
        for line in said_of_changes(self.plan, self.settings, self._lines):
            self.say(line)

    def write(self, **line) -> None:
        """Add a line to metrics.jsonl. If the disk refuses it, the next `check` raises."""
        if self.journal:
            self.journal.write(**line)
        if self.tracker:
            self.tracker.log(line)

    @property
    def failed(self) -> bool:
        return bool(self.journal and self.journal.error)

    def check(self) -> None:
        """Raises UserError, on every rank, when a line could not be written. Collective."""
        with fail_together(self.plan.output):
            if self.journal and self.journal.error:
                raise self.journal.error

    def step(self, done: int, loss: float, norm: float, rate: float, counts: dict) -> None:
        """A line for an optimizer step; `counts` are its examples, tokens, labels and seconds."""
        seconds = counts["seconds"]
        speed, memory = counts["tokens"] / seconds, peak_memory(self.process.device)
        assert self.progress is not None  # steps are taken inside `progress_bar`
        self.progress.update(facts=f"loss {loss:.4g}, rate {rate:.3g}, {speed:,.0f} tokens/s, {memory / 1e9:.3g} GB")
        if done % self.settings.log_every and done != self.plan.steps:
            return
        self.write(
            step=done,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=counts["tokens"],
            labels=counts["labels"],
            examples_per_second=counts["examples"] / seconds,
            tokens_per_second=speed,
            peak_memory_bytes=memory,
            seconds=seconds,
        )

    def held_out(self, step: int, metrics: dict) -> dict:
        """A line for an evaluation on held-out data. Returns the metrics."""
        if metrics:
            if self.progress:
                self.progress.tell()
            found = self.samples.found if self.samples and step == 0 else []
            self.write(step=step, held_out=metrics, **({"samples": found} if found else {}))
            if step != self.plan.steps:  # `finish` draws the last one
                self._show()
        if metrics or step == 0:
            when = f"step {step}" if step else "before training"
            self.say(f"{when}: {in_words(metrics)}")
        return metrics

    def sample(self, model: Llama, is_over: bool = False) -> None:
        """Show what the model answers to some held-out prompts, before training or after it. Collective."""
        assert self.samples
        if is_over or not self.plan.first_step:
            self.samples.answer(model, self.process, "after" if is_over else "before")
            for line in self.samples.lines():
                self.say(line)
        else:
            self.samples.recall(self._before.get("samples", []))

    def stopped(self, signal_name: str, done: int) -> None:
        self.say(
            f"{signal_name}: saved and stopped after step {done} of {self.plan.steps}; continue with --resume --output "
            f"{self.plan.output}"
        )

    def held_out_before(self) -> dict:
        """What an earlier part of this run measured before its first step; {} where it did not."""
        return self._before.get("held_out", {})

    @property
    def _before(self) -> dict:
        """The line of metrics.jsonl that an earlier part of this run wrote before its first step."""
        return next((line for line in self._lines if line["step"] == 0 and "held_out" in line), {})

    def companions(self, base: Base, before: dict, after: dict) -> Companions:
        """What the export writes beside the weights; on ranks other than 0, which do not write it, nothing. Raises
        UserError, on every rank, when a line of metrics.jsonl could not be written. Collective."""
        self.check()
        with fail_together(self.plan.output):
            if not self.journal:
                return NO_COMPANIONS
            held_out = {"before training": before, f"after step {self.plan.steps}": after}
            return companions_of_run(self.about, self.plan.identity, base, held_out)

    def finish(self, result: str, totals: dict, before: dict, after: dict) -> None:
        """Draw the loss curve; write and print the summary. `result` is the folder that was exported; `before` and
        `after` are metrics on held-out data. Collective."""
        peak = torch.tensor(peak_memory(self.process.device), dtype=torch.int64, device=self.process.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        output = self.plan.output
        with fail_together(output):
            if not self.journal:
                return
            self.journal.close()
            if not self.journal.path.exists():
                raise UserError(f"{self.journal.path}: deleted during the run; {result}/ was written, nothing else")
            identity, seconds = self.plan.identity, totals["seconds"]  # of the steps, without evaluations and saves
            speed = {f"{name}_per_second": totals[name] / seconds for name in ("examples", "tokens")}
            summary = {
                "data": identity["data"],
                "bundled_sample": identity["bundled_sample"],
                "model": identity["model"],
                "ranks": self.process.world_size,
                "steps": self.plan.steps,
                **{name: totals[name] for name in ("examples", "tokens", "labels")},
                "train_seconds": seconds,
                "total_seconds": time.perf_counter() - self.began,
                **speed,
                "peak_memory_bytes": int(peak),
                "before": before,
                "after": after,
                "samples": self.samples.found if self.samples else [],
            }
            self._show(is_last=True)
            replace_durably(output / "summary.json", json.dumps(summary, indent=2) + "\n")  # last: the run is over
        self.say(f"before: {in_words(before)}\nafter:  {in_words(after)}")
        self.say(
            f"{speed['examples_per_second']:.1f} examples and {speed['tokens_per_second']:.0f} tokens a second; "
            f"{result}/, loss.png, metrics.jsonl and summary.json are in {output}"
        )


def in_words(metrics: dict) -> str:
    if not metrics:
        return "no held-out data"
    return ", ".join(f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in metrics.items())


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator where there is one, else the most memory that this process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
