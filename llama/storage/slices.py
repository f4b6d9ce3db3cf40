"""Safetensors files in which each rank reads and writes only its own part of every tensor.

A safetensors file is a JSON header followed by raw tensors, so a slice of a tensor has a known place in the file. Each
rank maps the files into memory and copies its own slices out, or writes its own slices in: no gather, no broadcast, no
copy of the whole anywhere. https://github.com/huggingface/safetensors
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.boundary.durable import sync, write_durably
from llama.boundary.errors import UserError, first_few, one_line
from llama.boundary.foreign import refuse_foreign_file
from llama.boundary.progress import Progress
from llama.boundary.untrusted import inside
from llama.parallel.collectives import fail_together, is_rank_zero, wait_until_visible
from llama.parallel.shards import Part, local_slice, whole_shape
from llama.storage.layout import DTYPES, FLOATS, Layout, blocks_of, lay_out_parts
from llama.storage.weight_files import weight_files

COPIED_AT_ONCE = 8 * 2**20  # bytes converted and copied at a time: what a rank needs in memory beside its shard


# Reading


@dataclass(frozen=True)
class Sink:
    """Where a tensor of a file goes: `put(first, values)` receives this rank's part, a few of its rows at a time.

    shape and dtype are those of the whole tensor. This rank's part has the shape `size` and starts at `start` of the
    whole; `first` counts from 0 at the start of the part.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: tuple[int, ...]
    size: tuple[int, ...]
    put: Callable[[int, Tensor], object]

    @classmethod
    def of(cls, tensor: Tensor) -> "Sink":
        """Copies into a tensor, plain or DTensor, in place. One on the meta device takes what it is given and keeps
        nothing: a plan of what would be read."""
        local, start = local_slice(tensor)

        def put(first: int, values: Tensor) -> None:
            target = local[first : first + len(values)] if local.ndim else local
            target.copy_(values)

        return cls(whole_shape(tensor), tensor.dtype, tuple(start), tuple(local.shape), put)


Accepts = Callable[[str], object]  # True for the name of a tensor that a file may hold although it is not read


def read_tensors(
    tensors: Mapping[str, Tensor | Sink],
    folder: Path,
    stem: str = "model",
    allow_unexpected: Accepts = lambda name: False,
) -> None:
    """Fill every tensor in place from `stem`.safetensors, or from the files that its index names.

    Floating-point values are converted to the tensor's dtype. No communication: each rank reads its own slices. Raises
    UserError, before any tensor is changed, for files that are not whole and for names, shapes or dtypes that do not
    match. `allow_unexpected` says which names the files may hold beside those asked for.
    """
    sinks = {}
    for name, target in tensors.items():
        if isinstance(target, Tensor) and target.is_meta:
            raise ValueError(f"{name} is on the meta device: give the model memory with to_empty first")
        sinks[name] = target if isinstance(target, Sink) else Sink.of(target)
    with ExitStack() as stack:
        found = _matching(sinks, folder, stem, allow_unexpected, stack)
        progress = Progress(f"reading {folder}", f"tensors of {stem}", len(sinks), silent=not is_rank_zero())
        for name, sink in progress.over(sinks.items()):
            _read_part(found[name], sink)


def check_tensors(
    tensors: Mapping[str, Tensor], folder: Path, stem: str = "model", allow_unexpected: Accepts = lambda name: False
) -> dict[str, torch.dtype]:
    """Raise what `read_tensors` would raise for these tensors, but read none: they may be on the meta device. Returns
    the dtypes in which the files hold them."""
    with ExitStack() as stack:
        found = _matching(tensors, folder, stem, allow_unexpected, stack)
        by_name = {text: dtype for dtype, text in DTYPES.items()}
        return {name: by_name[found[name].get_dtype()] for name in tensors}


def tensor_names(folder: Path, stem: str = "model") -> set[str]:
    """The names of all tensors in the files."""
    with ExitStack() as stack:
        return set(_open_files(Path(folder), stem, stack))


def differ(folder: Path, first: str, second: str, stem: str = "model") -> bool:
    """Whether the files hold both tensors, with other shapes or values. Reads a few rows at a time, up to the first
    difference."""
    with ExitStack() as stack:
        found = _open_files(Path(folder), stem, stack)
        if first not in found or second not in found:
            return False
        views = found[first], found[second]
        shape = views[0].get_shape()
        kinds = {view.get_dtype() for view in views}
        if views[1].get_shape() != shape or len(kinds) > 1 or not kinds <= set(FLOATS.values()) or not shape:
            return True
        at_once = max(1, COPIED_AT_ONCE // max(1, 4 * math.prod(shape[1:])))
        for begin in range(0, shape[0], at_once):
            if not torch.equal(views[0][begin : begin + at_once], views[1][begin : begin + at_once]):
                return True
        return False


def _matching(wanted: Mapping, folder: Path, stem: str, allow_unexpected: Accepts, stack: ExitStack) -> dict:
    """A lazy view of the file for each wanted name. All must be there, and nothing else; shapes and dtypes must fit."""
    found = _open_files(Path(folder), stem, stack)
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted and not allow_unexpected(name)]
    problems = []
    if missing:
        problems.append(f"lacks {first_few(missing)}")
    if unexpected:
        problems.append(f"has {first_few(unexpected)}, which nothing asks for")
    for name, tensor in wanted.items():
        if name not in found:
            continue
        shape, dtype = found[name].get_shape(), found[name].get_dtype()
        both_floats = {dtype, DTYPES[tensor.dtype]} <= set(FLOATS.values())
        if shape != list(tensor.shape) or (dtype != DTYPES[tensor.dtype] and not both_floats):
            expected = f"{DTYPES[tensor.dtype]} {list(tensor.shape)}"
            problems.append(f"{first_few([name])} is {dtype} {shape}, expected {expected}")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems[:4])}")
    return found


