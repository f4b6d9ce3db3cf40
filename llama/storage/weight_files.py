"""Which files of a folder hold its weights: one `stem`.safetensors, or those that its index names."""

import os
from pathlib import Path

from llama.boundary.errors import UserError, as_user_error, first_few
from llama.boundary.foreign import described_folder
from llama.boundary.untrusted import read_json


def weight_files(folder: Path, stem: str = "model") -> tuple[list[str], dict[str, str] | None]:
    """The names of these files, and what the index says ({tensor: file}; None: there is no index).

    Raises UserError for a folder without weights that says what it has instead, and for an index that is damaged.
    """
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if os.path.lexists(folder / single):
        return [single], None
    if os.path.lexists(folder / index):
        file_of = _read_index(folder, index)
        return sorted(set(file_of.values())), file_of
    raise UserError(f"{folder}: has neither {single} nor {index}{described_folder(folder, stem)}")


def _read_index(folder: Path, name: str) -> dict[str, str]:
    """{tensor name: file name} from an index."""
    with as_user_error(folder / name, "an index of safetensors files"):
        file_of = read_json(folder, name)["weight_map"]
        if not all(isinstance(file, str) for file in file_of.values()):
            raise TypeError("weight_map does not name a file for each tensor")
        return file_of


def unused_files(folder: Path, stem: str = "model") -> list[str]:
    """A sentence on files of weights in the folder that are not read; none where all are."""
    used, _ = weight_files(folder, stem)
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
    return [f"{folder}: not used: {first_few(others)}"] if others else []
