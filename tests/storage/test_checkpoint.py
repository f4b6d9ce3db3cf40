"""Checkpoints exist whole or not at all, are proved before they are used, and deleted only when others are there."""

import ast
import hashlib
import os
import pickle
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sharded import this_process
from small_checkpoints import SETTINGS, TOTALS, rewrite, saved, small_model, small_state
from torch.distributed.fsdp import fully_shard

from llama.boundary.errors import UserError
from llama.parallel import collectives
from llama.storage import atomic, checkpoint
from llama.storage.checkpoint import Saver, load_checkpoint, set_aside
from llama.storage.manifest import best, compare, find, published, read_manifest, verify
from llama.storage.slices import write_tensors
from llama.training.optim import build_adamw
from llama.training.state import training_state

ROOT = Path(__file__).resolve().parents[2]
def names(folder: Path) -> list[str]:
    return [path.name for path in published(folder)]


def problem(path: Path) -> str:
    """The line that refuses a damaged checkpoint; empty for a whole one."""
    try:
        verify(path, read_manifest(path))
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


# The manifest


def test_the_manifest_says_what_is_there_and_reads_back_as_it_was(tmp_path):
    """R5, R7: step, ranks, settings, counts, how good it was, and of each file its size and digest."""
    (path,) = published(saved(tmp_path, [12], losses={12: 0.5}))
    found = read_manifest(path)
    assert (found.step, found.ranks, found.identity, found.totals) == (12, 1, SETTINGS, TOTALS)
    assert found.held_out == {"loss": 0.5, "n": 8}
    assert {name: file["bytes"] for name, file in found.files.items()} == {
        p.name: p.stat().st_size for p in path.glob("*.safetensors")}
    assert problem(path) == ""


def test_a_small_files_digest_is_the_hash_of_its_hash(tmp_path):
    """R5: SHA-256 over the SHA-256 of each block, here of one block; an oracle by hand."""
    (tmp_path / "x").write_bytes(b"llama" * 100)
    inner = hashlib.sha256(b"llama" * 100).digest()
    assert atomic.digests(tmp_path, ["x"]) == {"x": {"bytes": 500, "sha256": hashlib.sha256(inner).hexdigest()}}


@pytest.mark.parametrize("block", [1000, 3 * 2**20])
def test_the_digest_of_a_large_file_covers_every_byte_of_it(tmp_path, monkeypatch, block):
    """R5, R6: the SHA-256 of the SHA-256s of its blocks, the last one cut; blocks of more than one piece that is read.
    """
    monkeypatch.setattr(atomic, "HASHED_AT_ONCE", block)
    content, path = os.urandom(2 * block + 77), tmp_path / "x"

    def digest_of(content: bytes) -> str:
        path.write_bytes(content)
        return atomic.digests(tmp_path, ["x"])["x"]["sha256"]

    blocks = [content[:block], content[block : 2 * block], content[2 * block :]]
    by_hand = hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in blocks)).hexdigest()
    assert digest_of(content) == by_hand
    for place in (0, block - 1, block, 2 * block - 1, 2 * block, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        assert digest_of(changed) != by_hand, place


def test_blocks_are_of_64_mib():
    """Or checkpoints that exist would be taken for damaged ones."""
    assert atomic.HASHED_AT_ONCE == 64 * 1024 * 1024


def digests_in_blocks(folder: Path) -> dict:
    atomic.HASHED_AT_ONCE = 1000
    try:
        return atomic.digests(folder, ["empty", "one", "many"])
    finally:
        atomic.HASHED_AT_ONCE = 64 * 2**20


def test_digests_do_not_depend_on_the_number_of_ranks(ranks, tmp_path):
    """R6: blocks are shared out; an empty file, one of one block, one of many."""
    for name, size in (("empty", 0), ("one", 1000), ("many", 4321)):
        (tmp_path / name).write_bytes(os.urandom(size))
    found = [result for size in (1, 2, 4) for result in ranks(size, digests_in_blocks, tmp_path)]
    assert all(result == found[0] for result in found)
    assert len({file["sha256"] for file in found[0].values()}) == 3


@pytest.mark.parametrize("name", [
    "model.safetensors", pytest.param("optimizer.safetensors", marks=pytest.mark.slow), "manifest.json",
])  # fmt: skip
def test_one_flipped_bit_anywhere_or_a_cut_is_reported_with_the_files_name(tmp_path, name):
    """R5: every byte in turn, and every length in steps; the one before it is named, not silently used."""
    _, older, path = published(saved(tmp_path, [1, 2, 3]))
    content = (path / name).read_bytes()
    places = range(len(content)) if name == "manifest.json" else range(0, len(content), 7)
    for place in places:
        (path / name).write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1:])
        message = problem(path)
        assert str(path / name) in message and "damaged" in message and "--resume step-000002" in message, place
    for length in range(0, len(content), 100):
        (path / name).write_bytes(content[:length])
        assert str(path / name) in problem(path), length
    (path / name).unlink()
    assert name in problem(path) and problem(older) == ""


