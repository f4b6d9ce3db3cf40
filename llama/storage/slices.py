"""Safetensors files in which each rank reads and writes only its own part of every tensor.

A safetensors file is a JSON header followed by raw tensors, so a slice of a tensor has a known place in the file. Each
rank maps the files into memory and copies its own slices out, or writes its own slices in: no gather, no broadcast, no
copy of the whole anywhere. https://github.com/huggingface/safetensors
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llama.boundary.errors import WeightsError, one_line, some
from llama.boundary.untrusted import inside, read_json_text
from llama.parallel.collectives import first_rank, together, wait_until_visible
from llama.storage.atomic import sync, write_durably

PIECE = 8 * 2**20  # bytes converted and copied at a time: what a rank needs in memory beyond its shard
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
DTYPES = FLOATS | INTEGERS | {torch.bool: "BOOL"}


# Reading


@dataclass(frozen=True)
class Rows:
    """A matrix that is kept in another form: `put` is handed the rows of this rank, as read, some at a time.

    shape of the whole; the rank's `count` rows begin at `start` of the whole, and at 0 for `put(first, rows)`.
    """

    shape: tuple[int, int]
    start: int
    count: int
    put: Callable[[int, Tensor], None]
    dtype: torch.dtype = torch.float32  # this and the next: what `read_tensors` asks of a tensor, too
    is_meta: bool = False


def read_tensors(
    tensors: dict[str, Tensor | Rows],
    folder: Path,
    stem: str = "model",
    allow_unexpected: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fill every tensor, plain or DTensor, in place from `stem`.safetensors or the files that its index names.

    Floating-point values are converted to the tensor's dtype. No communication: each rank reads its own slices.
    Raises WeightsError, before any tensor is changed, for files that are not whole and for names, shapes or dtypes
    that do not match; `allow_unexpected` says which names may be in the files without being asked for.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: give the model memory with to_empty first")
    with ExitStack() as stack:
        found = _matching(tensors, folder, stem, allow_unexpected, stack)
        for name, tensor in tensors.items():
            _read_slice(found[name], tensor)


def check_tensors(
    tensors: dict[str, Tensor | Rows],
    folder: Path,
    stem: str = "model",
    allow_unexpected: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise what `read_tensors` would raise for these tensors, which need no memory yet, and read none."""
    with ExitStack() as stack:
        _matching(tensors, folder, stem, allow_unexpected, stack)


def _matching(tensors: dict, folder: Path, stem: str, allow_unexpected: Callable, stack: ExitStack) -> dict:
    """A lazy view of the file for each name in `tensors`: all are there, nothing else is, and shapes and dtypes fit."""
    found = _open_files(Path(folder), stem, stack)
    problems, missing = [], [name for name in tensors if name not in found]
    if missing:
        problems.append(f"lacks {some(missing)}")
    unexpected = [name for name in found if name not in tensors and not allow_unexpected(name)]
    if unexpected:
        problems.append(f"has {some(unexpected)}, which nothing asks for")
    for name in [name for name in tensors if name in found]:
        shape, dtype = found[name].get_shape(), found[name].get_dtype()
        expected, ours = list(tensors[name].shape), DTYPES[tensors[name].dtype]
        if shape != expected or (dtype != ours and not {dtype, ours} <= set(FLOATS.values())):
            problems.append(f"{some([name])} is {dtype} {shape}, expected {ours} {expected}")
    if problems:
        raise WeightsError(f"{folder}: {'; '.join(problems[:4])}")
    return found


