"""Llama-2-70B on 16, 512 and 4,096 ranks, planned without them: who reads and who writes each byte.

A fake process group lets this process be any rank: it builds the model of that rank on the meta device and reads and
writes with the code of training, behind which files are holes. What all ranks hold is also computed by a formula that
is written out here. It must agree with every rank that is tried, and shows for all ranks that no byte is left out.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from large_llama import (
    LLAMA_2_70B,
    TOTAL_SIZE,
    Collectives,
    as_rank,
    shapes_in_files,
    write_folder_of_holes,
)
from safetensors import safe_open
from sharded import this_process

from llama.model import Llama
from llama.parallel.distribute import distribute, on_meta
from llama.parallel.processes import Process
from llama.parallel.shards import Part, local_slice
from llama.parallel.zero1 import ZeRO1
from llama.storage import pretrained, slices
from llama.storage.config_json import config_to_json
from llama.storage.layout import Layout, blocks_of, lay_out_parts
from llama.storage.pretrained import (
    export_model,
    hugging_face_parameters,
    initialize_weights,
    load_weights,
    superfluous_names,
)
from llama.storage.slices import Sink, check_tensors, read_tensors
from llama.training.state import training_state
from lora import Changes

# (replicate, shard, tensor) of each setting on 16, 512 and 4,096 ranks, 8 on a node.
MESHES = {
    "full": ((1, 16, 1), (1, 512, 1), (1, 4096, 1)),
    "hybrid": ((2, 8, 1), (64, 8, 1), (512, 8, 1)),
    "zero1": ((16, 1, 1), (512, 1, 1), (4096, 1, 1)),
    "full, tensor parallel": ((1, 2, 8), (1, 64, 8), (1, 512, 8)),
    "zero1, tensor parallel": ((2, 1, 8), (64, 1, 8), (512, 1, 8)),
}
ALL_MESHES = [mesh for meshes in MESHES.values() for mesh in meshes]
SETTINGS_AND_MESHES = [(setting, mesh) for setting, meshes in MESHES.items() for mesh in meshes]
LIMIT = 5 * 10**9  # bytes of tensors in a file that we write
CUT_BY_ROWS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
CUT_BY_COLUMNS = ("o_proj", "down_proj")


def kind_of(name: str) -> str:
    """The same for each layer: model.layers.7.mlp.up_proj.weight -> up_proj."""
    return name.split(".")[-2]


SHAPES = {kind_of(name): shape for name, shape in shapes_in_files(1).items() if not name.endswith("inv_freq")}


def held(kind: str, mesh: tuple[int, int, int]) -> np.ndarray:
    """Where the part of each rank lies in the tensor: (ranks, 4), first row, end of rows, first column, end of columns.

    Ranks of a tensor group share heads, features or the vocabulary evenly, as 8 ranks can here; then the ranks of
    `shard` share the rows that are left, the same number each, rounded up.
    """
    rows, columns = (*SHAPES[kind], 1)[:2]
    _, shard_ranks, tensor_ranks = mesh
    rank = np.arange(math.prod(mesh))
    tensor_rank = rank % tensor_ranks
    shard_rank = rank // tensor_ranks % shard_ranks
    first, end, left, right = 0 * rank, 0 * rank + rows, 0 * rank, 0 * rank + columns
    if kind in CUT_BY_ROWS:
        first, end = tensor_rank * rows // tensor_ranks, (tensor_rank + 1) * rows // tensor_ranks
    elif kind in CUT_BY_COLUMNS:
        left, right = tensor_rank * columns // tensor_ranks, (tensor_rank + 1) * columns // tensor_ranks
    chunk = -(-(end - first) // shard_ranks)
    own_first = np.minimum(first + shard_rank * chunk, end)
    own_end = np.minimum(own_first + chunk, end)
    return np.stack([own_first, own_end, left, right], axis=1)


def times_covered(parts: np.ndarray, rows: int, columns: int) -> set[int]:
    """How many of the rectangles lie over each number of a tensor: all values that occur."""
    parts = parts[(parts[:, 0] < parts[:, 1]) & (parts[:, 2] < parts[:, 3])]
    row_edges = np.unique([0, rows, *parts[:, :2].ravel()])
    column_edges = np.unique([0, columns, *parts[:, 2:].ravel()])
    assert row_edges[-1] == rows and column_edges[-1] == columns
    steps = np.zeros((len(row_edges), len(column_edges)), dtype=np.int64)
    top, bottom = np.searchsorted(row_edges, parts[:, 0]), np.searchsorted(row_edges, parts[:, 1])
    left, right = np.searchsorted(column_edges, parts[:, 2]), np.searchsorted(column_edges, parts[:, 3])
    for sign, i, j in ((1, top, left), (-1, bottom, left), (-1, top, right), (1, bottom, right)):
        np.add.at(steps, (i, j), sign)
    return set(steps.cumsum(0).cumsum(1)[:-1, :-1].ravel().tolist())


@pytest.fixture(scope="module")
def holes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("70b")
    write_folder_of_holes(folder)
    return folder


class Watched:
    """A file whose tensors note what is read of them, and hand out shapes without values, or the values, too."""

    read: dict[str, list[tuple[slice, ...]]] = {}
    with_values = False

    def __init__(self, path: Path, framework: str):
        self.file = safe_open(path, framework)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *error) -> None:
        self.file.__exit__(*error)

    def keys(self) -> list[str]:
        return self.file.keys()

    def get_slice(self, name: str) -> "WatchedSlice":
        return WatchedSlice(name, self.file.get_slice(name))


class WatchedSlice:
    def __init__(self, name: str, view):
        self.name, self.view = name, view
        self.get_shape, self.get_dtype = view.get_shape, view.get_dtype

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        Watched.read.setdefault(self.name, []).append(index)
        return self.view[index] if Watched.with_values else torch.empty(self.get_shape(), device="meta")[index]


def build(process: Process, setting: str, layers: int, quantized: str = "none") -> Llama:
    """What training builds on this rank; its memory is on the meta device."""
    model = on_meta(replace(LLAMA_2_70B, num_hidden_layers=layers))
    Changes(quantized).apply(model)
    distribute(model, process, torch.bfloat16, setting.split(",")[0])
    return model


def files_of(model: Llama, process: Process, setting: str) -> list[tuple]:
    """What an export and a checkpoint write: (stem, dtype, tensors)."""
    optimizer: torch.optim.Optimizer | ZeRO1 = torch.optim.AdamW(model.parameters())
    if setting.startswith("zero1"):
        optimizer = ZeRO1(optimizer, model, process)
    state = training_state(model, optimizer)
    return [("model", torch.bfloat16, hugging_face_parameters(model)), *((stem, None, t) for stem, t in state.items())]


def what_is_read(model: Llama, folder: Path) -> dict[str, tuple[int, ...]]:
    """Of each tensor, the rectangle that loading reads: first row, end of rows, first column, end of columns."""
    Watched.read = {}
    sinks = {}
    for name, target in pretrained._targets(model).items():
        sink = target if isinstance(target, Sink) else Sink.of(target)
        sinks[name] = replace(sink, put=lambda first, values: None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slices, "safe_open", Watched)
        patched.setattr(slices, "COPIED_AT_ONCE", 2**32)  # no values are copied here, so large pieces need no memory
        read_tensors(sinks, folder, allow_unexpected=lambda name: True)
    found = {}
    for name, pieces in Watched.read.items():
        for before, after in zip(pieces, pieces[1:], strict=False):
            assert after[0].start == before[0].stop and after[1:] == before[1:], f"{name}: rows twice, or left out"
        columns = pieces[0][1] if len(pieces[0]) > 1 else slice(0, 1)
        found[name] = (pieces[0][0].start, pieces[-1][0].stop, columns.start, columns.stop)
    return found


def ranks_to_try(mesh: tuple[int, int, int]) -> list[int]:
    """All of 16 ranks; of more, some from each end, and one of the last that have rows."""
    ranks = math.prod(mesh)
    return list(range(16)) if ranks == 16 else [0, 9, ranks * 1000 // 1024, ranks - 1]


def what_is_written(tensors: dict[str, torch.Tensor], layout: Layout) -> dict[str, np.ndarray]:
    """Of each tensor, the runs of bytes (n, 2) that this rank writes into its file: first byte and end, in order."""
    found = {}
    for name, tensor in tensors.items():
        width = layout.dtypes[name].itemsize
        runs = [np.empty((0, 2), dtype=np.int64)]
        for block, starts in blocks_of(Part.of(tensor), slices.COPIED_AT_ONCE // width):
            first = layout.places[name][1] + np.array(starts) * width
            runs.append(np.stack([first, first + block.shape[1] * width], axis=1))
        found[name] = joined(np.concatenate(runs))
    return found


def joined(runs: np.ndarray) -> np.ndarray:
    """Runs in order, those that touch as one."""
    runs = runs[np.argsort(runs[:, 0])]
    begins = np.append(True, runs[1:, 0] != runs[:-1, 1])
    ends = np.append(begins[1:], True)
    return np.stack([runs[begins, 0], runs[ends, 1]], axis=1) if len(runs) else runs


def runs_of(rectangle: np.ndarray, columns: int, begin: int, width: int) -> np.ndarray:
    """The bytes of a rectangle of a tensor that begins at byte `begin`, as `what_is_written` has them."""
    first, end, left, right = rectangle.tolist()
    rows = np.arange(first, end)
    runs = begin + width * np.stack([rows * columns + left, rows * columns + right], axis=1)
    return joined(runs)


def answered_for(kind: str, mesh: tuple[int, int, int]) -> np.ndarray:
    """As `held`, but only what a rank writes: ranks that hold the same divide its rows."""
    replicas, shard_ranks, tensor_ranks = mesh
    rank = np.arange(math.prod(mesh))
    number, holders = rank // tensor_ranks // shard_ranks, replicas
    if kind not in CUT_BY_ROWS + CUT_BY_COLUMNS:
        number, holders = number * tensor_ranks + rank % tensor_ranks, replicas * tensor_ranks
    parts = held(kind, mesh)
    chunk = -(-(parts[:, 1] - parts[:, 0]) // holders)
    first = np.minimum(parts[:, 0] + number * chunk, parts[:, 1])
    parts[:, 1] = np.minimum(first + chunk, parts[:, 1])
    parts[:, 0] = first
    return parts


def test_the_folder_of_holes_is_that_of_llama_2_70b(holes):
    """15 files and the size that the published index states, on no disk; our model asks for exactly what they hold."""
    assert len(list(holes.glob("*.safetensors"))) == 15
    assert json.loads((holes / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": TOTAL_SIZE}
    assert sum(path.stat().st_size for path in holes.glob("*.safetensors")) > TOTAL_SIZE
    assert sum(path.stat().st_blocks * 512 for path in holes.iterdir()) < 10**6
    parameters = hugging_face_parameters(on_meta(LLAMA_2_70B))
    check_tensors(parameters, holes, "model", superfluous_names(LLAMA_2_70B))
    assert sum(parameter.numel() for parameter in parameters.values()) == 68_976_648_192


@pytest.mark.slow
@pytest.mark.parametrize("setting, mesh", SETTINGS_AND_MESHES)
def test_each_rank_reads_what_it_holds_and_writes_its_share(setting, mesh, holes):
    """C32, C33: what is read are the rectangles of the formula, and the shard's. No collective is called from building
    to reading, nor to plan an export in bf16 and a checkpoint with both moments in fp32."""
    to_read = {kind: held(kind, mesh) for kind in SHAPES}
    to_write = {kind: answered_for(kind, mesh) for kind in SHAPES}
    for rank in ranks_to_try(mesh):
        with as_rank(rank, mesh) as process, Collectives() as collectives:
            model = build(process, setting, layers=1)
            read = what_is_read(model, holes)
            parameters = hugging_face_parameters(model)
            for name, parameter in parameters.items():
                first, end, left, right = to_read[kind_of(name)][rank].tolist()
                local, start = local_slice(parameter)
                rectangle = (first, end, left, right)
                assert read.get(name, rectangle) == rectangle and (name in read) == (end > first)
                assert ((*local.shape, 1)[:2], (*start, 0)[:2]) == ((end - first, right - left), (first, left)), name
            for stem, dtype, tensors in files_of(model, process, setting):
                layout = lay_out_parts({name: Part.of(tensor) for name, tensor in tensors.items()}, stem, dtype, LIMIT)
                for name, runs in what_is_written(tensors, layout).items():
                    kind = kind_of(name.removesuffix(".exp_avg").removesuffix(".exp_avg_sq"))
                    columns = SHAPES[kind][-1] if len(SHAPES[kind]) == 2 else 1
                    begin, width = layout.places[name][1], layout.dtypes[name].itemsize
                    assert np.array_equal(runs, runs_of(to_write[kind][rank], columns, begin, width)), name
        assert not collectives.called


@pytest.mark.parametrize("mesh", ALL_MESHES, ids=str)
def test_all_ranks_together_read_each_byte_as_often_as_it_is_held(mesh):
    """One of `shard` ranks has it, in each of `replicate` groups; a norm is on all ranks of a tensor group.

    No rank has more than its share, a row more for what does not divide.
    """
    replicas, shard_ranks, tensor_ranks = mesh
    for kind, shape in SHAPES.items():
        rows, columns = (*shape, 1)[:2]
        parts = held(kind, mesh)
        is_cut = kind in CUT_BY_ROWS or kind in CUT_BY_COLUMNS
        assert times_covered(parts, rows, columns) == {replicas * (1 if is_cut else tensor_ranks)}
        numbers = (parts[:, 1] - parts[:, 0]) * (parts[:, 3] - parts[:, 2])
        share = rows * columns / shard_ranks / (tensor_ranks if is_cut else 1)
        row = columns / tensor_ranks if kind in CUT_BY_COLUMNS else columns
        assert numbers.max() < share + row


@pytest.mark.parametrize("mesh", ALL_MESHES, ids=str)
def test_all_ranks_together_write_each_byte_once_and_nearly_the_same_amount(mesh):
    """C33, R24: also where all nodes hold the same: each of them writes its share, and a row more at most."""
    ranks = math.prod(mesh)
    for kind, shape in SHAPES.items():
        rows, columns = (*shape, 1)[:2]
        parts = answered_for(kind, mesh)
        assert times_covered(parts, rows, columns) == {1}
        numbers = (parts[:, 1] - parts[:, 0]) * (parts[:, 3] - parts[:, 2])
        row = columns / mesh[2] if kind in CUT_BY_COLUMNS else columns
        assert numbers.max() < rows * columns / ranks + 2 * row


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_is_quantised_and_cut_by_columns_is_read_in_whole_rows(kind, holes):
    """The scale of a row is that of the whole row: 8 ranks read o_proj and down_proj 8 times, all else as often as
    without."""
    mesh = (1, 2, 8)
    for rank in (0, 7, 13):
        with as_rank(rank, mesh) as process, Collectives() as collectives:
            read = what_is_read(build(process, "full", 1, kind), holes)
        assert not collectives.called and len(read) == len(SHAPES)
        for name, rectangle in read.items():
            first, end, left, right = held(kind_of(name), mesh)[rank]
            if kind_of(name) in CUT_BY_COLUMNS:
                left, right = 0, SHAPES[kind_of(name)][1]
            assert rectangle == (first, end, left, right), name


@pytest.mark.slow
def test_a_rank_of_16_reads_its_16th_of_all_80_layers(holes):
    """Each layer as the first one; and the bytes are exactly a 16th, because every shape can be divided by 16."""
    with as_rank(3, (1, 16, 1)) as process, Collectives() as collectives:
        read = what_is_read(build(process, "full", layers=80), holes)
    assert not collectives.called
    numbers = 0
    for name, (first, end, left, right) in read.items():
        assert (first, end, left, right) == tuple(held(kind_of(name), (1, 16, 1))[3])
        numbers += (end - first) * (right - left)
    assert len(read) == 723 and numbers * 2 == 68_976_648_192 * 2 // 16


@pytest.mark.slow
def test_files_of_70b_get_their_size_before_anything_is_written(tmp_path):
    """R24: an export of 138 GB, and a checkpoint of 828 GB, in files of at most 5 GB of tensors; the library opens
    each, which it does only if sizes and offsets fit, and finds every name and shape."""
    with as_rank(15, (2, 8, 1)) as process:
        files = files_of(build(process, "hybrid", layers=80), process, "hybrid")
        for number, (stem, dtype, tensors) in enumerate(files):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            layout = lay_out_parts({name: Part.of(tensor) for name, tensor in tensors.items()}, stem, dtype, LIMIT)
            slices._create(folder, layout, stem)
            dtypes = check_tensors(tensors, folder, stem)
            numbers = sum(tensor.numel() for tensor in tensors.values())
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            assert numbers == 68_976_648_192 * (2 if stem == "optimizer" else 1)
            assert set(dtypes.values()) == {dtype or torch.float32}
            assert size == numbers * (2 if dtype else 4) + sum(map(len, layout.headers.values()))
            assert all(layout.sizes[file] <= LIMIT + len(header) for file, header in layout.headers.items())


# 70B's shape with a 16th of its width: 8 groups of 8 heads, and the same names.
SMALL = replace(
    LLAMA_2_70B, vocab_size=2000, hidden_size=512, intermediate_size=1792, num_hidden_layers=2, head_dim=8
)


def load_and_export(folder: Path, target: Path, sharding: str, tensor_parallel: int) -> tuple[int, int, int]:
    """With memory and values on this rank: how many numbers it read and holds, and how many bytes it wrote."""
    process = this_process(sharding, tensor_parallel)
    model = on_meta(SMALL)
    distribute(model, process, torch.float32, sharding)
    written = []
    Watched.read = {}
    with pytest.MonkeyPatch.context() as patched, Collectives() as collectives:
        patched.setattr(Watched, "with_values", True)
        patched.setattr(slices, "safe_open", Watched)
        load_weights(model, folder)
        assert not collectives.called
    write_at = slices._write_at

    def watched_write_at(file, data, position: int) -> None:
        written.append(len(data))
        write_at(file, data, position)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slices, "_write_at", watched_write_at)
        export_model(model, target, config_to_json(SMALL))
    read = 0
    for pieces in Watched.read.values():
        for index in pieces:
            read += math.prod(part.stop - part.start for part in index)
    return read, sum(local_slice(parameter)[0].numel() for parameter in model.parameters()), sum(written)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding, tensor_parallel", [("full", 1), ("hybrid", 1), ("zero1", 1), ("full", 2), ("zero1", 2), ("zero1", 4)]
)
def test_four_real_ranks_read_what_they_hold_and_write_a_quarter_each(sharding, tensor_parallel, ranks, tmp_path):
    """R24: 70B's shape, a 16th as wide: what comes back is the folder that was read, byte for byte."""
    source, target = tmp_path / "source", tmp_path / "target"
    model = Llama(SMALL)
    initialize_weights(model, seed=0)
    export_model(model, source, config_to_json(SMALL))
    results = ranks(4, load_and_export, source, target, sharding, tensor_parallel)
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert sum(written for _, _, written in results) == 2 * numbers
    for read, held_here, written in results:
        assert read == held_here
        assert written == pytest.approx(2 * numbers / 4, rel=0.01)
