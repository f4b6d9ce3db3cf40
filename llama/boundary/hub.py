"""The only file that may use the network: models and data sets from the Hugging Face hub, into the hub's own cache."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from llama.boundary.errors import UserError, one_line

MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]


def find_model(name: str) -> Path:
    """A local folder as it is, or the downloaded snapshot of a hub id. Raises UserError when `name` is neither."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"--model {name}: no such folder, expected a Hugging Face folder or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=MODEL_FILES, etag_timeout=10, local_files_only=not _is_reachable()
            )
        )
    except Exception as error:  # the hub's client lets any error of its network library through
        raise UserError(f"--model {name}: not a folder here, and the hub did not give it ({one_line(error)})") from None


def download_dataset(repo: str, config: str, splits: dict[str, str]) -> dict[str, tuple[Path, ...]]:
    """The Parquet files of each split in order, {our name: paths}. The hub keeps every data set also as Parquet.

    `splits` maps our name of a split to the hub's. Raises UserError with the reason where the hub does not have it or
    cannot be reached.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return {split: _download_split(repo, f"{config}/{name}") for split, name in splits.items()}
    except LocalEntryNotFoundError:
        raise UserError(f"the hub, which has {repo}, cannot be reached") from None
    except Exception as error:  # the hub's client lets any error of its network library through
        raise UserError(f"the hub said: {one_line(error)}") from None


def _download_split(repo: str, folder: str) -> tuple[Path, ...]:
    """The files 0000.parquet, 0001.parquet, ... The first is downloaded last: where it is, all the others are, too, and
    without the hub nobody else says how many there are."""
    from huggingface_hub import HfApi, hf_hub_download

    where: dict = {"repo_type": "dataset", "revision": "refs/convert/parquet"}
    first = f"{folder}/0000.parquet"
    is_offline = not _is_reachable()
    if not is_offline:
        found = HfApi().list_repo_tree(repo, folder, **where)
        names = sorted(entry.path for entry in found if entry.path.endswith(".parquet"))
        for name in reversed(names):
            hf_hub_download(repo, name, etag_timeout=5, **where)
    path = Path(hf_hub_download(repo, first, etag_timeout=5, local_files_only=is_offline, **where))
    return tuple(sorted(path.parent.glob("*.parquet")))


def _is_reachable() -> bool:
    """Whether the hub answers within 5 seconds. Its own client would retry for half a minute."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True
