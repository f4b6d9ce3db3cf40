"""What the pages beside the code promise: numbers exist, links lead somewhere, all packages are listed."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fresh_copy import copy_of_the_project
from packaging.requirements import Requirement

import llama

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def docstrings_of(path: Path) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    return [ast.get_docstring(node) or "" for node in nodes]


def test_every_requirement_is_cited_by_a_test_or_not_built_yet_and_every_number_cited_is_a_requirement():
    lines = re.findall(r"^\| ([CR]\d+) \|(.*)", (ROOT / "docs/requirements.md").read_text(), re.MULTILINE)
    listed = [number for number, _ in lines]
    assert len(listed) == len(set(listed)) > 70
    cited = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for text in docstrings_of(path):
            cited |= set(re.findall(r"\b[CR]\d{1,2}\b", text))
    not_built = {number for number, text in lines if "(Not built yet.)" in text}
    assert set(listed) - not_built == cited, set(listed) - not_built ^ cited


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:llama/|tests/|benchmarks/|assets/|docs/|recipes/)[\w./-]*[\w/])`", text):
        assert (ROOT / name).exists(), name


def test_the_packages_to_install_are_all_rooms_and_the_assets():
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "llama").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == rooms | {"llama.assets"}


def test_the_ranges_to_install_hold_the_pinned_versions_of_the_same_packages():
    ranges = {Requirement(text).name: Requirement(text) for text in PROJECT["project"]["dependencies"]}
    pins = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert ranges.keys() == {pin.name for pin in pins}
    for pin in pins:
        [version] = [specifier.version for specifier in pin.specifier]
        assert version in ranges[pin.name].specifier, pin


def test_the_newest_version_in_the_changelog_is_this_one():
    assert re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == llama.__version__


@pytest.mark.slow
def test_the_installed_library_opens_the_tiny_model_without_the_clone(tmp_path):
    build = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    copy = copy_of_the_project(tmp_path / "clone")
    subprocess.run([*build, "--target", str(tmp_path / "site"), str(copy)], check=True)
    program = "from llama.storage.base import Base; print(Base.open('tiny').tokenizer.encode('A dull film.'))"
    found = []
    for folder in (tmp_path / "site", ROOT):
        tried = subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, text=True, capture_output=True)
        found.append(tried.stdout)
    assert found[0] == found[1] != ""
