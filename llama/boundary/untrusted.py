"""A folder that a stranger may have made: only files that are its own are read, and only so much of them."""

import os
from pathlib import Path

from llama.boundary.errors import WeightsError, some

LARGEST_JSON = 64 * 2**20  # bytes: an index of a million tensors; a configuration is a thousand times smaller


def inside(folder: Path, name: str, suffix: str) -> Path:
    """`folder/name` with links followed. Raises WeightsError unless that is a file of this very folder."""
    if not name.isprintable() or "/" in name or "\\" in name or not name.endswith(suffix):
        wanted = f"a plain *{suffix} file name" if suffix else "a plain file name"
        raise WeightsError(f"{folder}: names {some([name])}, expected {wanted}")
    home, path = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    # The hub's cache keeps contents in REPO/blobs and links to them from REPO/snapshots/REVISION.
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (path.is_relative_to(home) or path.is_relative_to(blobs)):
        raise WeightsError(f"{folder / name}: a link to {path}, expected a file inside the folder")
    if not os.path.isfile(path):
        raise WeightsError(f"{str(folder / name):.300}: is missing or not a file, expected one of this folder")
    return path


def read_json_text(folder: Path, name: str) -> str:
    """The text of a JSON file of this folder. Raises WeightsError for one that is missing, too long or elsewhere, and
    UnicodeDecodeError, a ValueError as bad JSON is, for one that is no text."""
    path = inside(folder, name, ".json")
    with open(path, "rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise WeightsError(f"{folder / name}: more than {LARGEST_JSON:,} bytes")
    return content.decode()
