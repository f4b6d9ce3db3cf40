"""Where each tensor will lie in safetensors files. A plan only: nothing here touches a disk.

A safetensors file is the length of its header (8 bytes), the header in JSON, then the tensors, end to end.
https://github.com/huggingface/safetensors
"""

import json
import math
from dataclasses import dataclass

import torch

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
