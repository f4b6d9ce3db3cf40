"""What checkpoints cost a run: none, while training waits, and in the background (--async_save), in one go.

    python benchmarks/saving.py --model DIR --data imdb --data_dir DIR --ranks 2

Every measurement is a whole run of `fsdp_train.py` with a checkpoint every third step, or only the last one; the modes
alternate. Shown: the time of a step without what is saved after it, and how much longer the run was for each save.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVERY = 3
WAITING = ["--save_every", str(EVERY)]
MODES = {"none": [], "waiting": WAITING, "background": [*WAITING, "--async_save"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="imdb")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", help="write the figures to this JSON file")
    args = parser.parse_args()
    steps, totals, size = {mode: [] for mode in MODES}, {mode: [] for mode in MODES}, 0
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.rounds):
            for mode, flags in MODES.items():
                out = Path(scratch) / f"{mode}-{turn}"
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.ranks),
                           str(ROOT / "fsdp_train.py"), "--model", args.model, "--data", args.data, "--data_dir",
                           args.data_dir, "--max_steps", str(args.steps), "--batch_size", str(args.batch_size),
                           "--max_length", "256", "--eval_limit", "8", "--keep_checkpoints", "1", "--output", str(out),
                           *flags]
                subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                steps[mode] += [line["seconds"] for line in lines if line.get("step", 0) > 1 and "seconds" in line]
                totals[mode].append(json.loads((out / "summary.json").read_text())["total_seconds"])
                size = sum(path.stat().st_size for path in out.rglob("checkpoints/*/*"))
                subprocess.run(["rm", "-r", str(out)], check=True)
                print(mode, totals[mode][-1], file=sys.stderr, flush=True)
    saves = (args.steps - 1) // EVERY
    figures = {mode: {"step_seconds": statistics.median(steps[mode]), "run_seconds": min(totals[mode]),
                      "seconds_a_save": (min(totals[mode]) - min(totals["none"])) / saves} for mode in MODES}
    print(f"{saves} checkpoints of {size / 1e9:.2f} GB on {args.ranks} ranks\n"
          "| | seconds a step (median) | the run, best of its rounds | more for each save |\n|---|---|---|---|")
    for mode, row in figures.items():
        print(f"| {mode} | {row['step_seconds']:.2f} | {row['run_seconds']:.1f} s | {row['seconds_a_save']:.2f} s |")
    if args.output:
        Path(args.output).write_text(json.dumps({"checkpoint_bytes": size, "saves": saves, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
