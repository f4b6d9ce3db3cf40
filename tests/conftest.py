"""Fixtures that any test may ask for."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several ranks share few cores

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import RankPools

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def ranks():
    """ranks(2, function, *args) calls function on 2 ranks of one process group; see ranks.py."""
    ranks = RankPools()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of pretrained weights, tokenizers and data sets beside this repository."""
    folder = SHARED / "assets"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="session")
def smollm2(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a real chat Llama, as an ordinary Hugging Face folder in bfloat16."""
    script = SHARED / "tools" / "expand_smollm2.py"
    if not script.is_file():
        pytest.skip(f"{script} is absent")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, script, folder, "--dtype", "bfloat16"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """The cache of encoded data for one file of tests, which names it or uses it in its `pytestmark`."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("llama-cache")
        patched.setenv("LLAMA_CACHE", str(folder))
        yield folder