def test_files_that_the_manifest_does_not_name_or_names_elsewhere_are_refused(tmp_path):
    """R12: no file beside those that were written, none from outside the folder."""
    saved(tmp_path / "run", [1])
    path = tmp_path / "run/step-000001"
    shutil.copy(path / "model.safetensors", path / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors: not in the manifest" in problem(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    shutil.move(path / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "expected a file inside the folder" in problem(path)
    for name in ("../../elsewhere.safetensors", "/etc/passwd", "..", "", "a\0b", "\x1b[31m"):
        rewrite(path, lambda content, name=name: content["files"].update({name: {"bytes": 1, "sha256": ""}}))
        message = problem(path)
        assert message and message.isprintable() and "root:" not in message, name


@pytest.mark.parametrize("change", [
    {"step": 5}, {"step": "1"}, {"step": True}, {"step": None}, {"settings": []}, {"totals": {"examples": "many"}},
    {"totals": {"examples": float("nan")}}, {"held_out": {"loss": None}}, {"files": ["model.safetensors"]},
    {"files": {"model.safetensors": 3}}, {"files": {"model.safetensors": {"bytes": 1}}}, {"more": 1}, {"ranks": 1.0},
    {"identity": {}},
    {"held_out": 3}, {"totals": {"examples": 10**400}}, {"held_out": {"loss": 10**400}}, {"totals": {"seconds": 0}},
    {"files": {"model.safetensors": {"bytes": "x", "sha256": "y"}}},
], ids=str)  # fmt: skip
def test_a_manifest_of_another_form_is_reported_in_one_line(tmp_path, change):
    """R5: also where its digest is right."""
    path = saved(tmp_path, [1]) / "step-000001"
    rewrite(path, lambda content: content.update(change))
    assert problem(path)
    for text in ("", "[]", "3", "null", "[" * 10_000, '{"sha256": 3}', '{"sha256": "x"}', '{"step": 1}', "\udcff"):
        (path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        assert "damaged" in problem(path)


def test_differences_in_settings_are_listed_and_allowed_only_by_name():
    """R7: every one; a name that is no setting is refused."""
    path, was = Path("step-000001"), {"seed": 0, "learning_rate": 0.1, "old": 1}
    compare(path, was, dict(was))
    every = "learning_rate was 0.1, is 0.2; old was 1, is None; seed was 0, is 3; to go on"
    with pytest.raises(UserError, match=every):
        compare(path, was, {"seed": 3, "learning_rate": 0.2})
    compare(path, was, was | {"seed": 3, "learning_rate": 0.2}, "seed,learning_rate")
    with pytest.raises(UserError, match="settings: learning_rate was 0.1, is 0.2; to go on"):
        compare(path, was, was | {"seed": 3, "learning_rate": 0.2}, "seed")
    with pytest.raises(UserError, match="--allow_changed 'sead': expected names among learning_rate, old, seed"):
        compare(path, was, was, "sead")


# Which one


def test_the_newest_is_chosen_by_number_or_the_one_that_is_named(tmp_path):
    """R1: names of anything unfinished or set aside are not checkpoints."""
    assert find(tmp_path / "absent", "newest") is None and find(tmp_path, "newest") is None
    saved(tmp_path, [2, 1_000_000, 999_999])
    for name in ("step-2000000.tmp", "step-2000000.deleting", "step-000005.aside", "step-5", "step-00000x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000007").write_text("a file")
    assert names(tmp_path) == ["step-000002", "step-999999", "step-1000000"]
    assert find(tmp_path, "newest").name == "step-1000000"
    assert find(tmp_path, "step-2").name == find(tmp_path, "step-000002").name == "step-000002"
    for wanted in ("step-3", "step-", "2", "step-" + "9" * 5000, "../x", ""):
        with pytest.raises(UserError, match="expected one of these: step-000002, step-999999, step-1000000"):
            find(tmp_path, wanted)


def test_a_published_checkpoint_is_never_written_again(tmp_path):
    """R2: the second save of a step stops, and what is there stays."""
    path = saved(tmp_path, [1, 2]) / "step-000002"
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(UserError, match="step-000002: exists already, expected a name that is free"):
        saved(tmp_path, [2])
    assert before == {p.name: p.read_bytes() for p in path.iterdir()} and names(tmp_path) == [
        "step-000001", "step-000002"]


def test_an_unfinished_one_of_the_same_step_is_replaced(tmp_path):
    """R1, R2: whatever the dead run had written of it."""
    (tmp_path / "step-000001.tmp").mkdir(parents=True)
    (tmp_path / "step-000001.tmp/model.safetensors").write_text("half")
    assert problem(saved(tmp_path, [1]) / "step-000001") == "" and not list(tmp_path.glob("*.tmp"))


def test_what_is_newer_than_the_one_gone_back_to_is_set_aside_not_deleted(tmp_path):
    """R2, R17: and again, with a name that is free."""
    saved(tmp_path, [1, 2, 3])
    assert [p.name for p in set_aside(tmp_path, 1)] == ["step-000002.aside", "step-000003.aside"]
    saved(tmp_path, [2])
    assert [p.name for p in set_aside(tmp_path, 1)] == ["step-000002.aside1"]
    assert names(tmp_path) == ["step-000001"] and len(list(tmp_path.glob("*.aside*/model.safetensors"))) == 3


# Retention


def test_the_newest_the_best_and_the_pinned_stay(tmp_path):
    """R4: K of the newest besides; -1 keeps all; equal losses count for the later one."""
    losses = {1: 0.9, 2: 0.3, 4: 0.3, 6: 0.5, 7: float("nan")}
    assert names(saved(tmp_path / "all", [1, 2, 3], keep=-1)) == ["step-000001", "step-000002", "step-000003"]
    assert names(saved(tmp_path / "one", [1, 2, 3], keep=1)) == ["step-000003"]
    assert names(saved(tmp_path / "best", range(1, 9), 2, losses)) == ["step-000004", "step-000007", "step-000008"]
    folder = saved(tmp_path / "pin", [1])
    (folder / "step-000001/keep").touch()
    assert names(saved(folder, [2, 3, 4], keep=1)) == ["step-000001", "step-000004"]
    assert problem(folder / "step-000001") == ""


def test_the_best_is_the_lowest_loss_among_those_that_can_be_read(tmp_path):
    """R4, R5: a damaged manifest is nobody's best, and no reason to stop saving."""
    saved(tmp_path, [1, 2, 3], losses={1: 0.1, 2: 0.2})
    assert best(published(tmp_path)).name == "step-000001"
    (tmp_path / "step-000001/manifest.json").write_text("{")
    assert best(published(tmp_path)).name == "step-000002"
    assert best([]) is None and best(published(saved(tmp_path / "none", [1]))) is None
    assert names(saved(tmp_path, [4], keep=1)) == ["step-000002", "step-000004"]


def test_nothing_is_deleted_before_the_new_one_is_published(tmp_path, monkeypatch):
    """R3, R4: a crash between the two leaves one too many, and the next save takes the left-over away."""
    saved(tmp_path, [1])
    seen, real = [], checkpoint._delete

    def crash(path):
        seen.append((path.name, names(tmp_path)))
        path.rename(path.with_suffix(".deleting"))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_delete", crash)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, [2], keep=1)
    assert seen == [("step-000001", ["step-000001", "step-000002"])]
    monkeypatch.setattr(checkpoint, "_delete", real)
    saved(tmp_path, [3], keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003"]


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    """R4: training goes on."""
    saved(tmp_path, [1])
    message = "step-000001.deleting: could not be deleted .*busy"
    with monkeypatch.context() as patched, pytest.warns(UserWarning, match=message):
        patched.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(16, "busy")))
        saved(tmp_path, [2], keep=1)
    with pytest.warns(UserWarning, match=message), monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(16, "busy")))
        saved(tmp_path, [3], keep=-1)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_a_checkpoint_on_another_disk_is_let_go_and_a_backup_of_the_users_stays(tmp_path):
    """R4, R17: only the link is deleted; names that this code does not use are nobody's left-overs."""
    saved(tmp_path / "elsewhere", [1])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/step-000001").symlink_to(tmp_path / "elsewhere/step-000001")
    shutil.copytree(tmp_path / "elsewhere/step-000001", tmp_path / "run/step-000001.old")
    saved(tmp_path / "run", [2], keep=1)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-000001.old", "step-000002"]
    assert problem(tmp_path / "elsewhere/step-000001") == ""


