"""Whatever is in a folder of weights, it is read or refused in one line: nothing runs, nothing outside is read.

HOSTILE_EXAMPLES=5000 pytest tests/storage/test_hostile_files.py runs the long form: 25,000 changed folders.
"""

import json
import os
import re
import shutil
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoints import saved, small_state

from llama.boundary.errors import UserError
from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama, ModelConfig
from llama.storage.atomic import digests
from llama.storage.base import TINY_TOKENIZER, Base, config_to_json
from llama.storage.checkpoint import load_checkpoint
from llama.storage.companions import Companions
from llama.storage.manifest import _digest, read_manifest, verify
from llama.storage.peft import Adapter, load_adapter, read_adapter, save_adapter
from llama.storage.pretrained import export_model, hugging_face_parameters
from llama.storage.slices import write_tensors
from lora import apply_adapter, initialize_adapter

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", 60))
hostile = settings(derandomize=EXAMPLES < 1000, database=None, max_examples=EXAMPLES, deadline=None,
                   suppress_health_check=list(HealthCheck))  # fmt: skip
MORE_MEMORY = 400 * 2**20  # bytes that all examples of one test together may take
OUTSIDE = Path("../outside")

CONFIG = ModelConfig(vocab_size=1280, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=4, max_position_embeddings=64)

# What somebody may write in place of a value of a JSON file.
hostile_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([10**12, 2**63, -1, 0, 1e400, "../../secret", "/etc/passwd", "model.safetensors", "..", "x" * 9999,
                     [], {}, [[]], {"a": {"a": {}}}, "F32", "BF16", "I64", "F4", [0, 2**62], [10**9, 10**9], [-1, 8],
                     [8, 0], "\0", "\x1b[31m", "all-linear", ".*", "o_proj"]),
).map(deepcopy)  # the next change may be inside this one


@st.composite
def changed_json(draw, content: bytes) -> bytes:
    """A JSON text with one to three of its values replaced, removed or repeated, at any depth."""
    value = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys[:200]))
            if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            action = draw(st.integers(0, 3))
            if action == 0:
                del place[key]
            elif action == 1 and isinstance(place, dict):
                place[draw(st.one_of(st.text(max_size=8), st.just("__metadata__")))] = place[key]
            else:
                place[key] = draw(hostile_values)
            break
    return json.dumps(value).encode()


@st.composite
def changed_bytes(draw, content: bytes) -> bytes:
    """Bytes with some flipped, cut out, repeated, put in, or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # Half of the time among the first bytes, where lengths and headers are.
        place = draw(st.integers(0, min(len(content), 64 if draw(st.booleans()) else len(content))))
        action = draw(st.integers(0, 3))
        if action == 0 and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif action == 1:
            del content[place : place + draw(st.integers(1, 50))]
        elif action == 2:
            content[place:place] = draw(st.binary(max_size=20))
        else:
            del content[place:]
    return bytes(content)


@st.composite
def changed_safetensors(draw, content: bytes) -> bytes:
    """A safetensors file whose header says something else, with a length that fits it or not."""
    length = int.from_bytes(content[:8], "little")
    header = draw(changed_json(content[8 : 8 + length]))
    said = draw(st.sampled_from([len(header)] * 4 + [0, 2**64 - 1, 10**9, len(header) + 1]))
    return said.to_bytes(8, "little") + header + content[8 + length :]


@st.composite
def changed_folder(draw, files: dict[str, bytes]) -> dict[str, bytes | str | None]:
    """The files of a folder with one changed; None: it is not there, a str: it is a link to that place."""
    name = draw(st.sampled_from(sorted(files)))
    links = st.sampled_from([f"{OUTSIDE}/{name}", f"{OUTSIDE}/{name}", "/etc/passwd", name, "."])
    kinds = [changed_bytes(files[name]), st.none(), links]
    kinds += [changed_json(files[name])] * 3 if name.endswith("json") else []
    kinds += [changed_safetensors(files[name])] * 3 if name.endswith("safetensors") else []
    return files | {name: draw(st.one_of(kinds))}


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lay_out(files: dict[str, bytes | str | None], folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).symlink_to(content)
        elif content is not None:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def scratch():
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def refusal(attempt) -> str:
    """The line that refuses a folder, "" where it is read. No exception but a UserError of one printable line."""
    try:
        attempt()
    except UserError as error:
        (line,) = error.lines
        assert 0 < len(line) < 2000 and "root:" not in line, line
        return line
    return ""


def memory(key: str) -> int:
    """Bytes in use now (VmRSS), or at most since the last reset (VmHWM)."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def check(attempt, files: dict[str, bytes], scratch: Path) -> None:
    """`attempt` on variants of a folder. Whole files of the same names lie outside of it: a link there is refused."""
    attempt(lay_out(files, scratch / "folder"))
    lay_out(files, scratch / OUTSIDE.name)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; see proc(5)
    before = memory("VmRSS")

    @hostile
    @given(files=changed_folder(files))
    def attack(files):
        folder = lay_out(files, scratch / "folder")
        line = refusal(lambda: attempt(folder))
        links = [name for name, content in files.items() if isinstance(content, str) and "/" in content]
        assert line or not links, links

    attack()
    assert memory("VmHWM") - before < MORE_MEMORY


