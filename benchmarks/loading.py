"""Host memory and time it takes to load and to export a model of 500 MB, on every rank.

    python benchmarks/loading.py --ranks 4
    python benchmarks/loading.py --ranks 4 --sharding zero1 --tensor_parallel 2

Makes a random model in a temporary folder first, or measures the Hugging Face folder given as --model. Memory
is what a rank needs above what it had before: RssAnon is its own, RSS adds the pages of the mapped files that it has
touched, which all ranks share and the system may drop at any time. Files come from the page cache: they have just been
written.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from llama.boundary.untrusted import read_json
from llama.model import Llama, ModelConfig
from llama.parallel.distribute import distribute, on_meta
from llama.parallel.processes import Process, join
from llama.parallel.shards import local_slice
from llama.storage.base import config_from_json, config_to_json
from llama.storage.pretrained import export_model, initialize_weights, load_weights

CONFIG = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=15,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=64,
)


class PeakMemory:
    """`with PeakMemory() as peak:` then peak.anonymous and peak.total, in bytes above what was in use before."""

    def __enter__(self) -> "PeakMemory":
        self.anonymous = self.total = 0
        self.before = _resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self.seconds = time.perf_counter() - self.start
        self.done.set()
        self.thread.join()

    def _sample(self) -> None:
        while True:
            anonymous, total = _resident()
            self.anonymous = max(self.anonymous, anonymous - self.before[0])
            self.total = max(self.total, total - self.before[1])
            if self.done.wait(0.002):
                return


def _resident() -> tuple[int, int]:
    """This process's (anonymous, total) resident bytes."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return tuple(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "VmRSS"))


def measure(folder: Path, target: Path, sharding: str, tensor_parallel: int) -> None:
    """Load and export on this rank; rank 0 prints everyone's figures."""
    torch.set_num_threads(1)
    with join(sharding, tensor_parallel) as process:
        load_and_export(folder, target, sharding, process)


def load_and_export(folder: Path, target: Path, sharding: str, process: Process) -> None:
    config_json = read_json(folder, "config.json")
    model = on_meta(config_from_json(config_json))
    dist.barrier()
    with PeakMemory() as loading:
        distribute(model, process, torch.float32, sharding)
        load_weights(model, folder)
    dist.barrier()
    with PeakMemory() as exporting:
        export_model(model, target, config_json)
    shard = sum(local_slice(p)[0].numel() * p.itemsize for p in model.parameters())
    row = [shard, loading.anonymous, loading.total, loading.seconds]
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, [*row, exporting.anonymous, exporting.total, exporting.seconds])
    if dist.get_rank() == 0:
        print(f"{'load':>34}{'export':>33}")
        print("rank  shard MB" + "    RssAnon MB    RSS MB  seconds" * 2)
        for rank, (shard, *figures) in enumerate(rows):
            cells = [f"{a / 1e6:+14.0f}{t / 1e6:+10.0f}{s:9.2f}" for a, t, s in (figures[:3], figures[3:])]
            print(f"{rank:4}{shard / 1e6:10.0f}{''.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: a random model of 517 MB)")
    parser.add_argument("--sharding", default="full", choices=("full", "zero1"))
    parser.add_argument("--tensor_parallel", type=int, default=1)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)  # set for the ranks that this starts
    args = parser.parse_args()
    if args.target:
        return measure(args.model, args.target, args.sharding, args.tensor_parallel)
    scratch = Path(tempfile.mkdtemp(prefix="loading-"))
    try:
        folder = args.model
        if folder is None:
            folder, model = scratch / "model", Llama(CONFIG)
            initialize_weights(model, seed=0)
            export_model(model, folder, config_to_json(CONFIG))
            del model
        size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
        print(f"{size / 1e6:.0f} MB of weights in bfloat16 <-> fp32 shards on {args.ranks} ranks")
        print(f"--sharding {args.sharding} --tensor_parallel {args.tensor_parallel}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", args.ranks]
        command = [*torchrun, __file__, "--model", folder, "--target", scratch / "export"]
        command += ["--sharding", args.sharding, "--tensor_parallel", args.tensor_parallel]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        sys.exit(subprocess.run([str(part) for part in command], env=environment).returncode)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