# On disk before it has its name


def test_every_file_is_forced_to_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """R1: a power cut keeps what was synced, in any order it likes: files, their folder, the rename, its folder."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))),
                                                 fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append(("rename", str(new))), rename(old, new)))
    saved(tmp_path, [1])
    unfinished, path = str(tmp_path / "step-000001.tmp"), str(tmp_path / "step-000001")
    at = events.index(("rename", path))
    synced = [where for what, where in events[:at] if what == "sync"]
    files = {f"{unfinished}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "manifest.json")}
    assert files <= set(synced) and synced[-1] == unfinished
    assert events[at + 1] == ("sync", str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*could not be deleted:UserWarning")  # the rename that fails may be that one
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "mkdir"])
def test_a_disk_that_fails_at_any_call_leaves_the_older_checkpoints_and_is_reported(tmp_path, monkeypatch, call):
    """R3: the k-th call fails, for every k; the message names the path; the weights in memory are as they were."""
    older = saved(tmp_path, [1])
    for k in range(1000):
        count, real = [], getattr(os, call)

        def failing(*args, count=count, k=k, real=real, **kwargs):
            count.append(1)
            if len(count) == k + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        model = small_model()
        state = small_state(model)
        monkeypatch.setattr(os, call, failing)
        try:
            Saver(tmp_path, 1).save(2, state, SETTINGS, TOTALS, {})
        except UserError as error:
            assert "No space left" in str(error) and str(tmp_path) in str(error)
            assert "step-000001" in names(tmp_path)
            if call == "pwrite":
                assert "writing " in str(error) and "bytes at" in str(error)
        finally:
            monkeypatch.setattr(os, call, real)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model().parameters(), strict=True))
        for path in published(older):
            assert problem(path) == ""
        assert names(tmp_path)[0] in ("step-000001", "step-000002")
        if len(count) <= k:
            break
        shutil.rmtree(tmp_path / "step-000002", ignore_errors=True)
        saved(tmp_path, [1]) if not (tmp_path / "step-000001").exists() else None
    assert 0 < k < 100 and names(tmp_path) == ["step-000002"]


def late_reader(folder: Path) -> tuple[list[str], set[int]]:
    """Rank 1 sees every new file late, as on a disk shared by machines: only when it asks for the third time."""
    process, asked = this_process(), Counter()
    model = fully_shard(small_model(), mesh=process.mesh["shard"])

    def late(path) -> bool:
        asked[path] += 1
        return os.path.lexists(path) and asked[path] > 2

    if not process.is_rank_zero:
        collectives.os = SimpleNamespace(path=SimpleNamespace(lexists=late))
    try:
        Saver(folder, 1).save(1, small_state(model), {}, {}, {})
        verify(folder / "step-000001", read_manifest(folder / "step-000001"))
    finally:
        collectives.os = os
    return sorted(p.name for p in (folder / "step-000001").iterdir()), set(asked.values())


def test_ranks_wait_for_files_that_appear_late(ranks, tmp_path):
    """R22: only rank 0 makes and names files; the others wait until they see them, and the digests prove it."""
    expected = ["manifest.json", "model.safetensors", "optimizer.safetensors"]
    (first, never), (second, counts) = ranks(2, late_reader, tmp_path)
    assert first == second == expected and never == set()
    assert counts and min(counts) >= 3
    assert load_file(tmp_path / "step-000001/model.safetensors")["0.weight"].equal(small_model()[0].weight)


def test_waiting_for_a_file_ends(tmp_path, monkeypatch):
    """R22: a node with a disk of its own gets an error, and does not wait for ever."""
    monkeypatch.setattr(collectives, "PATIENCE", 0.0)
    with pytest.raises(UserError, match="x: another rank wrote it, but it is not visible here .* expected one disk"):
        collectives.wait_until_visible(tmp_path / "x")


# In the background


def test_a_background_save_holds_the_weights_of_its_moment(tmp_path, monkeypatch):
    """R1: training changes them while they are written; here before the first byte is."""
    gate, real = threading.Event(), write_tensors

    def slow(*args, **kwargs):
        assert gate.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    model = small_model()
    optimizer, saver = build_adamw(model, 0.1, 0.0), Saver(tmp_path, -1, in_background=True)
    saver.save(1, training_state(model, optimizer), SETTINGS, TOTALS, {})
    with torch.no_grad():
        model[0].weight.zero_()
        optimizer.state[model[0].weight]["exp_avg"].fill_(3)
    assert names(tmp_path) == []
    gate.set()
    saver.wait()
    assert problem(tmp_path / "step-000001") == ""
    assert load_file(tmp_path / "step-000001/model.safetensors")["0.weight"].equal(small_model()[0].weight)
    assert not load_file(tmp_path / "step-000001/optimizer.safetensors")["0.weight.exp_avg"].any()


def test_background_saves_are_published_in_order_and_retained_as_others_are(tmp_path):
    """R4: the same files as without."""
    losses = {2: 0.1}
    there = saved(tmp_path / "background", range(1, 7), 2, losses, background=True)
    at_once = saved(tmp_path / "at once", range(1, 7), 2, losses)
    assert names(there) == names(at_once) == ["step-000002", "step-000005", "step-000006"]
    for a, b in zip(published(there), published(at_once), strict=True):
        assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_what_kept_a_background_save_is_warned_of_at_once_and_raised_by_the_next(tmp_path):
    """R3: nobody trains on for hours without a checkpoint."""
    (tmp_path / "file").write_text("")
    saver = Saver(tmp_path / "file/checkpoints", -1, in_background=True)
    with pytest.warns(UserWarning, match="step 1 was not saved"):
        saver.save(1, small_state(), {}, {}, {})
        saver.thread.join()
    with pytest.raises(UserError, match="file"):
        saver.save(2, small_state(), {}, {}, {})
    saver.wait()


def in_background_on_ranks(folder: Path) -> None:
    """Collectives of the training go on while the shards are written."""
    process = this_process()
    model = fully_shard(small_model(), mesh=process.mesh["shard"])
    optimizer, saver = build_adamw(model, 0.1, 0.0), Saver(folder, 1, in_background=True)
    for step in range(1, 4):
        saver.save(step, training_state(model, optimizer), {}, {}, {})
        for i in range(50):
            numbers = torch.full((3,), float(i + process.rank))
            dist.all_reduce(numbers)
            assert numbers.tolist() == [2.0 * i + 1] * 3
    saver.wait()


def test_background_saves_on_two_ranks_do_not_mix_with_the_trainings_messages(ranks, tmp_path):
    """R1, R6."""
    ranks(2, in_background_on_ranks, tmp_path)
    assert names(tmp_path) == ["step-000003"] and problem(tmp_path / "step-000003") == ""
    assert load_file(tmp_path / "step-000003/model.safetensors")["1.weight"].equal(small_model()[1].weight)


# Read back


def test_what_was_saved_is_read_back_bitwise_and_anything_else_is_refused(tmp_path):
    """R1, C31: into tensors of the same names and shapes; before one is filled, all are compared."""
    model = small_model()
    state = small_state(model)
    with torch.no_grad():
        for number, tensor in enumerate([*state["model"].values(), *state["optimizer"].values()]):
            tensor.fill_(number + 0.1)
    Saver(tmp_path, 1).save(1, state, {}, {}, {})
    fresh = small_state()
    load_checkpoint(tmp_path / "step-000001", fresh)
    for stem, tensors in state.items():
        assert all(torch.equal(tensor, fresh[stem][name]) for name, tensor in tensors.items())
    fresh = small_state()
    for wanted, message in (
        ({**fresh["model"], "2.weight": torch.zeros(3)}, "lacks '2.weight'"),
        ({"0.weight": fresh["model"]["0.weight"]}, "has '0.bias', '1.bias', '1.weight', which nothing asks for"),
        (fresh["model"] | {"0.weight": torch.zeros(5, 8)}, r"'0.weight' is F32 \[5, 7\], expected F32 \[5, 8\]"),
    ):
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path / "step-000001", {"model": wanted})
    assert all(torch.equal(a, b) for a, b in zip(fresh["model"].values(), small_model().parameters(), strict=True))


# Nothing is executed


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, where: Path):
        self.where = where

    def __reduce__(self):
        return (open, (str(self.where), "w"))


def test_a_pickle_in_any_place_of_a_checkpoint_is_not_opened(tmp_path):
    """R14: under the names of this format, and of torch.distributed.checkpoint's."""
    state = small_state()
    path = saved(tmp_path / "run", [1]) / "step-000001"
    for name in ("model.safetensors", "optimizer.safetensors", "manifest.json"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
        assert name in problem(path)
        with pytest.raises(UserError):
            read_manifest(path)
            load_checkpoint(path, state)
        (path / name).write_bytes(content)
    for name in (".metadata", "__0_0.distcp", "pytorch_model.bin", "training_args.bin"):
        (path / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    assert problem(path) == ""
    load_checkpoint(path, state)
    assert not (tmp_path / "executed").exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert (tmp_path / "executed").exists()  # it would have been


def test_no_shipped_file_can_execute_what_it_reads():
    """R14: no pickle, no torch.load, no eval or exec, no trust_remote_code, in any file that users run."""
    files = [*ROOT.glob("*.py"), *(ROOT / "llama").rglob("*.py")]
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named = {"torch.load", "pickle.load", "pickle.loads"} & {ast.unparse(node)} if isinstance(
                node, ast.Attribute) else set()
            named |= {node.id} & {"eval", "exec", "__import__"} if isinstance(node, ast.Name) else set()
            named |= {node.arg} & {"trust_remote_code"} if isinstance(node, ast.keyword) else set()
            wrong = [name for name in imported if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")]
            assert not wrong and not named, f"{file.name}:{getattr(node, 'lineno', 0)}: {wrong or named}"