def load_model(folder: Path) -> None:
    base = Base.pretrained(str(folder), 64)
    base.load(Llama(base.config))


def model_folder(scratch: Path, shards: bool) -> dict[str, bytes]:
    torch.manual_seed(0)
    folder, tokenizer = scratch / f"model{shards}", load_tokenizer(TINY_TOKENIZER)
    export_model(Llama(CONFIG), folder, config_to_json(CONFIG), Companions(tokenizer.files))
    if shards:
        (folder / "model.safetensors").unlink()
        weights = hugging_face_parameters(Llama(CONFIG))
        write_tensors(weights, folder, max_file_bytes=20_000)
    return read(folder)


@pytest.mark.parametrize("shards", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_folder_of_anybody_is_read_or_refused(scratch, shards):
    """R12, R13: configuration, tokenizer, headers, index; memory is never taken for what a file only says."""
    files = model_folder(scratch, shards)
    assert ("model.safetensors.index.json" in files) == shards
    check(load_model, files, scratch)


def test_an_adapter_of_anybody_is_read_or_refused(scratch):
    """R12, R13, C37."""
    model = Llama(CONFIG)
    adapter = Adapter(2, 4.0)
    apply_adapter(model, adapter)
    initialize_adapter(model, 0)
    save_adapter(model, scratch / "adapter", adapter, "base")

    def load(folder: Path) -> None:
        fresh = Llama(CONFIG)
        apply_adapter(fresh, read_adapter(folder))
        load_adapter(fresh, folder)

    check(load, read(scratch / "adapter"), scratch)


def test_a_checkpoint_of_anybody_is_read_or_refused(scratch):
    """R5, R12, R13, R14: also one whose manifest has a digest that fits."""
    saved(scratch / "run", [1])

    def load(folder: Path, forge: bool) -> None:
        path = folder.parent / "step-000001"
        shutil.rmtree(path, ignore_errors=True)
        folder.rename(path)
        if forge:
            forge_digests(path)
        verify(path, read_manifest(path))
        load_checkpoint(path, small_state())

    files = read(scratch / "run/step-000001")
    for forge in (False, True):
        check(partial(load, forge=forge), files, scratch)


def forge_digests(path: Path) -> None:
    """What an attacker would do: make all digests right."""
    try:
        content = json.loads((path / "manifest.json").read_text())
        content["files"] |= digests(path, [name for name in content["files"] if (path / name).is_file()])
        content.pop("sha256")
        (path / "manifest.json").write_text(json.dumps(content | {"sha256": _digest(content)}))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):
        pass  # then as it is
