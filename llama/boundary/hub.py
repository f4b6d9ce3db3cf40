"""Everything that may use the network: fetching models and data sets from the Hugging Face hub, into its own cache."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from llama.boundary.errors import UserError


def find_model(name: str) -> Path:
    """A folder as it is, or the downloaded snapshot of a hub id. Raises UserError when `name` is neither."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"--model {name}: no such folder, expected a Hugging Face folder or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model"]
        return Path(snapshot_download(name, allow_patterns=wanted, etag_timeout=10,
                                      local_files_only=not _reachable()))
    except Exception as error:  # its client raises whatever the network library does
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--model {name}: not a folder here, and not to be had from the hub ({reason})") from None


def download_dataset(repo: str, config: str, splits: dict[str, str]) -> dict[str, Path]:
    """The first Parquet file of each split, {our name: path}; the hub keeps every data set also as Parquet.

    `splits` maps our name to the hub's. Raises UserError with the reason where the hub has it not or is out of reach.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = not _reachable()
    try:
        return {
            split: Path(hf_hub_download(repo, f"{config}/{name}/0000.parquet", repo_type="dataset",
                                        revision="refs/convert/parquet", etag_timeout=5, local_files_only=offline))
            for split, name in splits.items()
        }
    except LocalEntryNotFoundError:
        raise UserError(f"the hub, where it is {repo}, cannot be reached") from None
    except Exception as error:  # its client raises whatever the network library does
        raise UserError(f"the hub said: {' '.join(str(error).split())[:200]}") from None


def _reachable() -> bool:
    """Whether the hub answers within seconds: its own client would go on trying for half a minute."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True