def _open_files(folder: Path, stem: str, stack: ExitStack) -> dict:
    """Map a folder's weights into memory: a lazy view of the file for each tensor's name."""
    files, file_of = [f"{stem}.safetensors"], None
    if not os.path.lexists(folder / files[0]):
        index = f"{stem}.safetensors.index.json"
        if not os.path.lexists(folder / index):
            raise WeightsError(f"{folder}: has neither {files[0]} nor {index}")
        file_of = _read_index(folder, index)
        files = sorted(set(file_of.values()))
    found, found_in = {}, {}
    for file in files:
        path = inside(folder, file, ".safetensors")
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
            views = {name: opened.get_slice(name) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a whole safetensors file ({one_line(error)})") from None
        if twice := found.keys() & views.keys():
            raise WeightsError(f"{path}: has {some(sorted(twice))}, which another file has, too")
        found |= views
        found_in |= dict.fromkeys(views, file)
    if file_of is not None and file_of != found_in:
        differing = sorted({name for name, _ in file_of.items() ^ found_in.items()})
        raise WeightsError(f"{folder}: index and files do not agree on where to find {some(differing)}")
    return found


def _read_index(folder: Path, name: str) -> dict[str, str]:
    """{tensor name: file name} from an index."""

    def without_repetition(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key is repeated")
        return dict(pairs)

    try:
        values = json.loads(read_json_text(folder, name), object_pairs_hook=without_repetition)
        file_of = values["weight_map"]
        if not all(isinstance(file, str) for file in file_of.values()):
            raise TypeError("weight_map must name a file for each tensor")
    except WeightsError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{folder / name}: not an index of safetensors files ({one_line(error)})") from None
    return file_of


def _read_slice(view, tensor: Tensor | Rows) -> None:
    """Copy this rank's part of a tensor, in pieces: converting for another device takes a temporary copy."""
    if isinstance(tensor, Rows):
        step = max(1, PIECE // (4 * tensor.shape[1]))
        for first in range(0, tensor.count, step):
            stop = min(first + step, tensor.count)
            tensor.put(first, view[tensor.start + first : tensor.start + stop])
        return
    local, start = local_slice(tensor)
    if local.ndim == 0:
        local.copy_(view[...])
    elif local.numel():
        for piece in local.split(max(1, PIECE // (local[0].numel() * local.itemsize))):
            piece.copy_(view[region(start, piece)])
            start[0] += len(piece)


# Writing


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor of that shape: `local`, which begins at `start` of the whole."""

    shape: tuple[int, ...]
    local: Tensor
    start: tuple[int, ...]
    is_writer: bool  # whether this rank is the first of those that hold this very part

    @classmethod
    def of(cls, tensor: Tensor) -> "Part":
        local, start = local_slice(tensor)
        writer = first_rank()
        if isinstance(tensor, DTensor):
            replicated = [i for i, placement in enumerate(tensor.placements) if placement.is_replicate()]
            writer = all(tensor.device_mesh.get_local_rank(i) == 0 for i in replicated)
        return cls(tuple(tensor.shape), local, tuple(start), writer)

    def copied(self) -> "Part":
        """The same in memory of its own, in the host's: what is trained may change."""
        return replace(self, local=self.local.to("cpu", copy=True))


def write_tensors(
    tensors: dict[str, Tensor | Part],
    folder: Path,
    stem: str = "model",
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write tensors, plain or DTensor, into `folder`: one `stem`.safetensors, or several files and an index.

    Collective, with the same names in the same order on every rank. Floating-point tensors become `dtype`, where
    given. A file holds at most max_file_bytes of tensors, or a single larger one. On return all is on disk. Raises
    WeightsError, on every rank, if any rank cannot write or a file exists already.
    """
    folder = Path(folder)
    parts = {name: t if isinstance(t, Part) else Part.of(t) for name, t in tensors.items()}
    dtypes = {name: dtype if dtype and p.local.is_floating_point() else p.local.dtype for name, p in parts.items()}
    sizes = {name: math.prod(p.shape) * dtypes[name].itemsize for name, p in parts.items()}
    shares, filled = [[]], 0
    for name, size in sizes.items():
        if shares[-1] and filled + size > max_file_bytes:
            shares.append([])
            filled = 0
        shares[-1].append(name)
        filled += size
    files = {f"{stem}-{i + 1:05d}-of-{len(shares):05d}.safetensors": names for i, names in enumerate(shares)}
    if len(shares) == 1:
        files = {f"{stem}.safetensors": shares[0]}

    headers, begins = {}, {}
    for file, names in files.items():
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in sorted(names, key=lambda name: -dtypes[name].itemsize):  # wide types first: all are aligned
            shape, place = list(parts[name].shape), [end, end + sizes[name]]
            header[name] = {"dtype": DTYPES[dtypes[name]], "shape": shape, "data_offsets": place}
            end += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        begins |= {name: len(headers[file]) + header[name]["data_offsets"][0] for name in names}

    with together(folder, group):  # every file has its full size before any rank writes into it
        if first_rank():
            for file, names in files.items():
                with open(folder / file, "xb") as opened:
                    opened.write(headers[file])
                    opened.truncate(len(headers[file]) + sum(sizes[name] for name in names))
            if len(files) > 1:
                file_of = {name: file for file, names in files.items() for name in names}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
                write_durably(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
            sync(folder)
    with together(folder, group):
        for file, names in files.items():
            mine = [name for name in names if parts[name].is_writer]
            if mine or first_rank():
                wait_until_visible(folder / file)
                with open(folder / file, "r+b", buffering=0) as opened:
                    for name in mine:
                        _write_part(opened, parts[name], dtypes[name], begins[name])
                    os.fsync(opened.fileno())


def _write_part(file, part: Part, dtype: torch.dtype, begin: int) -> None:
    """Write this rank's part of a tensor that begins at byte `begin` of the file, a piece at a time."""
    local, shape = part.local, part.shape
    if not local.numel():
        return
    # A matrix cut by rows is one run of bytes in the file, one cut by columns a run for each row: count through
    # all dimensions before the last that is cut.
    cut = max((i for i in range(local.ndim) if local.shape[i] != shape[i]), default=0)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(s * stride for s, stride in zip(part.start, strides, strict=True))
    steps = [range(0, n * stride, stride) for n, stride in zip(local.shape[:cut], strides, strict=False)]
    runs = [first + sum(offsets) for offsets in product(*steps)]
    rows = local.reshape(len(runs), -1)
    width = min(rows.shape[1], PIECE // dtype.itemsize)
    height = PIECE // (width * dtype.itemsize)
    for top in range(0, len(runs), height):
        for left in range(0, rows.shape[1], width):
            piece = rows[top : top + height, left : left + width].to("cpu", dtype).contiguous()
            for data, run in zip(piece.view(torch.uint8).numpy(), runs[top : top + height], strict=True):
                _write_at(file, data, begin + (run + left) * dtype.itemsize)


def _write_at(file, data, position: int) -> None:
    """Write all bytes of `data` at `position`; the system may take a part at a time."""
    while len(data):
        try:
            written = os.pwrite(file.fileno(), data, position)
        except OSError as error:
            place = f"{len(data):,} bytes at {position:,}"
            raise WeightsError(f"{file.name}: {error.strerror}, writing {place}") from None
        data, position = data[written:], position + written


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by name, as the shards that are trained.

    After a forward without backward FSDP still shows whole copies, rounded to bf16, that no optimizer knows: drop them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def all_finite(model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether no rank holds an infinity or NaN, also once in `dtype`: such weights are never published. Collective."""
    floats = [p for p in sharded_parameters(model).values() if p.is_floating_point()]
    finite = all(bool(local_slice(p)[0].to(dtype or p.dtype).isfinite().all()) for p in floats)
    everyone = [finite]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, finite)
    return all(everyone)


def local_slice(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """This rank's part of a tensor, to be read or changed in place, and where in the whole it starts.

    With tensor parallelism FSDP cuts what is a part already: its _StridedShard stands left of the Shard that was
    made before it. (compute_local_shape_and_global_offset is wrong there for 9 rows on 4 x 2 ranks.)
    """
    start, size = [0] * tensor.ndim, list(tensor.shape)
    if not isinstance(tensor, DTensor):
        return tensor.detach(), start
    cuts = [(i, placement) for i, placement in enumerate(tensor.placements) if hasattr(placement, "dim")]
    strided = [cut for cut in cuts if hasattr(cut[1], "split_factor")]
    for i, placement in [cut for cut in cuts if cut not in strided] + strided[::-1]:
        chunk = -(-size[placement.dim] // tensor.device_mesh.size(i))
        before = min(tensor.device_mesh.get_local_rank(i) * chunk, size[placement.dim])
        start[placement.dim] += before
        size[placement.dim] = min(chunk, size[placement.dim] - before)
    with torch.no_grad():
        local = tensor.detach().to_local()
    if list(local.shape) != size:
        raise ValueError(f"{tensor.placements} of {list(tensor.shape)} gives {list(local.shape)}, not {size}")
    return local, start


def region(start: Sequence[int], part: Tensor) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(start, part.shape, strict=True))
