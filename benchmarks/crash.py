"""Kill a run of several processes with -9 again and again, resume it, and compare it with the run nobody killed.

    python benchmarks/crash.py --kills 200 --output benchmarks/results/crash.json

A kill takes one rank or all, at a random moment, or at the N-th change of the disk: right before a pwrite, fsync,
rename, replace, mkdir, unlink or rmdir, or with half of a write done. The run is then resumed, in every third case
killed once more and resumed again. After each kill all published checkpoints must be whole, and none that had been
published may be gone; at the end weights, moments, the exported model and every logged loss must equal the reference
bitwise. Faults besides: each of those calls fails once, as on a full disk or one that became read-only, and, where this
machine lets us mount one, a small disk fills up for real. `tests/test_crash.py` runs a short form of all this.
"""

import argparse
import errno
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS = 4
TIMEOUT = 300  # seconds after which a run hangs: no measure of speed, also a busy machine is far from it
CALLS = ("pwrite", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
KINDS = ("write", *CALLS)
SCENARIOS = {
    "full": [],
    "async": ["--async_save"],
    "lora": ["--lora_rank", "4", "--lora_dropout", "0.05", "--quantize", "int8", "--optimizer", "adamw8bit",
             "--gradient_accumulation_steps", "2"],
    "tensor": ["--tensor_parallel", "2"],
    "zero1-tensor": ["--sharding", "zero1", "--tensor_parallel", "2", "--async_save"],
}
RANKS = {scenario: 4 if "--tensor_parallel" in flags else 2 for scenario, flags in SCENARIOS.items()}


@dataclass
class Fault:
    """What is to happen at the `at`-th change of the disk that `rank` makes: a kill of `victims`, or an OSError."""

    rank: int
    at: int
    victims: tuple[int, ...] = ()
    error: int = 0


@dataclass
class Outcome:
    """How a run ended: exit codes by rank, what was printed, what each rank changed on the disk, in order."""

    codes: list[int]
    log: str
    events: list[list[str]] = field(default_factory=list)
    hung: bool = False

    @property
    def struck(self) -> str:
        """The kind of change at which the fault happened."""
        return next((line.split()[1] for events in self.events for line in events if line.startswith("fault ")), "?")


# Inside one rank


class Disk:
    """Counts this process' changes of the disk, writes them down, and lets the fault happen at its number."""

    def __init__(self, rank: int, fault: Fault | None, notes: Path):
        self.fault = fault if fault and fault.rank == rank else None
        self.notes, self.count, self.write, self.lock = notes, 0, os.write, threading.RLock()
        self.file = os.open(notes / f"events-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        from llama.boundary import durable
        from llama.storage import slices
        from llama.training import journal

        for name in CALLS:
            setattr(os, name, self.watched(name, getattr(os, name)))
        for module in (durable, journal, slices):
            module.open = self.open

    def note(self, text: str) -> None:
        self.write(self.file, (text + "\n").encode())

    def watched(self, name: str, call):
        def instead(*args, **kwargs):
            where = args[1] if name in ("rename", "replace") else args[0]
            if name == "pwrite":
                self.happen(name, lambda: call(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:]))
            else:
                self.happen(f"{name} {where}")
            result = call(*args, **kwargs)
            if name in ("rename", "replace"):
                self.note(f"{name}d {where}")
            return result

        return instead

    def open(self, path, mode="r", *args, **kwargs):
        opened = open(path, mode, *args, **kwargs)
        if not set(mode) & set("wxa") or "b" in mode:
            return opened
        write = opened.write

        def torn(text):
            self.happen(f"write {path}", lambda: (write(text[: len(text) // 2]), opened.flush()))
            return write(text)

        opened.write = torn
        return opened

    def happen(self, what: str, half=lambda: None) -> None:
        with self.lock:
            self.count += 1
            self.note(what)
            if not self.fault or self.count != self.fault.at:
                return
            self.note(f"fault {what}")
        if self.fault.error:
            raise OSError(self.fault.error, os.strerror(self.fault.error))
        me = os.getpid()
        pids = {rank: int((self.notes / f"pid-{rank}").read_text()) for rank in self.fault.victims}
        if self.count % 2 and me in pids.values():
            half()
        for pid in sorted(pids.values(), key=lambda pid: pid == me):  # this process last
            os.kill(pid, signal.SIGKILL)


def work(rank: int, ranks: int, port: int, arguments: list[str], fault: Fault | None, notes: Path) -> None:
    """One rank of a run: what torchrun would start, in a process that has imported everything already."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(notes / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (notes / f"pid-{rank}.part").write_text(str(os.getpid()))
    os.rename(notes / f"pid-{rank}.part", notes / f"pid-{rank}")
    while not all((notes / f"pid-{other}").exists() for other in range(ranks)):
        time.sleep(0.005)
    import torch

    import fsdp_train

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2)
    Disk(rank, fault, notes).install()
    sys.argv = ["fsdp_train.py", *arguments]
    fsdp_train.run(fsdp_train.main)
    sys.stdout.flush()
    os._exit(0)


# Around them


class Runner:
    """Starts runs of one scenario in folders of their own."""

    def __init__(self, scratch: Path, scenario: str):
        self.scratch, self.scenario, self.ranks = scratch, scenario, RANKS[scenario]
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "fsdp_train"])
        data = scratch / "data"
        if not data.exists():
            make_data(data)
            make_model(scratch / "model")
        os.environ.update(LLAMA_CACHE=str(scratch / "cache"), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                          PYTHONPATH=str(ROOT))  # or the server of forks would not find fsdp_train to preload it
        self.arguments = ["--data", str(data), "--template", "imdb", "--model", str(scratch / "model"), "--batch_size",
                          "2", "--max_length", "96", "--max_steps", str(STEPS), "--eval_every", "2", "--eval_limit",
                          "4", "--save_every", "1", "--dtype", "float32", "--learning_rate", "1e-3",
                          *SCENARIOS[scenario]]

    def run(self, out: Path, fault: Fault | None = None, kill_after: float = 0.0, victims: tuple = ()) -> Outcome:
        """Start, or resume where there is something to resume; `victims` are killed after so many seconds."""
        notes = Path(tempfile.mkdtemp(dir=self.scratch))
        resume = ["--resume"] if (out / "run.json").is_file() else []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [self.context.Process(target=work, args=(
            rank, self.ranks, port, [*self.arguments, "--output", str(out), *resume], fault, notes))
            for rank in range(self.ranks)]
        for process in processes:
            process.start()
        hung = False
        if victims:
            wait([process.sentinel for process in processes], kill_after)
            for rank in victims:
                processes[rank].kill()
        wait([process.sentinel for process in processes], TIMEOUT)  # now one has ended; the rest is as torchrun does it
        for patience, number in ((3, signal.SIGTERM), (TIMEOUT, signal.SIGUSR2), (1, signal.SIGKILL)):
            give_up = time.monotonic() + patience
            while any(process.is_alive() for process in processes) and time.monotonic() < give_up:
                time.sleep(0.02)
            for process in processes if victims or any(process.exitcode for process in processes) else []:
                if process.is_alive():
                    hung = hung or number == signal.SIGUSR2  # which prints where it is
                    os.kill(process.pid, number)
        for process in processes:
            process.join(TIMEOUT)
            if process.is_alive():
                hung = True
                process.kill()
                process.join()
        texts = {path.name: path.read_text(errors="replace") for path in notes.iterdir()}
        shutil.rmtree(notes)
        return Outcome([process.exitcode for process in processes],
                       "".join(texts.get(f"log-{rank}", "") for rank in range(self.ranks)),
                       [texts.get(f"events-{rank}", "").splitlines() for rank in range(self.ranks)], hung)


def make_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    words = {0: ["dull", "weak", "slow"], 1: ["bright", "strong", "quick"]}
    for split in ("train", "test"):
        rows = [{"text": " ".join(words[i % 2][j % 3] for j in range(1 + (7 * i) % 23)), "label": i % 2}
                for i in range(40)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder: Path) -> None:
    """A Hugging Face folder with random weights, small enough that a run takes a second."""
    from llama.data.tokenizer_files import load_tokenizer
    from llama.model import Llama, ModelConfig
    from llama.storage import pretrained
    from llama.storage.base import TINY_TOKENIZER, config_to_json
    from llama.storage.companions import Companions

    tokenizer = load_tokenizer(TINY_TOKENIZER)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                         max_position_embeddings=128)
    model = Llama(config)
    pretrained.initialize_weights(model, seed=0)
    pretrained.export_model(model, folder, config_to_json(config), Companions(tokenizer.files))


def contents(out: Path) -> dict[str, object]:
    """What must be equal bitwise: every number of the run but those that measure time and memory."""
    import torch
    from safetensors.torch import load_file

    from llama.storage.manifest import published

    files = [*published(out / "checkpoints")[-1].glob("*.safetensors"), *out.glob("model/*.safetensors"),
             *out.glob("adapter/*.safetensors")]
    found = {f"{path.name}:{name}": (tensor.dtype, tensor.numpy().tobytes() if tensor.dtype.itemsize != 2 else
                                     tensor.view(dtype=torch.int16).numpy().tobytes())
             for path in files for name, tensor in load_file(path).items()}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        key = f"metrics:{line['step']}:{'held_out' if 'held_out' in line else 'loss'}"
        if key in found:
            raise ValueError(f"{key} twice in {out}")
        found[key] = [line.get(name) for name in ("loss", "grad_norm", "learning_rate", "tokens", "held_out")]
    summary = json.loads((out / "summary.json").read_text())
    return found | {"after": summary["after"], "before": summary["before"]}


def damage(out: Path, events: list[str]) -> list[str]:
    """What a kill has broken: checkpoints that are not whole, or that had been published by rank 0 and are gone."""
    from llama.boundary.errors import UserError
    from llama.storage import manifest

    there = manifest.published(out / "checkpoints")
    problems = []
    for path in there:
        try:
            manifest.verify(path, manifest.read_manifest(path))
        except UserError as error:
            problems.append(str(error))
    told = [Path(line.split(" ", 1)[1]).name for line in events if line.startswith("renamed ")]
    steps = [name for name in told if manifest.NAME.fullmatch(name)]
    if steps and (not there or there[-1].name < max(steps)):
        problems.append(f"{max(steps)} had been published, {there[-1].name if there else 'nothing'} is there")
    return problems


def unpublished(events: list[list[str]]) -> int:
    """How many checkpoints a killed run had begun and not published."""
    begun = {Path(line.split(" ", 1)[1]).stem for line in events[0]
             if line.startswith("mkdir ") and "/step-" in line and line.endswith(".tmp")}
    done = {Path(line.split(" ", 1)[1]).name for line in events[0] if line.startswith("renamed ")}
    return len(begun - done)


class Harness:
    """Reference run, kills and faults of one scenario; what came of them is counted in `table`."""

    def __init__(self, scratch: Path, scenario: str, seed: int):
        self.runner, self.random = Runner(scratch, scenario), random.Random(f"{scenario} {seed}")
        self.table, self.problems, self.number = Counter({"kills": 0, "published checkpoints damaged or lost": 0,
                                                          "PROBLEMS": 0}), [], 0
        self.scratch = scratch
        began = time.monotonic()
        outcome = self.runner.run(scratch / f"{scenario}-reference")
        self.duration = time.monotonic() - began
        if any(outcome.codes):
            raise RuntimeError(f"the reference run failed: {outcome.log[-3000:]}")
        self.points = outcome.events
        self.reference = contents(scratch / f"{scenario}-reference")

    def moments(self, kinds: Iterator[str]) -> Iterator[Fault]:
        """Every change of the disk, and a quarter as many of the many pwrites: of the kinds in turn, until all are used
        up; of each kind in random order."""
        left = {}
        for kind in kinds:
            if not any(left.values()):
                left = self.changes()
            if left.get(kind):
                yield replace(left[kind].pop())

    def changes(self) -> dict[str, list[Fault]]:
        found = defaultdict(list)
        for rank, events in enumerate(self.points):
            numbered = [line for line in events if not line.startswith(("renamed ", "replaced "))]
            for at, what in enumerate(numbered, 1):
                found[what.split()[0]].append(Fault(rank, at))
        for faults in found.values():
            self.random.shuffle(faults)
        without = sum(len(faults) for kind, faults in found.items() if kind != "pwrite")
        self.table["changes of the disk in a run, without pwrites"] = without
        self.table["pwrites in a run"] = len(found["pwrite"])
        found["pwrite"] = found["pwrite"][: -(-without // 4)]
        return found

    def chain(self, first: Fault | None, again: bool) -> None:
        """One kill (None: at a random moment), perhaps another in the resumed run, then on to the end."""
        self.number += 1
        self.seen = []
        out = self.scratch / f"{self.runner.scenario}-{self.number}"
        every = tuple(range(self.runner.ranks))
        for _ in range(2 if again else 1):
            victims = self.random.choice([*((rank,) for rank in every), every])
            if first:
                first.victims = victims
                outcome = self.runner.run(out, first)
            else:
                outcome = self.runner.run(out, kill_after=self.random.uniform(0, self.duration), victims=victims)
            self.after_kill(out, outcome, victims, first)
            if first:  # anywhere up to there: a resumed run has less to do
                first = Fault(first.rank, self.random.randint(1, first.at))
        outcome = self.runner.run(out)
        self.compare(out, outcome)
        shutil.rmtree(out)

    def after_kill(self, out: Path, outcome: Outcome, victims: tuple, fault: Fault | None) -> None:
        self.seen += outcome.events[0]
        if -signal.SIGKILL not in outcome.codes:
            self.table["ended before its kill"] += 1
            return
        self.table["kills"] += 1
        self.table[f"of {'one rank' if len(victims) == 1 else 'all ranks'}"] += 1
        self.table[f"at a {outcome.struck}" if fault else "at a random moment"] += 1
        self.table["checkpoints unfinished when killed"] += unpublished(outcome.events)
        if outcome.hung:
            self.problem(f"hung after a kill of {victims}", outcome)
        for told in damage(out, self.seen):
            self.table["published checkpoints damaged or lost"] += 1
            self.problem(told, outcome)

    def compare(self, out: Path, outcome: Outcome) -> None:
        if any(outcome.codes):
            self.problem(f"the resumed run failed with {outcome.codes}", outcome)
            return
        self.table["runs brought to their end"] += 1
        found = contents(out)
        differing = sorted(key for key in found.keys() | self.reference.keys()
                           if found.get(key) != self.reference.get(key))
        if differing:
            self.problem(f"differs from the reference: {differing[:5]}", outcome)
        else:
            self.table["bitwise equal to the reference"] += 1

    def refuse(self, fault: Fault, code: int) -> None:
        """One call fails; the run says so in a line and ends with 2 on every rank, or goes on where nothing is lost."""
        self.number += 1
        out = self.scratch / f"{self.runner.scenario}-{self.number}"
        fault.error = code
        outcome = self.runner.run(out, fault)
        self.table["disk errors"] += 1
        if outcome.hung or set(outcome.codes) not in ({0}, {2}) or "Traceback" in outcome.log:
            self.problem(f"{fault}: ended with {outcome.codes}", outcome)
        for told in damage(out, outcome.events[0]):
            self.problem(told, outcome)
        self.table["told in one line" if any(outcome.codes) else f"harmless ({outcome.struck})"] += 1
        self.compare(out, self.runner.run(out))
        shutil.rmtree(out)

    def fill(self) -> None:
        """A disk for three quarters of what the run writes fills up; made larger, it takes the rest."""
        disk = self.scratch / "disk"
        disk.mkdir(exist_ok=True)
        written = (path.stat().st_size for path in (self.scratch / f"{self.runner.scenario}-reference").rglob("*"))
        size = f"size={sum(written) * 3 // 4}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True).returncode:
            self.table["no disk of a fixed size could be mounted"] += 1
            return
        try:
            outcome = self.runner.run(disk / "out")
            self.table["full disks"] += 1
            is_told = "No space left" in outcome.log and "Traceback" not in outcome.log
            if set(outcome.codes) != {2} or not is_told:
                self.problem(f"a full disk: ended with {outcome.codes}", outcome)
            for told in damage(disk / "out", outcome.events[0]):
                self.problem(told, outcome)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            self.compare(disk / "out", self.runner.run(disk / "out"))
        finally:
            subprocess.run(["umount", disk], check=True)

    def problem(self, told: str, outcome: Outcome) -> None:
        self.table["PROBLEMS"] += 1
        self.problems.append(f"{self.runner.scenario}: {told}\n{outcome.log[-2000:]}")


def crash(harness: Harness, kills: int, faults: int, killed: Iterator[str], failing: Iterator[str], show) -> None:
    """At least `kills` kills and `faults` disk errors on runs of one scenario, at these kinds of changes in turn."""
    moments, number = harness.moments(failing), 0
    for _, code in zip(range(faults), cycle([errno.ENOSPC, errno.EROFS]), strict=False):
        harness.refuse(next(moments), code)
    moments = harness.moments(killed)
    while harness.table["kills"] < kills and number < 3 * kills:
        harness.chain(None if number % 4 == 3 else next(moments), again=number % 3 == 2)
        number += 1
        show(harness.table["kills"])
    if faults:
        harness.fill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least so many, over all scenarios")
    parser.add_argument("--faults", type=int, default=60, help="disk errors, over all scenarios")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the table to this JSON file")
    args = parser.parse_args()
    from tqdm import tqdm

    began, tables, problems = time.monotonic(), {}, []
    killed, failing = cycle(KINDS), cycle(KINDS)  # a scenario goes on with the kind at which the one before has ended
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=args.kills, unit=" kills") as progress:
        scenarios = args.scenarios.split(",")
        for scenario in scenarios:
            share = -(-args.kills // len(scenarios))
            before = progress.n

            def show(done: int, before: int = before) -> None:
                progress.update(before + done - progress.n)

            harness = Harness(Path(scratch), scenario, args.seed)
            crash(harness, share, -(-args.faults // len(scenarios)), killed, failing, show)
            tables[scenario] = dict(harness.table)
            problems += harness.problems
    seconds = time.monotonic() - began
    total = {name: sum(table.get(name, 0) for table in tables.values()) for table in tables.values() for name in table}
    for name, count in total.items():
        print(f"| {name} | {count} |")
    print(f"{seconds:.0f} s")
    if args.output:
        Path(args.output).write_text(json.dumps({"seconds": round(seconds), "total": total, **tables}, indent=2) + "\n")
    if problems:
        print("\n\n".join(problems), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
