"""Reading a folder that a stranger may have made: only its own files, and only up to a size."""

import json
import os
from pathlib import Path

from llama.boundary.errors import UserError, as_user_error, first_few
from llama.boundary.foreign import refuse_foreign_content

LARGEST_JSON = 64 * 2**20  # bytes; an index of a million tensors fits, a configuration is a thousand times smaller
LARGEST_TEXT = 1 << 20  # characters of a chat template or a card


def inside(folder: Path, name: str, suffix: str, subfolder: str = "") -> Path:
    """The path of this file with links followed. Raises UserError unless it is a file inside `folder`, in which
    `subfolder` is."""
    if not name.isprintable() or "/" in name or "\\" in name or not name.endswith(suffix):
        wanted = f"a plain *{suffix} file name" if suffix else "a plain file name"
        raise UserError(f"{folder}: names {first_few([name])}, expected {wanted}")
    home = Path(os.path.realpath(folder))
    where = folder / subfolder / name
    path = Path(os.path.realpath(where))
    # The hub's cache stores contents in REPO/blobs and links to them from REPO/snapshots/REVISION.
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (path.is_relative_to(home) or path.is_relative_to(blobs)):
        raise UserError(f"{where}: a link to {path}, expected a file inside the folder")
    if not os.path.isfile(path):
        raise UserError(f"{str(where):.300}: is missing or not a file, expected a file of this folder")
    return path


def read_json(folder: str | Path, name: str) -> dict:
    """The object in a JSON file of this folder. Raises UserError for a file that is missing, outside of the folder, too
    large, not JSON, or in which a name comes twice."""
    where = Path(folder) / name
    with as_user_error(where, "a JSON object"), open(inside(Path(folder), name, ".json"), "rb") as file:
        content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise UserError(f"{where}: more than {LARGEST_JSON:,} bytes")
        refuse_foreign_content(where, content)
        values = json.loads(content.decode(), object_pairs_hook=without_repetition)
        if not isinstance(values, dict):
            raise TypeError(f"found {type(values).__name__}")
        return values


def read_text(path: Path) -> str:
    """A small text file of such a folder. Raises UserError for one that is too large, not UTF-8, or known to be
    something else than its name says."""
    with as_user_error(path, "text in UTF-8"), open(path, encoding="utf-8") as file:
        text = file.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise UserError(f"{path}: more than {LARGEST_TEXT:,} characters")
    refuse_foreign_content(path, text.encode())
    return text


def without_repetition(pairs: list) -> dict:
    """A hook for json.loads, which by itself silently keeps the last of two values under one name."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name comes twice")
    return values
