"""The cache of encoded examples: whole or not there, by whatever processes it is filled, and damage is noticed."""

import builtins
import fcntl
import hashlib
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from samples import (
    BUNDLED,
    IMDB,
    ROOT,
    WORDS,
    reviews,
    same,
    spoiled,
    write_lines,
    write_parquet,
    write_rows,
)

import llama.boundary.durable
import llama.data.examples
from llama.boundary.errors import UserError
from llama.data.cache import cache_folder
from llama.data.chat import Chat
from llama.data.examples import EXAMPLES, TOKENS, BadRows, EncodedData, encode_file
from llama.data.templates import Template
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

# The cache


@pytest.fixture
def encoded_batches(monkeypatch) -> list[int]:
    """The number of rows of each batch that was really encoded."""
    batches, real = [], llama.data.examples.encode_rows

    def counting(rows, *rest):
        batches.append(len(rows))
        return real(rows, *rest)

    monkeypatch.setattr(llama.data.examples, "encode_rows", counting)
    return batches


def tokenizer_in(folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    file = folder / "tokenizer.model"
    if not file.exists():
        file.write_bytes(BUNDLED.read_bytes())
    return load_tokenizer(folder)


def test_a_second_call_reads_what_the_first_one_encoded(tmp_path, own_cache, encoded_batches):
    """R21: also for another file of the same content; what it reads is mapped, not loaded."""
    rows, tokenizer = reviews(2500), tokenizer_in(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "train.jsonl", rows)
    first = encode_file(path, IMDB, tokenizer, 128)
    assert encoded_batches == [2000, 500]
    copy = write_rows(tmp_path / "copy.jsonl", rows)
    for again in (encode_file(p, IMDB, tokenizer, 128) for p in (path, copy)):
        assert isinstance(again.tokens, np.memmap) and isinstance(again.is_answer, np.memmap)
        assert same(again, first) and again.bad_row_count == first.bad_row_count
        assert again.first_bad_rows == first.first_bad_rows
    assert encoded_batches == [2000, 500]
    assert sorted(p.suffix for p in own_cache.iterdir()) == ["", ".lock"]


def test_bad_rows_are_told_from_the_cache_by_the_name_of_the_file_at_hand(tmp_path, bundled, encoded_batches):
    """R15, R21: a refused file, its copy, and then leaving its bad rows out, cost one encoding."""
    lines, bad = spoiled(30)
    for name in ("train.jsonl", "copy.jsonl", "train.jsonl"):
        path = write_lines(tmp_path / name, lines)
        with pytest.raises(BadRows) as error:
            encode_file(path, IMDB, bundled, 512)
        assert [line.split(": ")[0] for line in error.value.lines[:-1]] == [f"{path}:{number}" for number in bad[:5]]
        assert encode_file(path, IMDB, bundled, 512, skip_bad_rows=True).first_bad_rows == error.value.lines[:-1]
    assert encoded_batches == [30 - len(bad)]


def test_a_change_of_anything_that_matters_makes_a_new_cache(tmp_path, own_cache, encoded_batches):
    """R21: a byte of the data or of the tokenizer's files, the length, the side, the template, the category."""
    path = write_rows(tmp_path / "train.jsonl", [row | {"category": "a"} for row in reviews(10)])
    folder = tmp_path / "tokenizer"
    encode_file(path, IMDB, tokenizer_in(folder), 128)

    def change_data() -> None:
        path.write_bytes(path.read_bytes().replace(b'"label": 1', b'"label": 0', 1))

    def change_tokenizer() -> None:
        file = folder / "tokenizer.model"
        file.write_bytes(file.read_bytes() + b"\x1a\x00")  # an empty message: the same tokenizer, other bytes

    def add_tokenizer_file() -> None:
        (folder / "tokenizer_config.json").write_text("{}")

    arguments = {"template": IMDB, "max_length": 128, "truncate_side": "right"}
    changes = [change_data, change_tokenizer, add_tokenizer_file, *(
        lambda change=change: arguments.update(change) for change in (
            {"max_length": 129}, {"truncate_side": "left"}, {"category": "a"},
            {"template": Template("imdb", IMDB.source.replace("rate", "judge"))},
            {"template": Template("imdb", IMDB.source)}))]  # fmt: skip
    for number, change in enumerate(changes, 2):
        change()
        for _ in range(2):
            encode_file(path, tokenizer=tokenizer_in(folder), **arguments)
            assert len(encoded_batches) == min(number, 8)  # the last change takes the one before it back
    assert len([p for p in own_cache.iterdir() if p.is_dir()]) == 8


def test_a_chat_layout_has_a_cache_of_its_own(tmp_path, bundled):
    """R21: layouts of one module, told apart by name."""
    row = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    path = write_rows(tmp_path / "train.jsonl", [row])
    llama2, prompter = (encode_file(path, Chat(name), bundled, 128) for name in ("llama2", "prompter"))
    assert bundled.decode(llama2[0][0]) == "[INST] Why? [/INST] So. "
    assert bundled.decode(prompter[0][0]) == "<|prompter|> Why?  <|assistant|> So. "


WORKER = """
import hashlib, sys, time
sys.path.insert(0, {root!r})
import fcntl
import llama.data.examples
from llama.data.templates import TEMPLATES
from llama.data.tokenizer_files import load_tokenizer
from pathlib import Path

real, batches = llama.data.examples.encode_rows, []

def watched(rows, *rest):
    batches.append(len(rows))
    print("encoding", len(batches), flush=True)
    if {stop_at} == len(batches):
        time.sleep(1000)
    return real(rows, *rest)

def no_locks(*_):
    raise OSError(37, "No locks available")

llama.data.examples.encode_rows = watched
if {without_locks}:
    fcntl.flock = no_locks
print("ready", flush=True)
sys.stdin.readline()
tokenizer = load_tokenizer({tokenizer!r})
encoded = llama.data.examples.encode_file(Path({path!r}), TEMPLATES["imdb"], tokenizer, 128)
print("done", len(batches), len(encoded), hashlib.sha256(encoded.tokens.tobytes()).hexdigest(), flush=True)
"""


def start_worker(path: Path, stop_at: int = 0, without_locks: bool = False) -> subprocess.Popen:
    """A process that encodes `path` once it is told to, and sleeps for ever in its batch `stop_at`."""
    code = WORKER.format(root=str(ROOT), path=str(path), tokenizer=str(BUNDLED), stop_at=stop_at,
                         without_locks=without_locks)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def go(worker: subprocess.Popen) -> None:
    assert worker.stdout.readline() == "ready\n"
    worker.stdin.write("\n")
    worker.stdin.flush()


def read_until(worker: subprocess.Popen, line: str) -> None:
    while (said := worker.stdout.readline()) != line:
        assert said, "the worker has ended"


def test_two_threads_at_once_encode_once(tmp_path, own_cache, bundled, encoded_batches):
    """R21, C43: the second waits on the lock and reads what the first one wrote."""
    path = write_rows(tmp_path / "train.jsonl", reviews(100))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: encode_file(path, IMDB, bundled, 128), range(2))
    assert same(first, second) and encoded_batches == [100]
    assert sorted(p.suffix for p in own_cache.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("with_locks", [True, False])
def test_what_a_dead_encoder_left_is_removed_unless_it_may_be_alive(
    tmp_path, own_cache, bundled, monkeypatch, with_locks
):
    """R21: without locks, or on another machine, somebody may still be writing it."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    encode_file(path, IMDB, bundled, 128)
    (folder,) = [p for p in own_cache.iterdir() if p.is_dir()]
    shutil.rmtree(folder)
    ours, others = (folder.with_suffix(f".tmp-{node}-7") for node in (platform.node(), "another"))
    for left_over in (ours, others):
        left_over.mkdir()
    if not with_locks:
        monkeypatch.setattr(llama.boundary.durable.fcntl, "flock", no_locks)
    encode_file(path, IMDB, bundled, 128)
    assert folder.is_dir() and others.is_dir() and ours.is_dir() == (not with_locks)


def no_locks(*_):
    raise OSError(37, "No locks available")


@pytest.mark.slow
def test_a_killed_encoder_publishes_nothing_and_whoever_waits_takes_over(
    tmp_path, own_cache, bundled, encoded_batches, monkeypatch
):
    """R21: kill -9 in the second of two batches; what it left behind is removed, and the lock is free."""
    path = write_rows(tmp_path / "train.jsonl", reviews(2100))
    worker = start_worker(path, stop_at=2)
    results = []
    waiting = threading.Thread(target=lambda: results.append(encode_file(path, IMDB, bundled, 128)), daemon=True)
    asked = threading.Event()

    def flock(*arguments):
        asked.set()
        return real(*arguments)

    real = fcntl.flock
    monkeypatch.setattr(llama.boundary.durable.fcntl, "flock", flock)
    try:
        go(worker)
        read_until(worker, "encoding 2\n")
        (left_over,) = [p for p in own_cache.iterdir() if p.is_dir()]
        assert ".tmp" in left_over.name and (left_over / "tokens").exists()
        waiting.start()
        assert asked.wait(60) and not results and not encoded_batches  # another process holds the lock
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
    waiting.join(60)
    assert len(results) == 1 and len(results[0]) == 2100 and encoded_batches == [2000, 100]
    (published,) = [p for p in own_cache.iterdir() if p.is_dir()]
    assert published.name == left_over.name.split(".")[0]
    assert same(results[0], EncodedData.open(published, path))


@pytest.mark.slow
@pytest.mark.parametrize("without_locks", [False, True], ids=["with locks", "on a file system without locks"])
def test_two_processes_at_once_both_succeed_and_give_the_same(tmp_path, own_cache, bundled, without_locks):
    """R21, C43: with locks only one of them works; without, both do, and neither harms the other."""
    path = write_rows(tmp_path / "train.jsonl", reviews(4100))
    workers = [start_worker(path, without_locks=without_locks) for _ in range(2)]
    for worker in workers:
        go(worker)
    told = [worker.communicate(timeout=120)[0].splitlines()[-1].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    encoded = encode_file(path, IMDB, bundled, 128)
    digest = hashlib.sha256(encoded.tokens.tobytes()).hexdigest()
    assert [[rows, found] for _, _, rows, found in told] == [["4100", digest]] * 2
    if not without_locks:
        assert sorted(batches for _, batches, _, _ in told) == ["0", "3"]
    assert sorted(p.suffix for p in own_cache.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("name", [*TOKENS, *EXAMPLES, "about.json"])
@pytest.mark.parametrize("cut", [1, 10**6], ids=["a byte short", "empty"])
def test_a_damaged_cache_is_named(tmp_path, own_cache, bundled, name, cut):
    """R5, R21: cut short by a full disk or a crash of the machine; never a traceback, never wrong tokens."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    encode_file(path, IMDB, bundled, 128)
    [folder] = [p for p in own_cache.iterdir() if p.is_dir()]
    (folder / name).write_bytes((folder / name).read_bytes()[:-cut])
    with pytest.raises(UserError, match=rf"^{re.escape(str(folder))}: damaged, delete it") as error:
        encode_file(path, IMDB, bundled, 128)
    assert len(error.value.lines) == 1


@pytest.mark.parametrize("rows", [5, 100, pytest.param(2100, marks=pytest.mark.slow)],
                         ids=["a few bytes", "many", "in a second batch"])  # fmt: skip
def test_a_full_disk_is_told_and_nothing_is_published(tmp_path, own_cache, bundled, monkeypatch, rows):
    """R3, R21: whether the system refuses at once or only when the file is closed; later all is well."""
    path = write_rows(tmp_path / "train.jsonl", reviews(rows))
    for full in ("tokens", "was_cut"):
        with monkeypatch.context() as patched:
            patched.setattr(llama.data.examples, "open", lambda path, mode, full=full: builtins.open(
                "/dev/full" if path.name == full else path, mode), raising=False)
            with pytest.raises(UserError, match="free some space, or set LLAMA_CACHE") as error:
                encode_file(path, IMDB, bundled, 128)
            assert len(error.value.lines) == 1
        assert [p.suffix for p in own_cache.iterdir()] == [".lock"]
    assert len(encode_file(path, IMDB, bundled, 128)) == rows


def test_an_interrupted_encoder_leaves_nothing_behind(tmp_path, own_cache, bundled, monkeypatch):
    """R21: after it has begun to write."""
    path = write_rows(tmp_path / "train.jsonl", reviews(15))
    monkeypatch.setattr(llama.data.examples, "BATCH_ROWS", 10)
    real, calls = llama.data.examples.encode_rows, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(llama.data.examples, "encode_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_file(path, IMDB, bundled, 128)
    assert [p.suffix for p in own_cache.iterdir()] == [".lock"]
    assert len(encode_file(path, IMDB, bundled, 128)) == 15


def test_a_cache_folder_that_cannot_be_made_is_an_error_that_says_what_to_set(tmp_path, monkeypatch):
    """R17: a file is where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set LLAMA_CACHE"):
        cache_folder()
    monkeypatch.delenv("LLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "llama-fine-tuning"


@pytest.mark.parametrize("name", ["tokens", "is_answer", "stops", "label_counts", "rows", "was_cut", "answers"])
def test_a_cache_whose_bytes_have_changed_is_refused(tmp_path, own_cache, bundled, name):
    """R5: of the right size, or longer: never wrong tokens, never a fingerprint of other ones."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    encode_file(path, IMDB, bundled, 128)
    [folder] = [p for p in own_cache.iterdir() if p.is_dir()]
    content = bytearray((folder / name).read_bytes())
    for damaged in (bytes([content[0] ^ 1]) + content[1:], content + b"\0\0"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"^{re.escape(str(folder))}: damaged, delete it .*{name}"):
            encode_file(path, IMDB, bundled, 128)
    (folder / name).write_bytes(content)
    assert len(encode_file(path, IMDB, bundled, 128)) == 5


def test_a_file_that_changes_while_it_is_read_is_never_cached_under_its_old_content(tmp_path, own_cache, bundled,
                                                                                   monkeypatch):
    """R21: its name in the cache is that of what it was."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    real = llama.data.examples.digest

    def then_change(paths):
        key = real(paths)
        write_rows(path, reviews(7))
        return key

    with monkeypatch.context() as patched:
        patched.setattr(llama.data.examples, "digest", then_change)
        with pytest.raises(UserError, match="train.jsonl: changed while it was read"):
            encode_file(path, IMDB, bundled, 128)
    assert len(encode_file(path, IMDB, bundled, 128)) == 7


# Memory

PEAK = """
import re, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import pyarrow.parquet
from llama.data.examples import encode_file
from llama.data.templates import TEMPLATES

class Words:
    bos_id, eos_id, files, spelled = 1, 2, (), ()

    def encode_batch(self, texts, starts_text=True):
        return [[len(word) for word in text.split()] for text in texts]

for path in sys.argv[1:]:
    encode_file(Path(path), TEMPLATES["imdb"], Words(), 256)
    # Of this program alone: ru_maxrss begins with that of the process which started it.
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_file(tmp_path):
    """R15: 20 MB take what 2 MB did, but for some slack: as JSONL, and as Parquet of a single row group.

    Of Parquet, whose reader keeps some MB of buffers, tests/test_rows.py counts the bytes exactly.
    """
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=80)) for _ in range(500)]

    def rows(megabytes: int) -> list[dict]:
        return [{"text": f"{generator.choice(texts)} {i}", "label": i % 2} for i in range(megabytes << 11)]

    plain = dict(compression="none", use_dictionary=False)
    for megabytes in (2, 20):
        write_rows(tmp_path / f"{megabytes}.jsonl", rows(megabytes))
        write_parquet(tmp_path / f"{megabytes}.parquet", rows(megabytes), **plain)
    assert pyarrow.parquet.ParquetFile(tmp_path / "20.parquet").num_row_groups == 1
    files = [tmp_path / f"{megabytes}.{kind}" for megabytes in (2, 20) for kind in ("jsonl", "parquet")]
    assert all(large.stat().st_size > small.stat().st_size + (14 << 20)
               for small, large in zip(files[:2], files[2:], strict=True))
    done = subprocess.run([sys.executable, "-c", PEAK.format(root=str(ROOT)), *files], capture_output=True, text=True,
                          check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, after_small, after_jsonl, after_all = (int(line) / 1024 for line in done.stdout.split())
    assert after_jsonl < after_small + 8 and after_all < after_jsonl + 18, done.stdout
