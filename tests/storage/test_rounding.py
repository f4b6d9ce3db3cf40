"""The part of a training that an export's dtype loses is measured against the base's files, on any number of ranks."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import ODD
from safetensors.torch import load_file
from sharded import build, this_process

from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama
from llama.parallel.shards import local_slice, region
from llama.storage.base import TINY_TOKENIZER, Base
from llama.storage.companions import Companions
from llama.storage.config_json import config_to_json
from llama.storage.pretrained import export_model, initialize_weights, load_weights
from llama.storage.rounding import LARGE, Rounding, rounding_of_training

CONFIG = replace(ODD, vocab_size=1283, tie_word_embeddings=True)


@pytest.fixture
def base(tmp_path) -> Path:
    """A pretrained folder in bf16."""
    model = Llama(CONFIG)
    initialize_weights(model, 0)
    export_model(model, tmp_path / "base", config_to_json(CONFIG), Companions(load_tokenizer(TINY_TOKENIZER).files))
    return tmp_path / "base"


def train_and_export(folder: Path, out: Path, size: float, vanish: bool = False) -> str:
    """Change the weights of all but the first layer by about `size`; what is said of the export."""
    base = Base.pretrained(str(folder))
    model = build(base.config, this_process(), change=lambda model: model.layers[0].requires_grad_(False))
    load_weights(model, folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            local, start = local_slice(parameter)
            noise = torch.randn(parameter.shape, generator=generator)[region(start, local)]
            local.add_(size * noise if parameter.requires_grad else 0.0)
    export_model(model, out, base.config_json, dtype=torch.float32, replace=True)
    export_model(model, out.with_name("rounded"), base.config_json, replace=True)
    if vanish:
        shutil.rmtree(folder, ignore_errors=True)
    return base.about_export(model)


@pytest.mark.parametrize("size", [1e-4, pytest.param(1e-1, marks=pytest.mark.slow)])
def test_the_part_that_rounding_loses_is_that_of_the_files_on_any_number_of_ranks(ranks, base, tmp_path, size):
    """The squares of all errors over those of all changes, once for a tied matrix; small changes get a way out."""
    said = ranks(1, train_and_export, base, tmp_path / "exact", size)
    before, exact, rounded = (load_file(path / "model.safetensors") for path in (
        base, tmp_path / "exact", tmp_path / "rounded"))  # fmt: skip
    lost = changed = 0.0
    for name, tensor in exact.items():
        if "layers.0" not in name:
            lost += float((rounded[name].double() - tensor.double()).square().sum())
            changed += float((tensor.double() - before[name].double()).square().sum())
    part = math.sqrt(lost / changed)
    assert (part > 0.5) is (size < 0.01)
    way_out = "; `python checkpoints.py export RUN OUT --dtype float32` loses nothing" if part > LARGE else ""
    assert said == [f"the error of rounding to bfloat16 is {part:.1%} of what training has changed{way_out}"]
    assert ranks(4, train_and_export, base, tmp_path / "exact", size) == said * 4


def test_a_base_that_is_gone_after_the_training_does_not_lose_the_export(ranks, base, tmp_path):
    """R23: the export is whole already; that it could not be compared is said on every rank."""
    for said in ranks(2, train_and_export, base, tmp_path / "out", 0.1, vanish=True):
        assert said.startswith("the export could not be compared with its base: ") and "\n" not in said
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_nothing_is_lost_where_nothing_was_changed_or_nothing_is_rounded():
    weight = torch.randn(50, 7)
    unchanged, exact = Rounding(torch.float32), Rounding(torch.float32)
    unchanged.add(weight, weight)
    exact.add(weight, weight + 1e-3)
    assert unchanged.relative_error() == exact.relative_error() == 0.0


def test_an_update_far_below_the_distance_of_neighbouring_numbers_is_lost_as_a_whole():
    """bf16: the neighbours of 1 are 1 + 2^-7 and 1 - 2^-8."""
    rounding = Rounding(torch.bfloat16)
    rounding.add(torch.ones(10), torch.ones(10) + 1e-4)
    assert rounding.relative_error() == pytest.approx(1.0, abs=1e-6)
    said = "the error of rounding to bfloat16 is 100.0% of what training has changed; do this"
    assert rounding.sentence("do this") == said


def test_the_way_out_is_told_where_more_than_a_quarter_is_lost():
    small = Rounding(torch.bfloat16, lost=0.24**2, changed=1.0).sentence("do this")
    large = Rounding(torch.bfloat16, lost=0.26**2, changed=1.0).sentence("do this")
    assert small.endswith("24.0% of what training has changed")
    assert large.endswith("26.0% of what training has changed; do this")


def test_what_rounding_does_to_frozen_weights_is_no_loss_of_training(ranks, tmp_path):
    model = Llama(CONFIG)
    initialize_weights(model, 0)
    export_model(model, tmp_path / "base", config_to_json(CONFIG), dtype=torch.float32)
    assert ranks(1, lost_of_a_norm_of_twos, tmp_path / "base") == [0.0]


def lost_of_a_norm_of_twos(folder: Path) -> float:
    """Of a model in which only the last norm was trained, to numbers that bf16 has."""
    model = build(CONFIG, this_process(), change=lambda model: model.requires_grad_(False).norm.requires_grad_(True))
    load_weights(model, folder)
    local_slice(model.norm.weight)[0].fill_(2.0)
    return rounding_of_training(model, folder, torch.bfloat16).relative_error()
