"""Which checkpoints a run has, and what each says of itself.

    checkpoints/step-000100/
        model.safetensors         trained weights in fp32, under Hugging Face names without the prefix
        optimizer.safetensors     both moments of AdamW
        manifest.json             step, counts, what a resumed run must share, size and digest of each file

A name that ends otherwise is not a checkpoint: .tmp is still being written, .deleting is being deleted, and .aside is
newer than the checkpoint that a run went back to.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from llama.boundary.choices import QUANTIZED
from llama.boundary.errors import UserError, as_user_error
from llama.boundary.records import read_record, setting
from llama.boundary.untrusted import inside, read_json
from llama.parallel.collectives import fail_together, is_rank_zero
from llama.storage.atomic import digests

NAME = re.compile(r"step-(\d{6,9})")
MANIFEST = "manifest.json"
PIN = "keep"  # anybody may put a file of this name into a checkpoint's folder, to keep it from deletion


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    `identity` is what a run must share to continue from here; `totals` what the run has counted so far; `held_out` its
    metrics on held-out data at this step (empty: not measured); `files` size and digest of each file; `version` that of
    the code that wrote it (empty: before versions were counted).
    """

    step: int = setting(at_least=0)
    ranks: int = setting(at_least=1)
    identity: dict = setting()
    totals: dict = setting()
    held_out: dict = setting()
    files: dict = setting()
    version: str = setting("")

    def __post_init__(self):
        for file in self.files.values():
            if {name: type(value) for name, value in file.items()} != {"bytes": int, "sha256": str}:
                raise ValueError("files without size and digest")
        numbers = [*self.totals.values(), *self.held_out.values()]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError("a count is not a number")
        if self.totals.get("seconds", 1) <= 0:
            raise ValueError("it took no time")

    def origin(self, where: Path) -> "Origin":
        """What the run was. Raises UserError where the identity does not say it."""
        return read_record(Origin, {entry.name: self.identity.get(entry.name) for entry in fields(Origin)}, where)

    def to_text(self) -> str:
        """The content of manifest.json, which holds a digest of itself. There the identity is called `settings`."""
        content = {
            "version": self.version,
            "step": self.step,
            "ranks": self.ranks,
            "settings": self.identity,
            "totals": self.totals,
            "held_out": self.held_out,
            "files": self.files,
        }
        content = json.loads(json.dumps(content))  # as it reads back: no tuples, and no keys but strings
        return json.dumps(content | {"sha256": _digest(content)}, indent=2) + "\n"


@dataclass(frozen=True)
class Origin:
    """What must be known of a run to use its weights: its --model and a hash of that one's weights (None: random ones,
    drawn from `seed`), what the frozen linears were rounded to, what was trained, and of what shape an adapter is."""

    model: str = setting()
    seed: int = setting(at_least=0)
    quantize: str = setting(choices=("none", *QUANTIZED))
    train_layers: str = setting()
    base: str | None = setting(None)
    lora: dict | None = setting(None)


def read_manifest(path: Path) -> Manifest:
    """Raises UserError for a manifest that is missing, damaged, or of another checkpoint."""
    where = path / MANIFEST
    try:
        content = read_json(path, MANIFEST)
        with as_user_error(where):
            if content.pop("sha256", None) != _digest(content):
                raise ValueError("its own digest differs")
            if "identity" in content:
                raise ValueError("has both settings and identity")
            content["identity"] = content.pop("settings")
        manifest = read_record(Manifest, content, where)
        if manifest.step != step_of(path):
            raise UserError(f"{where}: step is {manifest.step}, expected {step_of(path)}")
    except UserError as error:
        found = str(error).removeprefix(f"{where}: ")
        raise UserError(f"{where}: damaged ({found}); {_way_back(path)}") from None
    return manifest


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoint_at(path: str | Path) -> Path | None:
    """The folder of a checkpoint that a path leads to; None for any other, such as a model that has such a name."""
    named = Path(path)
    is_plain = NAME.fullmatch(named.name) and len(named.parents) > 1
    found = named if is_plain else Path(os.path.realpath(named))
    is_other = any((found / name).exists() for name in ("config.json", "adapter_config.json"))
    return found if NAME.fullmatch(found.name) and found.is_dir() and not is_other else None


