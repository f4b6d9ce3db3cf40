"""Checkpoints of a small model, for tests of whatever reads them."""

import json
from pathlib import Path

import torch
from torch import nn

from llama.storage.checkpoint import Saver
from llama.storage.manifest import _digest
from llama.training.optim import build_adamw
from llama.training.state import training_state

SETTINGS = {"data": "imdb", "lora": {"rank": 8, "targets": ["q_proj"]}}
TOTALS = {"examples": 3, "seconds": 0.25}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))


def small_state(model: nn.Module | None = None) -> dict:
    """What a checkpoint keeps of a model and its optimizer."""
    model = model or small_model()
    return training_state(model, build_adamw(model, 0.1, 0.0))


def saved(folder: Path, steps: list[int], keep: int = -1, losses: dict | None = None, background: bool = False) -> Path:
    """Checkpoints of these steps; after each the weights grow by 1. Returns the folder."""
    model = small_model()
    optimizer, saver = build_adamw(model, 0.1, 0.0), Saver(folder, keep, background)
    for step in steps:
        held_out = {"loss": losses[step], "n": 8} if losses and step in losses else {}
        saver.save(step, training_state(model, optimizer), SETTINGS, TOTALS, held_out)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
    saver.wait()
    return folder


def rewrite(path: Path, change) -> None:
    """A manifest that somebody changed, with a digest that fits."""
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    change(content)
    (path / "manifest.json").write_text(json.dumps(content | {"sha256": _digest(content)}))
