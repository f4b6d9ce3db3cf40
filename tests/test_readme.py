"""Every command of the README and the guide does what it says, in a fresh copy; long ones are shortened."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_copy import copy_of_the_project

from llama.boundary.command_line import parse
from llama.evaluation.settings import EvaluationSettings, GenerateSettings
from llama.storage.settings import MergeSettings
from llama.training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parents[1]
VENV = r"python3 -m venv \.venv && \. \.venv/bin/activate"
SET_UP = re.compile(VENV + r" && pip install -r (requirements\S*\.txt) && (.*)")
README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "docs/guide.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)\n```", README + GUIDE, re.DOTALL)
TRAINER = [command for command in COMMANDS if "fsdp_train.py" in command]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return copy_of_the_project(tmp_path_factory.mktemp("clone"))


def start(command: str, clone: Path) -> subprocess.Popen:
    """The command, with this Python and two steps instead of hundreds."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    elif words[0] == "python":
        words[0] = sys.executable
    if "fsdp_train.py" in words and "--help" not in words:
        words += ["--max_steps", "2", "--eval_limit", "16"]
    return subprocess.Popen(words, cwd=clone, env=environment(clone), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def environment(clone: Path) -> dict[str, str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"LLAMA_CACHE": str(clone.parent / "cache"), "OMP_NUM_THREADS": "1", "PATH": path}


def run(command: str, clone: Path) -> str:
    process = start(command, clone)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.fixture(scope="module")
def trained(clone) -> Path:
    """What the first command left: the others begin there."""
    requirements, command = SET_UP.fullmatch(COMMANDS[0]).groups()
    assert requirements == "requirements.txt"
    out = run(command, clone)
    assert "bundled sample" in out and "before:" in out and "after:" in out
    return clone / "runs/imdb-tiny"


def test_the_readme_has_two_commands_that_set_everything_up():
    """Exactly two, each whole on a fresh machine: the first is the README's first, the other runs the tests, and
    continuous integration runs its own words."""
    set_ups = [SET_UP.fullmatch(command).groups() for command in COMMANDS if SET_UP.fullmatch(command)]
    assert SET_UP.fullmatch(COMMANDS[0])
    assert set_ups == [("requirements.txt", "torchrun --nproc_per_node 4 fsdp_train.py --data imdb"),
                       ("requirements-dev.txt", "pytest")]
    assert "requirements-dev.txt" in (ROOT / ".ci/run").read_text() and "pytest" in (ROOT / ".ci/run").read_text()


SETTINGS = {"fsdp_train": TrainingSettings, "lora": MergeSettings, "evaluate": EvaluationSettings,
            "generate": GenerateSettings}  # fmt: skip
TABLE_COMMANDS = re.findall(r"\| `([^`]* (?:fsdp_train|lora|generate|evaluate)\.py [^`]*)` \|", README)


@pytest.mark.parametrize("command", TABLE_COMMANDS)
def test_the_commands_of_the_tables_have_flags_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    launcher, script, flags = re.fullmatch(r"(python|torchrun --nproc_per_node \d+) (\w+)\.py (.*)", command).groups()
    parse(SETTINGS[script], shlex.split(flags))


def test_the_tables_hold_commands():
    assert len(TABLE_COMMANDS) == 9


@pytest.mark.slow
def test_the_first_command_leaves_what_the_readme_says(trained):
    table = README.split("## What a run leaves")[1].split("##")[0]
    promised = re.findall(r"^\| `(.*)` \|", table, re.MULTILINE)
    names = {name.strip("/ ") for row in promised for name in row.split("`, `")}
    assert {"model", "metrics.jsonl", "loss.png", "summary.json", "run.json"} < names
    for name in names - {"checkpoints/step-000329"}:
        assert (trained / name).exists(), name
    assert json.loads((trained / "summary.json").read_text())["bundled_sample"] is True


@pytest.mark.slow
def test_the_command_that_asks_prints_the_answer_alone(trained, clone):
    """README and guide show the same one."""
    [command] = {c for c in COMMANDS if "--model runs/imdb-tiny --prompt" in c}
    words = [sys.executable, *shlex.split(command)[1:]]
    asked = subprocess.run(words, cwd=clone, env=environment(clone), text=True, capture_output=True)
    assert asked.stdout.strip() in ("positive", "negative") and "--template imdb" in asked.stderr, asked.stderr


@pytest.mark.slow
def test_the_commands_that_ask_write_and_show_the_answer(trained, clone):
    [commands] = [c for c in COMMANDS if "--predictions" in c]
    asked = subprocess.run(["bash", "-c", commands], cwd=clone, env=environment(clone), text=True, capture_output=True)
    answer = json.loads(asked.stdout.splitlines()[-1])
    assert asked.returncode == 0 and answer["prediction"] in ("positive", "negative"), asked.stderr
    assert "anything but dull" in answer["prompt"] and "--template imdb" in asked.stderr


@pytest.mark.slow
def test_the_command_that_draws_a_run_writes_its_picture(trained, clone):
    [command] = [c for c in COMMANDS if "llama.training.curve" in c]
    (trained / "loss.png").unlink()
    run(command, clone)
    assert (trained / "loss.png").exists()


@pytest.mark.slow
def test_the_evaluation_command_prints_the_accuracy(trained, clone):
    [command] = [c for c in COMMANDS if "evaluate.py" in c and "--predictions" not in c]
    result = json.loads(re.search(r"^\{.*^\}", run(command, clone), re.DOTALL | re.MULTILINE)[0])
    assert result["n"] == 1000 and 0 <= result["accuracy"] <= 1 and result["bundled_sample"]


@pytest.mark.slow
def test_the_resume_command_continues_the_run(trained, clone):
    """Here the run has died between its last checkpoint and its export; resumed again, it is finished."""
    [command] = [c for c in TRAINER if "--resume" in c]
    (trained / "summary.json").unlink()
    assert "resuming after step 2 of 2" in run(command, clone)
    assert json.loads((trained / "summary.json").read_text())["examples"] == 128
    assert "finished already" in run(command, clone)


@pytest.mark.slow
def test_the_listing_command_shows_the_checkpoints(trained, clone):
    [command] = [c for c in COMMANDS if "checkpoints.py" in c]
    told = run(command, clone)
    assert re.search(r"^step-\d{6}  \S+ MB  written by 4 ranks  loss .*  newest  best$", told, re.MULTILINE), told


@pytest.mark.slow
def test_the_command_for_a_folder_fine_tunes_it(trained, clone):
    """A tiny Hugging Face folder and the bundled reviews under the names that the README uses."""
    [command] = [c for c in TRAINER if "SmolLM2" in c]
    (clone / "SmolLM2-135M-Instruct").symlink_to(trained / "model")
    run(command.replace("HuggingFaceTB/", "") + " --data_dir assets/imdb_sample", clone)
    assert (clone / "runs/imdb-SmolLM2-135M-Instruct/model/config.json").exists()


@pytest.mark.slow
def test_the_command_that_shows_data_prints_what_the_readme_shows(clone):
    [command] = [c for c in COMMANDS if "data.py" in c]
    said = run(command, clone)
    assert re.search(r"#### Answer:\[\[ (positive|negative)\]\]", said) and "negative: 3000 (50.0%)" in said
    assert (clone / "runs/imdb_sample-shown/lengths.png").exists()


def test_the_template_of_the_readme_renders_a_row(clone):
    from llama.data.templates import Template

    source, in_guide = re.findall(r"```\n(Translate.*?)```", README + GUIDE, re.DOTALL)
    assert source == in_guide
    segments, _ = Template("french.txt", source).render({"english": "Hello", "french": "Bonjour"}, "")
    assert "".join(s.text for s in segments) == "Translate to French: Hello\nFrench: Bonjour"


@pytest.mark.slow
def test_the_alpaca_recipe_trains_an_adapter_and_the_next_command_merges_it(trained, clone):
    """Their 7B is the tiny model here, and Alpaca a few hundred made-up instructions."""
    [command] = [c for c in TRAINER if "--lora_rank" in c]
    rows = [{"instruction": f"Say {i}.", "input": "" if i % 3 else "twice", "output": f"{i} {i}"} for i in range(300)]
    (clone / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(command.replace("huggyllama/llama-7b", "runs/imdb-tiny/model") + " --data_dir alpaca.jsonl", clone)
    about = json.loads((clone / "runs/alpaca-model/adapter/adapter_config.json").read_text())
    assert about["r"] == 8 and about["target_modules"] == ["q_proj", "v_proj"]
    [merging] = [c for c in COMMANDS if "lora.py" in c]
    merging = merging.replace("huggyllama/llama-7b", "runs/imdb-tiny/model").replace("alpaca-llama-7b", "alpaca-model")
    run(merging, clone)
    assert (clone / "merged/model.safetensors").exists()
    [asking] = [c for c in COMMANDS if "Tell me about Alpacas" in c]
    asking = asking.replace("alpaca-llama-7b", "alpaca-model").replace("256", "16")
    assert "using runs/alpaca-model/adapter" in run(asking, clone)


@pytest.mark.slow
def test_the_commands_for_two_nodes_join_them(trained, clone):
    """Two launchers on this machine stand for two nodes: one process each instead of eight."""
    commands = [c for c in TRAINER if "--nnodes" in c]
    assert len(commands) == 2
    nodes = []
    for command in commands:
        command = command.replace("$HEAD_NODE", "127.0.0.1").replace("--nproc_per_node 8", "--nproc_per_node 1")
        command = command.replace("meta-llama/Llama-2-7b-hf", str(trained / "model")) + " --data_dir assets/imdb_sample"
        command = command.replace("torchrun", "torchrun --master_port 29871") + " --output runs/two-nodes"
        nodes.append(start(command, clone))
    told = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told[0][-2000:] + told[1][-2000:]
    assert json.loads((clone / "runs/two-nodes/summary.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_the_planner_names_flags_that_the_trainer_has(clone):
    [command] = {c for c in COMMANDS if "planner.py" in c}
    words = shlex.split(run(command, clone).splitlines()[-1])
    parse(TrainingSettings, words[words.index("fsdp_train.py") + 1 :])
