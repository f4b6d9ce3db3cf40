"""Where each tensor, and each rank's part of it, will lie in safetensors files. A plan only: nothing touches a disk.

A safetensors file is the length of its header (8 bytes), the header in JSON, then the tensors, end to end.
https://github.com/huggingface/safetensors
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from llama.parallel.shards import Part

FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
DTYPES = FLOATS | INTEGERS | {torch.bool: "BOOL"}


@dataclass(frozen=True)
class Layout:
    """Where everything will lie: for each file its header and its size, for each tensor its file and first byte."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, tuple[str, int]]
    dtypes: dict[str, torch.dtype]

    @property
    def files(self) -> list[str]:
        return list(self.headers)


def lay_out(
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    stem: str,
    max_file_bytes: int,
) -> Layout:
    """Plan files of at most max_file_bytes of tensors each, or a single larger one. Touches no disk."""
    bytes_of = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shares: list[list[str]] = [[]]
    filled = 0
    for name, size in bytes_of.items():
        if shares[-1] and filled + size > max_file_bytes:
            shares.append([])
            filled = 0
        shares[-1].append(name)
        filled += size
    headers, sizes, places = {}, {}, {}
    for number, names in enumerate(shares, 1):
        numbered = f"-{number:05d}-of-{len(shares):05d}" if len(shares) > 1 else ""
        file = f"{stem}{numbered}.safetensors"
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda name: -dtypes[name].itemsize):  # wide types first: all are aligned
            begin, end = end, end + bytes_of[name]
            header[name] = {
                "dtype": DTYPES[dtypes[name]],
                "shape": list(shapes[name]),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + end
        for name in names:
            places[name] = (file, len(headers[file]) + header[name]["data_offsets"][0])
    return Layout(headers, sizes, places, dtypes)


def lay_out_parts(parts: Mapping[str, Part], stem: str, dtype: torch.dtype | None, max_file_bytes: int) -> Layout:
    """The same for tensors of which this rank has these parts: every rank plans the same. Floats become `dtype`, where
    given."""
    shapes, dtypes = {}, {}
    for name, part in parts.items():
        shapes[name] = part.shape
        dtypes[name] = dtype if dtype and part.local.is_floating_point() else part.local.dtype
    return lay_out(shapes, dtypes, stem, max_file_bytes)


def blocks_of(part: Part, at_once: int) -> Iterator[tuple[Tensor, list[int]]]:
    """A part in blocks of at most `at_once` numbers, each with the places at which its rows begin, counted in numbers
    from the start of the whole tensor.

    A tensor lies in a file row after row. A part that was cut by rows is one run of numbers in the file; a part that
    was cut by columns is one run in each row:

        by rows   . . . . . .        by columns   . . # # . .
                  # # # # # #                     . . # # . .
                  # # # # # #                     . . # # . .
                  . . . . . .                     . . # # . .
    """
    local, shape = part.local, part.shape
    if not local.numel():
        return
    # Runs are counted through all dimensions before the last one that is cut.
    cuts = [i for i in range(local.ndim) if local.shape[i] != shape[i]]
    last_cut = max(cuts, default=0)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first_number = sum(start * stride for start, stride in zip(part.start, strides, strict=True))
    steps = []
    for n, stride in zip(local.shape[:last_cut], strides, strict=False):
        steps.append(range(0, n * stride, stride))
    run_starts = [first_number + sum(offsets) for offsets in product(*steps)]
    runs = local.reshape(len(run_starts), -1)
    # A block is several short runs, or a piece of a long one.
    width = min(runs.shape[1], at_once)
    height = at_once // width
    for top in range(0, len(run_starts), height):
        for left in range(0, runs.shape[1], width):
            starts = [start + left for start in run_starts[top : top + height]]
            yield runs[top : top + height, left : left + width], starts
