"""Train five steps under every setting of parallelism, and print how far each is from one process.

    python benchmarks/parity.py --output benchmarks/results/parity_cpu.json
    python benchmarks/parity.py --settings full-2,zero1-2-tensor-2 --trained all-tied,lora-int8-untied

One process and every setting get the same global batches: examples of very unequal length, of which some ranks get none
that has a label, at times none at all. Every step is clipped. The table shows the largest absolute difference of the
losses, of the gradient norms, and of the updated weights, read from a checkpoint, over everything that is trained: all
weights, some, LoRA, DoRA, over int8 and NF4, with tied and untied ends. Then a checkpoint of each setting in `MOVED` is
continued under each: from step 2 to 5, and compared with the run that was not interrupted; where both are the same
setting, the two must be equal bit for bit. `tests/test_parity.py` runs a short form; settings are in
`tests/five_steps.py`.

Ends with status 1 if a difference is larger than 1e-5 in float32, or 1e-10 in float64.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from five_steps import MOVED, MOVED_TRAINED, SETTINGS, TOLERANCES, TRAINED, Runs, is_near
from ranks import RankPools

from llama.boundary.command_line import run
from llama.boundary.errors import UserError

KINDS = ("loss", "norm", "weights")


def attempted(compare, *names) -> dict:
    """What `compare` finds; or why it failed: the last line of the first rank that did."""
    try:
        return compare(*names)
    except AssertionError as failed:
        first = str(failed).split("\n\n")[0].strip()
        return {"failed": first.splitlines()[-1][:300]}


def largest(cases: dict[str, dict]) -> dict:
    """Of each kind of difference the largest over all that is trained, and where it is."""
    found = {}
    for kind in (*KINDS, "moments") if cases else ():
        where = max(cases, key=lambda name: cases[name].get(kind, math.inf))
        found[kind] = {"largest": cases[where].get(kind), "in": where}
    return found


def cell(cases: dict[str, dict]) -> str:
    if any("failed" in found for found in cases.values()):
        return "failed"
    found = largest(cases)
    return ", ".join(f"{found[kind]['largest']:.0e}" for kind in KINDS) if found else "-"


def caption() -> str:
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.machine())  # fmt: skip
    return f"{os.cpu_count()} cores of {processor}, gloo, torch {torch.__version__}, one thread for each rank"


def chosen_names(asked: str, known, flag: str) -> list[str]:
    names = asked.split(",") if asked else list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: unknown, expected some of {', '.join(known)}")
    return names


def print_parity(runs: Runs, settings: list[str], trained: list[str]) -> tuple[dict, list[str]]:
    """The first table, row by row as it is found. Returns it, and what is wrong."""
    table, problems = {}, []
    print("| setting | ranks | float32: loss, norm, weights | float64: loss, norm, weights |\n|---|---|---|---|")
    for setting in settings:
        chosen, row = SETTINGS[setting], {}
        for dtype in TOLERANCES:
            cases = {}
            for name in [name for name in trained if name in chosen.trained]:
                if dtype == torch.float32 or chosen.has_float64(name):
                    cases[name] = attempted(runs.parity, setting, name, dtype)
                    if not is_near(cases[name], setting, dtype):
                        problems.append(f"{setting}, {name}, {dtype}: {cases[name]}")
            row[str(dtype).removeprefix("torch.")] = cases
        table[setting] = {"ranks": chosen.ranks} | {name: largest(cases) for name, cases in row.items()}
        print(f"| {setting} | {chosen.ranks} | {cell(row['float32'])} | {cell(row['float64'])} |", flush=True)
    return table, problems


def print_moved(runs: Runs, settings: list[str], trained: list[str]) -> tuple[dict, list[str]]:
    """The second table: in each row one setting has saved, in each column one continues."""
    table, problems = {}, []
    print(f"| saved under, continued under: | {' | '.join(settings)} |\n|---|{'---|' * len(settings)}")
    for saver in settings:
        cells = []
        for reader in settings:
            cases = {name: attempted(runs.moved, saver, reader, name) for name in trained}
            is_equal = all(found.get("bitwise") for found in cases.values())
            table[f"{saver} -> {reader}"] = {"equal": is_equal} | largest(cases)
            for name, found in cases.items():
                must_be_equal = saver == reader
                if not is_near(found, saver, torch.float32) or (must_be_equal and not found["bitwise"]):
                    problems.append(f"{saver} -> {reader}, {name}: {found}")
            cells.append("equal" if is_equal else cell(cases))
        print(f"| {saver} | {' | '.join(cells)} |", flush=True)
    return table, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="", help="some names, with commas; all without")
    parser.add_argument("--trained", default="", help="what is trained: some names, with commas; all without")
    parser.add_argument("--output", help="write both tables to this JSON file")
    args = parser.parse_args()
    settings = chosen_names(args.settings, SETTINGS, "--settings")
    trained = chosen_names(args.trained, TRAINED, "--trained")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # or the server of forks would not find what to preload
    # Ranks of a pool end at once, and do not take back the semaphores of libraries.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        ranks = RankPools()
        runs = Runs(Path(scratch), ranks)
        print(f"Largest difference from one process over five steps; {caption()}\n")
        parity, problems = print_parity(runs, settings, trained)
        print("\nLargest difference from the run that was not interrupted, float32: loss, norm, weights\n")
        of_moved = [name for name in MOVED if name in settings]
        moved, more = print_moved(runs, of_moved, [name for name in MOVED_TRAINED if name in trained])
        ranks.close()
    problems += more
    if args.output:
        report = {"machine": caption(), "seconds": round(time.monotonic() - began), "parity": parity, "moved": moved}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    if problems:
        raise SystemExit("\n".join(["", "too far:", *problems]))


if __name__ == "__main__":
    run(main)
