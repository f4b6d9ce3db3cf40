"""What it takes to encode data: memory for files of 50 and 500 MB, and speed beside the tokenizers library.

    python benchmarks/encoding.py --rows ../shared/assets/imdb/train.parquet --model DIR

Memory: each file is encoded in a process of its own, whose greatest resident size is given above that of the same
process before it opens the file. The Parquet files have one row group, as large as the file. Speed: the prompts of
5,000 rows, rendered beforehand, by `encode_rows` (ids and labels) and by the library's own `encode_batch` of the same
whole prompts as strings; alternated, medians; both use all cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow
import pyarrow.parquet

from llama.data.examples import encode_file, encode_rows
from llama.data.rows import read
from llama.data.templates import TEMPLATES
from llama.data.tokenizer_files import load_tokenizer


def write(texts: list[dict], path: Path, size: int) -> None:
    """A file of `size` bytes of JSON lines, or the same rows as Parquet with a single row group."""
    rows, written = [], 0
    while written < size:
        row = texts[len(rows) % len(texts)]
        rows.append(row)
        written += len(json.dumps(row)) + 1
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=len(rows))
    else:
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def peak() -> int:
    """This process's own greatest resident size; getrusage would count its parent's before the exec too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory_of(path: Path, model: str) -> dict:
    """Encode in a fresh process, with a cache of its own."""
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        out = subprocess.run([sys.executable, __file__, "--one", str(path), "--model", model], check=True, text=True,
                             stdout=subprocess.PIPE, env=os.environ | {"LLAMA_CACHE": cache}).stdout
    return json.loads(out)


def one(path: Path, model: str) -> None:
    import pyarrow.parquet  # noqa: F401  (what is in memory before the file is opened)

    tokenizer = load_tokenizer(model)
    small = path.with_name("warm.jsonl")
    small.write_text("".join(json.dumps({"text": f"warm {i} " * 200, "label": 1}) + "\n" for i in range(4000)))
    encode_file(small, TEMPLATES["imdb"], tokenizer, 512)
    before, started = peak(), time.perf_counter()
    data = encode_file(path, TEMPLATES["imdb"], tokenizer, 512)
    print(json.dumps({"file_bytes": path.stat().st_size, "rows": len(data), "before_bytes": before,
                      "peak_bytes": peak(), "seconds": round(time.perf_counter() - started, 1)}))


def speed(texts: list[dict], model: str, rounds: int) -> dict:
    from tokenizers import Tokenizer as Library

    tokenizer = load_tokenizer(model)
    library = Library.from_file(str(Path(model) / "tokenizer.json"))
    rows = [TEMPLATES["imdb"].render(row, "")[0] for row in texts[:5000]]
    prompts = ["".join(segment.text for segment in row) for row in rows]
    times = {"encode_rows": [], "tokenizers": []}
    for _ in range(rounds):
        started = time.perf_counter()
        encode_rows(rows, tokenizer, 512, "right")
        times["encode_rows"].append(time.perf_counter() - started)
        started = time.perf_counter()
        [encoding.ids for encoding in library.encode_batch(prompts)]
        times["tokenizers"].append(time.perf_counter() - started)
    medians = {name: round(len(rows) / statistics.median(values)) for name, values in times.items()}
    return {"rows_per_second": medians, "ratio": round(medians["encode_rows"] / medians["tokenizers"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="a file of IMDB reviews")
    parser.add_argument("--model", required=True, help="a folder with tokenizer.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--output")
    arguments = parser.parse_args()
    if arguments.one:
        return one(Path(arguments.one), arguments.model)
    texts = [row for _, row in read(Path(arguments.rows))]
    results = {"speed": speed(texts, arguments.model, arguments.rounds), "memory": []}
    print(results["speed"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("jsonl", "parquet"):
            for megabytes in arguments.megabytes:
                path = Path(folder) / f"{megabytes}.{kind}"
                write(texts, path, megabytes * 10**6)
                result = {"kind": kind, "megabytes": megabytes} | memory_of(path, arguments.model)
                path.unlink()
                results["memory"].append(result)
                print(f"{kind} of {megabytes} MB: peak {result['peak_bytes'] / 1e6:.0f} MB, "
                      f"{(result['peak_bytes'] - result['before_bytes']) / 1e6:+.0f} MB, {result['seconds']} s",
                      flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
