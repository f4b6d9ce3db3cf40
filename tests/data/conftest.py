"""Fixtures that several test modules of this folder use."""

from pathlib import Path

import pytest
from samples import BUNDLED, REAL, loaded

from llama.data.tokenizer import Tokenizer


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of encoded data for this test."""
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def bundled() -> Tokenizer:
    return loaded(BUNDLED)


@pytest.fixture(scope="session", params=["bundled", *(pytest.param(name, marks=pytest.mark.slow) for name in REAL)])
def tokenizer(request) -> Tokenizer:
    """Each kind of tokenizer: ours, and three real ones where they are at hand."""
    if request.param == "bundled":
        return request.getfixturevalue("bundled")
    return loaded(request.getfixturevalue("assets") / REAL[request.param])