def _open_files(folder: Path, stem: str, stack: ExitStack) -> dict:
    """Map a folder's weights into memory: a lazy view of the file for each tensor's name."""
    files, file_of = weight_files(folder, stem)
    found: dict = {}
    found_in: dict[str, str] = {}
    for file in files:
        path = inside(folder, file, ".safetensors")
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
            views = {name: opened.get_slice(name) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            refuse_foreign_file(path, is_binary=True)
            raise UserError(f"{path}: not a whole safetensors file ({one_line(error)})") from None
        twice = found.keys() & views.keys()
        if twice:
            raise UserError(f"{path}: has {first_few(sorted(twice))}, and so has another file")
        found |= views
        found_in |= dict.fromkeys(views, file)
    if file_of is not None and file_of != found_in:
        differing = sorted({name for name, _ in file_of.items() ^ found_in.items()})
        raise UserError(f"{folder}: index and files do not agree on where to find {first_few(differing)}")
    return found


def _read_part(view, sink: Sink) -> None:
    """Copy this rank's part of a tensor, a few rows at a time: a conversion takes a temporary copy."""
    if not sink.shape:
        sink.put(0, view[...])
        return
    if 0 in sink.size:
        return
    row_bytes = math.prod(sink.size[1:]) * sink.dtype.itemsize
    at_once = max(1, COPIED_AT_ONCE // row_bytes)
    columns = []
    for start, size in zip(sink.start[1:], sink.size[1:], strict=True):
        columns.append(slice(start, start + size))
    for first in range(0, sink.size[0], at_once):
        stop = min(first + at_once, sink.size[0])
        rows = slice(sink.start[0] + first, sink.start[0] + stop)
        sink.put(first, view[(rows, *columns)])


# Writing


def write_tensors(
    tensors: Mapping[str, Tensor | Part],
    folder: Path,
    stem: str = "model",
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write tensors, plain or DTensor, into `folder`: one `stem`.safetensors, or several files and an index.

    Collective, with the same names in the same order on every rank. Floating-point tensors become `dtype`, where
    given. On return all is on disk. Raises UserError, on every rank, if any rank cannot write or a file exists already.
    """
    folder = Path(folder)
    parts = {}
    for name, source in tensors.items():
        parts[name] = source if isinstance(source, Part) else Part.of(source)
    layout = lay_out_parts(parts, stem, dtype, max_file_bytes)
    with fail_together(folder, group):  # every file has its full size before any rank writes into it
        if is_rank_zero():
            _create(folder, layout, stem)
    with fail_together(folder, group):
        _fill(folder, layout, parts)


def _create(folder: Path, layout: Layout, stem: str) -> None:
    """Make every file in its full size, with its header, and the index where there are several."""
    for file, header in layout.headers.items():
        with open(folder / file, "xb") as opened:
            opened.write(header)
            opened.truncate(layout.sizes[file])
    if len(layout.files) > 1:
        total = sum(layout.sizes[file] - len(layout.headers[file]) for file in layout.files)
        weight_map = {name: file for name, (file, _) in layout.places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_durably(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    sync(folder)


def _fill(folder: Path, layout: Layout, parts: dict[str, Part]) -> None:
    """Write this rank's part of every tensor."""
    for file in layout.files:
        names = []
        for name, (place, _) in layout.places.items():
            if place == file and parts[name].local.numel():
                names.append(name)
        if not names and not is_rank_zero():  # rank 0 has written the header, and must force it to disk
            continue
        wait_until_visible(folder / file)
        with open(folder / file, "r+b", buffering=0) as opened:
            for name in names:
                _write_part(opened, parts[name], layout.dtypes[name], layout.places[name][1])
            os.fsync(opened.fileno())


def _write_part(file, part: Part, dtype: torch.dtype, begin: int) -> None:
    """Write this rank's part of a tensor that begins at byte `begin` of the file. Converts one block at a time."""
    for block, starts in blocks_of(part, COPIED_AT_ONCE // dtype.itemsize):
        converted = block.to("cpu", dtype).contiguous()
        for data, start in zip(converted.view(torch.uint8).numpy(), starts, strict=True):
            _write_at(file, data, begin + start * dtype.itemsize)


def _write_at(file, data, position: int) -> None:
    """Write all bytes of `data` at `position`. One call of the system may write only a part of them."""
    while len(data):
        try:
            written = os.pwrite(file.fileno(), data, position)
        except OSError as error:
            place = f"{len(data):,} bytes at {position:,}"
            raise UserError(f"{file.name}: {error.strerror}, writing {place}") from None
        data, position = data[written:], position + written
