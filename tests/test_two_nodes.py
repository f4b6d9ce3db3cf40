"""Two torchruns that meet at an address, as on two machines."""

import socket
import subprocess
from pathlib import Path

import pytest
from runs import HANG, ROOT, environment, launcher, lines_of, train_here, write_reviews

from llama.boundary.command_line import parse
from llama.training.settings import TrainingSettings


def flags(data: Path, output: Path, sharding: str) -> list[str]:
    return ["--data", str(data), "--template", "imdb", "--output", str(output), "--sharding", sharding,
            "--epochs", "2", "--batch_size", "2", "--eval_limit", "4", "--eval_every", "0", "--sample_prompts", "0",
            "--max_length", "192"]  # fmt: skip


@pytest.mark.slow
def test_hybrid_on_two_nodes_of_two_ranks_learns_as_full_on_four_ranks(ranks, tmp_path):
    """C31: torchrun tells each rank how many there are on its node, and weights are sharded over these."""
    data = write_reviews(tmp_path / "data", 16)
    expected = tmp_path / "full"
    ranks(4, train_here, tmp_path, parse(TrainingSettings, flags(data, expected, "full")).with_recipe(4))

    found = tmp_path / "hybrid"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    meet = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", address, "--rdzv_id", "test"]
    command = [*launcher(2, *meet), str(ROOT / "fsdp_train.py"), *flags(data, found, "hybrid")]
    nodes = [subprocess.Popen(command, env=environment(tmp_path), cwd=tmp_path) for _ in range(2)]
    assert [node.wait(HANG) for node in nodes] == [0, 0]

    steps = [[line for line in lines_of(output) if "loss" in line] for output in (found, expected)]
    assert len(steps[0]) == 4
    for ours, theirs in zip(*steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
