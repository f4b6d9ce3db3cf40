"""recipes/: each is a valid --config, fits the memory that its name promises, and starts."""

import json
import re
import shlex
from pathlib import Path

import pytest
from runs import ROOT, lines_of, run_command, summary_of, train_here, write_reviews

from llama.boundary.command_line import parse
from llama.boundary.config_file import flags_from
from llama.model import Llama, ModelConfig
from llama.storage import pretrained
from llama.storage.base import TINY_TOKENIZER, config_to_json
from llama.storage.companions import Companions
from llama.training.planner_settings import PlannerSettings
from llama.training.settings import TrainingSettings
from planner import compared

RECIPES = sorted((ROOT / "recipes").glob("*.json"))
CONFIG = ModelConfig(vocab_size=1280, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048)
# On what each is meant to run: the model's shape by planner.py's name, how many GPUs, and GB of each.
HARDWARE = {
    "chat-lora-24gb": ("8b", 1, 24), "qlora-8b-12gb": ("8b", 1, 12), "full-8b-8gpus": ("8b", 8, 40),
    "full-70b-slurm": ("llama3-70b", 32, 80),
}  # fmt: skip


def named(path: Path) -> str:
    return path.stem


def test_there_are_five_and_the_table_lists_them():
    text = (ROOT / "recipes/README.md").read_text()
    assert [path.stem for path in RECIPES] == sorted(["classifier-laptop", *HARDWARE])
    assert sorted(re.findall(r"^\| `([\w-]+).json`", text, re.MULTILINE)) == [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_is_a_valid_config(path):
    chosen = parse(TrainingSettings, ["--config", str(path)]).with_recipe(1)
    given = json.loads(path.read_text())
    assert given == flags_from(path, TrainingSettings) and chosen.learning_rate and chosen.epochs
    assert {name: getattr(chosen, name) for name in given} == given


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_the_commands_of_the_table_are_valid(path):
    """Each names its recipe, and says no more on the command line than --help knows."""
    text = (ROOT / "recipes/README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"(?:fsdp_train.py|train.sbatch) ([^`|]+)", text)
    commands = [command for command in commands if path.name in command]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert parse(TrainingSettings, words).config == f"recipes/{path.name}"


@pytest.mark.parametrize("name", HARDWARE)
def test_a_recipe_fits_the_memory_that_it_promises(name):
    """As planner.py counts, and as the README's table; 2 GB are left for the allocator and the libraries."""
    shape, gpus, gigabytes = HARDWARE[name]
    chosen = parse(TrainingSettings, ["--config", str(ROOT / f"recipes/{name}.json")]).with_recipe(gpus)
    settings = PlannerSettings(
        model=shape, gpus=gpus, tokens=chosen.batch_tokens, sharding=chosen.sharding, tensor_parallel=1,
        activation_checkpointing=chosen.activation_checkpointing, optimizer=chosen.optimizer,
        lora_rank=chosen.lora_rank, quantize=chosen.quantize,
        step_tokens=gpus * chosen.batch_tokens * chosen.gradient_accumulation_steps,
    )  # fmt: skip
    (row,) = compared(settings)
    needed = row.peak / 1e9
    assert needed + 2 < gigabytes
    line = next(line for line in (ROOT / "recipes/README.md").read_text().splitlines() if f"`{name}.json`" in line)
    assert f"(counted: {needed:.0f} GB" in line


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small pretrained Llama, in the place of the large ones."""
    folder = tmp_path_factory.mktemp("model") / "small"
    small = Llama(CONFIG)
    pretrained.initialize_weights(small, seed=0)
    pretrained.export_model(small, folder, config_to_json(CONFIG), Companions([TINY_TOKENIZER / "tokenizer.model"]))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "data", 40)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_starts_with_another_model_and_data(ranks, path, model, data, tmp_path):
    """Two steps of a small model: every setting together is one that a run accepts."""
    swapped = dict(model=model, data=data, output=tmp_path / "out", template="imdb", max_steps=2, eval_limit=4,
                   max_length=192, batch_tokens=0, batch_size=2)  # fmt: skip
    arguments = [word for name, value in swapped.items() for word in (f"--{name}", str(value))]
    chosen = parse(TrainingSettings, ["--config", str(path), *arguments]).with_recipe(2)
    ranks(2, train_here, tmp_path / "cache", chosen)
    assert [line["step"] for line in lines_of(tmp_path / "out") if "loss" in line] == [1, 2]
    assert (tmp_path / "out" / ("adapter" if chosen.lora_rank else "model")).is_dir()


@pytest.mark.slow
def test_the_laptop_recipe_learns_and_its_run_json_gives_the_same_run_again(model, data, tmp_path):
    """As a command, on reviews of six words; then replayed from its own run.json, bit for bit."""
    changes = ["--model", model, "--data", data, "--template", "imdb", "--learning_rate", "1e-2", "--max_steps", "8",
               "--epochs", "20", "--max_length", "192"]
    done = run_command("--config", ROOT / "recipes/classifier-laptop.json", *changes, "--output", "first",
                       cwd=tmp_path, cache=tmp_path / "cache")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "first")["after"]["loss"] < summary_of(tmp_path / "first")["before"]["loss"] / 2
    done = run_command("--config", "first/run.json", "--output", "again", cwd=tmp_path, cache=tmp_path / "cache")
    assert done.returncode == 0 and "first/run.json: this is the same run again" in done.stdout, done.stderr
    about = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("first", "again")]
    assert about[0]["identity"] == about[1]["identity"]
    losses = [[(line["step"], line["loss"]) for line in lines_of(tmp_path / name) if "loss" in line]
              for name in ("first", "again")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 8
    done = run_command("--config", "first/run.json", "--seed", 1, "--max_steps", 1, "--output", "other", cwd=tmp_path,
                       cache=tmp_path / "cache")  # fmt: skip
    assert "first/run.json: this run differs: seed was 0, is 1; steps was 8, is 1" in done.stdout
