"""The checkpoints of a run: list them, verify them, or export one as a model or adapter.

    python checkpoints.py list RUN                      name, size and held-out loss of each
    python checkpoints.py verify RUN                    read every byte and compare it with the manifest
    python checkpoints.py export RUN OUT [--step NAME]  write the model or adapter of one checkpoint
                                [--dtype float32]       (a model in another dtype than its base's)
"""

from llama.boundary.command_line import announce, run
from llama.storage.settings import parse_command

if __name__ == "__main__":  # --help and mistyped flags need not wait until torch is imported
    run(lambda: parse_command(__doc__))

from argparse import Namespace
from pathlib import Path

import torch

from llama.boundary.errors import UserError, as_user_error, one_line
from llama.parallel.distribute import distribute, on_meta
from llama.parallel.processes import join
from llama.storage.base import Base
from llama.storage.manifest import PIN, best, find, published, read_manifest, verify
from llama.storage.peft import adapter_of_checkpoint, save_adapter
from llama.storage.pretrained import export_model
from llama.training.model_card import companions_of_checkpoint
from lora import Changes


def main() -> None:
    asked = parse_command(__doc__)
    found = published(asked.run / "checkpoints")
    if not found:
        raise UserError(f"{asked.run}: has no checkpoint, expected the folder of a run, such as runs/imdb-tiny")
    if asked.command == "list":
        print(listing(asked.run))
    elif asked.command == "verify":
        verify_all([chosen(asked, found)] if asked.step else found)
    else:
        export(chosen(asked, found), asked.out, asked.model, asked.dtype)


def chosen(asked: Namespace, found: list[Path]) -> Path:
    """The checkpoint that --step names."""
    if asked.step == "best":
        path = best(found)
        if path is None:
            raise UserError(f"{asked.run}: no checkpoint has a held-out loss: the run had no --eval_every")
        return path
    path = find(asked.run / "checkpoints", asked.step or "newest")
    assert path is not None  # only where there is no checkpoint at all
    return path


def listing(folder: Path) -> str:
    """A line for each checkpoint of a run: its name, size, held-out loss, and what keeps it from deletion."""
    found = published(folder / "checkpoints")
    lowest_loss = best(found)
    lines = []
    for path in found:
        marks = {"newest": path == found[-1], "best": path == lowest_loss, "pinned": (path / PIN).exists()}
        try:
            manifest = read_manifest(path)
            size = sum(file["bytes"] for file in manifest.files.values())
            words = [f"{size / 1e6:,.1f} MB", f"written by {manifest.ranks} rank{'s' * (manifest.ranks > 1)}"]
            words += [f"{name} {value:.4g}" for name, value in manifest.held_out.items()]
            words += [word for word, is_so in marks.items() if is_so]
        except UserError as error:
            words = [one_line(error)]
        lines.append("  ".join([path.name, *words]))
    for path in sorted((folder / "checkpoints").glob("step-*")):
        if path not in found:
            lines.append(f"{path.name}  not a checkpoint: unfinished or set aside")
    return "\n".join(lines)


def verify_all(paths: list[Path]) -> None:
    """Say of each whether it is whole. Raises UserError for the last one that is not."""
    damaged = None
    for path in paths:
        try:
            verify(path, read_manifest(path))
            print(f"{path.name} is whole")
        except UserError as error:
            damaged = error
            print(f"{path.name} is damaged")
    if damaged:
        raise damaged


def export(saved: Path, out: Path, moved_base: str | None, dtype_name: str | None = None) -> None:
    """Write the weights of a checkpoint as the end of a run does: as a model that transformers opens, or an adapter
    that PEFT opens.

    The base model is needed for its tokenizer and its frozen weights. `moved_base`: its folder, if it is no longer
    where the run found it. `dtype_name`: of a model's weights; an adapter's stay float32.
    """
    manifest = read_manifest(saved)
    origin = manifest.origin(saved)
    adapter = adapter_of_checkpoint(saved) if origin.lora else None
    base = Base.of_checkpoint(saved, moved=moved_base)
    dtype = getattr(torch, dtype_name) if dtype_name else base.dtype
    changes = Changes(origin.quantize, adapter, origin.train_layers, adapter_folder=str(saved) if adapter else None)
    model = on_meta(base.config)
    with as_user_error(saved, "a manifest that says what the run was"):
        changes.apply(model)
    announce(base.notes)
    if adapter and dtype_name not in (None, "float32"):
        raise UserError(f"--dtype {dtype_name}: {saved} is of an adapter, which is kept in float32")
    beside = companions_of_checkpoint(saved.parents[1], base, manifest)
    if beside.card is None:
        announce([f"{saved.parents[1] / 'run.json'}: does not say how prompts were made: no model card"])
    with join() as process:
        distribute(model, process, torch.float32)
        if adapter:  # its base is not read, because it is not written
            changes.load(model)
            save_adapter(model, out, adapter, base.name, beside)
        else:
            base.load(model)
            export_model(model, out, base.config_json, beside, dtype)
        rounded = "" if adapter else f"; {base.about_export(model, dtype)}"
        if process.is_rank_zero:
            print(f"{out}: {'the adapter' if adapter else 'the model'} after step {manifest.step}{rounded}")


if __name__ == "__main__":
    run(main)
