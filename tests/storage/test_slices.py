"""Where tensors lie in safetensors files is planned without a disk; and how a part is handed out row by row."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import save_file

from llama.boundary.errors import UserError
from llama.storage import slices
from llama.storage.layout import DTYPES, lay_out
from llama.storage.slices import Sink, read_tensors

SHAPES = {"a": (3, 5), "b": (7,), "c": (), "d": (0, 4), "e": (2, 2, 2), "f": (9,)}
KINDS = {"a": torch.float32, "b": torch.uint8, "c": torch.bfloat16, "d": torch.float16, "e": torch.int64,
         "f": torch.bool}  # fmt: skip


def content_of(layout, file: str) -> dict:
    """What the safetensors library reads of a file of zeros behind this header: {name: {"shape", "dtype", "data"}}."""
    header = layout.headers[file]
    return dict(deserialize(header + bytes(layout.sizes[file] - len(header))))


def header_of(layout, file: str) -> dict:
    header = layout.headers[file]
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    return json.loads(header[8:])


@pytest.mark.parametrize("limit", [10**9, 60, 1])
def test_the_library_reads_what_was_laid_out(limit):
    """R24: its own reader finds every name, shape and dtype, in files without gaps or overlaps."""
    layout = lay_out(SHAPES, KINDS, "stem", limit)
    found = {}
    for file in layout.files:
        content = content_of(layout, file)
        assert not found.keys() & content.keys()
        found |= content
        assert all(layout.places[name][0] == file for name in content)
        data = sum(len(entry["data"]) for entry in content.values())
        assert len(layout.headers[file]) + data == layout.sizes[file]
        assert data <= limit or sum(len(entry["data"]) > 0 for entry in content.values()) == 1
    assert {name: tuple(entry["shape"]) for name, entry in found.items()} == SHAPES
    assert {name: entry["dtype"] for name, entry in found.items()} == {name: DTYPES[KINDS[name]] for name in KINDS}


def test_one_file_has_a_plain_name_and_several_are_numbered():
    """As transformers names them."""
    assert lay_out(SHAPES, KINDS, "stem", 10**9).files == ["stem.safetensors"]
    files = lay_out(SHAPES, KINDS, "stem", 60).files
    assert files == [f"stem-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1 and lay_out({}, {}, "stem", 60).files == ["stem.safetensors"]


def test_a_planned_place_is_where_the_library_looks(tmp_path):
    """R24: values written at the planned bytes are the values that are read; the metadata says "pt"."""
    layout = lay_out(SHAPES, KINDS, "stem", 10**9)
    content = bytearray(layout.headers["stem.safetensors"].ljust(layout.sizes["stem.safetensors"], b"\0"))
    tensors = {}
    for name, shape in SHAPES.items():
        tensors[name] = torch.arange(1, math.prod(shape) + 1).view(shape).to(KINDS[name])
        _, begin = layout.places[name]
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        content[begin : begin + len(data)] = data
    (tmp_path / "stem.safetensors").write_bytes(content)
    with safe_open(tmp_path / "stem.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


names = st.text(min_size=1, max_size=4).filter(lambda name: name != "__metadata__" and name.isprintable())
tensors = st.dictionaries(names, st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(sorted(
    DTYPES, key=str))), max_size=6)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(tensors, st.integers(1, 200))
def test_whatever_is_laid_out_is_read_and_every_tensor_starts_at_a_multiple_of_its_width(given, limit):
    """R24: other readers map the file and need aligned numbers, whatever order the tensors came in."""
    shapes = {name: tuple(shape) for name, (shape, _) in given.items()}
    dtypes = {name: dtype for name, (_, dtype) in given.items()}
    layout = lay_out(shapes, dtypes, "stem", limit)
    assert layout.places.keys() == given.keys() and layout.dtypes == dtypes
    found = {}
    for file in layout.files:
        header = header_of(layout, file)
        assert header.pop("__metadata__") == {"format": "pt"} and len(layout.headers[file]) % 8 == 0
        found |= content_of(layout, file)
        for name, entry in header.items():
            begin = len(layout.headers[file]) + entry["data_offsets"][0]
            assert layout.places[name] == (file, begin) and begin % dtypes[name].itemsize == 0
    assert {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in found.items()} == {
        name: (shape, DTYPES[dtypes[name]]) for name, shape in shapes.items()
    }


# Handed out row by row


def collecting(shape: tuple, start: tuple, size: tuple, dtype=torch.float32) -> tuple[Sink, list]:
    received = []
    return Sink(shape, dtype, start, size, lambda first, values: received.append((first, values.clone()))), received


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_a_sink_receives_its_part_a_few_rows_at_a_time(tmp_path, monkeypatch, rows_at_once):
    """C41: `first` counts from the start of the part; together the pieces are the part, cut in every dimension."""
    whole = torch.arange(7 * 5 * 4, dtype=torch.float32).view(7, 5, 4)
    save_file({"x": whole, "scalar": torch.tensor(2.5), "y": torch.arange(6)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(slices, "COPIED_AT_ONCE", rows_at_once * 3 * 2 * 4)
    sink, received = collecting((7, 5, 4), (1, 2, 1), (5, 3, 2))
    scalar, received_scalar = collecting((), (), ())
    nothing, received_nothing = collecting((6,), (6,), (0,), torch.int64)
    read_tensors({"x": sink, "scalar": scalar, "y": nothing}, tmp_path)
    assert [first for first, _ in received] == list(range(0, 5, rows_at_once))
    assert torch.equal(torch.cat([values for _, values in received]), whole[1:6, 2:5, 1:3])
    assert received_scalar == [(0, torch.tensor(2.5))] and received_nothing == []


def test_a_sink_of_a_tensor_fills_it_in_place_and_converts(tmp_path):
    """C28: also a scalar and a transposed matrix; one without memory is refused."""
    whole = torch.arange(12, dtype=torch.float32).view(4, 3) / 7
    save_file({"x": whole, "t": whole.clone(), "scalar": torch.tensor(2.5)}, tmp_path / "model.safetensors")
    tensors = {"x": torch.zeros(4, 3, dtype=torch.bfloat16), "t": torch.zeros(3, 4).t(), "scalar": torch.zeros(())}
    read_tensors({name: Sink.of(tensor) for name, tensor in tensors.items()}, tmp_path)
    assert torch.equal(tensors["x"], whole.bfloat16()) and torch.equal(tensors["t"], whole)
    assert tensors["scalar"] == 2.5
    with pytest.raises(ValueError, match="to_empty"):
        read_tensors({"x": torch.empty(4, 3, device="meta")}, tmp_path)


def test_a_sink_is_compared_with_the_file_as_a_tensor_is(tmp_path):
    """R13: by the shape and dtype of the whole, before anything is handed out."""
    save_file({"x": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    for shape, dtype, message in (
        ((4, 4), torch.float32, r"'x' is F32 \[4, 3\], expected F32 \[4, 4\]"),
        ((4, 3), torch.int8, r"'x' is F32 \[4, 3\], expected I8 \[4, 3\]"),
    ):
        sink, received = collecting(shape, (0, 0), shape, dtype)
        with pytest.raises(UserError, match=message):
            read_tensors({"x": sink}, tmp_path)
        assert received == []