def published(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find(folder: Path, wanted: str) -> Path | None:
    """The checkpoint to continue from: the "newest", None where there is none, or a named one, such as step-100.

    A newest one that is damaged is refused when it is read: to go back to an older one is the user's decision. Raises
    UserError where the named one is not there.
    """
    found = published(folder)
    if wanted == "newest":
        return found[-1] if found else None
    number = re.fullmatch(r"step-(\d{1,9})", wanted)
    for path in found:
        if number and step_of(path) == int(number[1]):
            return path
    names = ", ".join(path.name for path in found) or "none"
    raise UserError(f"{folder}: has no checkpoint {wanted!r:.40}; expected one of these: {names}")


def best(found: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss among those where it was measured, the later one of equals."""
    losses = {}
    for path in found:
        try:
            held_out = read_manifest(path).held_out
        except UserError:
            continue  # a damaged one is reported when somebody wants to use it
        if "loss" in held_out:
            losses[path] = held_out["loss"]
    return min(reversed(losses), key=lambda path: losses[path], default=None)


def compare(path: Path, saved: dict, identity: dict, allowed: str = "") -> None:
    """Raises UserError, naming each difference and the way out, where a run's identity is not that of the checkpoint.

    `allowed`: names of settings, with commas, that may differ.
    """
    tolerated = {name for name in allowed.split(",") if name}
    unknown = tolerated - identity.keys()
    if unknown:
        raise UserError(
            f"--allow_changed {','.join(sorted(unknown))!r:.100}: expected names among {', '.join(sorted(identity))}"
        )
    found = differences(saved, identity)
    if found.keys() - tolerated:
        told = "; ".join(text for name, text in found.items() if name not in tolerated)
        names = ",".join(sorted(found.keys() | tolerated))
        raise UserError(
            f"{path}: made with other settings: {told}; to go on with the new ones, add --allow_changed {names}; or "
            "give the old ones, or start a new run in another --output without --resume"
        )


def differences(saved: dict, identity: dict) -> dict[str, str]:
    """{name: "NAME was X, is Y"} for each name whose value is not the same in both."""
    return {
        name: f"{name} was {saved.get(name)!r:.200}, is {identity.get(name)!r:.200}"
        for name in sorted(saved.keys() | identity.keys())
        if saved.get(name) != identity.get(name)
    }


def verify(path: Path, manifest: Manifest, stem: str = "") -> None:
    """Read every file of a checkpoint whose name begins with `stem`, and compare it with the manifest. Collective;
    ranks share the work.

    Raises UserError, on every rank, naming a file that is missing, cut, changed or not in the manifest.
    """
    wanted = sorted(name for name in manifest.files if name.startswith(stem))
    try:
        with fail_together(path):
            if is_rank_zero():  # on a shared disk other ranks may see the files later
                for name in wanted:
                    inside(path, name, "")
            more = {p.name for p in path.iterdir() if ".safetensors" in p.name} - manifest.files.keys()
            if more:
                raise UserError(f"{path / min(more)}: not in the manifest")
        found = digests(path, wanted)
    except UserError as error:
        raise UserError(f"{error}; {_way_back(path)}") from None
    for name, file_found in found.items():
        if file_found != manifest.files[name]:
            sizes = "; expected ".join(
                f"{file['bytes']:,} bytes, digest {file['sha256']:.12}" for file in (file_found, manifest.files[name])
            )
            raise UserError(f"{path / name}: damaged: {sizes}; {_way_back(path)}")


def _way_back(path: Path) -> str:
    older = [p.name for p in published(path.parent) if step_of(p) < step_of(path)]
    if older:
        return f"the one before it is {older[-1]} (a run continues from it with --resume {older[-1]})"
    return "there is no older checkpoint"
