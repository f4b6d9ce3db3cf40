"""--config: flags from a JSON file, which is a run.json, or written by hand as {"learning_rate": 1e-4, ...}."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llama.boundary.errors import UserError
from llama.boundary.records import check_values, kind_of
from llama.boundary.untrusted import read_json

# Settings in a run.json that were about that one run: a replay gets a folder of its own, and begins at step 0.
OF_ONE_RUN = {"output", "resume", "allow_changed", "config"}


def flags_from(path: Path, settings: type) -> dict[str, Any]:
    """{name of a setting: value}, checked as flags are. Raises UserError for a file that cannot be read, a name that is
    no setting, and a value out of range."""
    if path.is_dir():
        raise UserError(f"--config {path}: is a folder, expected a JSON file, such as the run.json in a run's folder")
    content = read_json(path.parent, path.name)
    entries = {entry.name: entry for entry in fields(settings) if entry.name != "config"}
    flags = content
    if isinstance(content.get("settings"), dict):  # a run.json
        flags = {name: value for name, value in content["settings"].items() if name not in OF_ONE_RUN}
        beside = sorted(content.keys() & entries.keys())
        if beside:
            raise UserError(f'{path}: {", ".join(beside)} beside "settings", where nothing reads it; expected inside')
    for name in flags:
        if name not in entries:
            close = get_close_matches(name, entries, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists them"
            if name == "config":
                hint = "a file cannot name another one"
            raise UserError(f"{path}: {name!r:.60} is no setting; {hint}")
    check_values(settings, flags, path)
    for name, value in flags.items():
        if kind_of(entries[name]) is float and value is not None:
            flags[name] = float(value)  # JSON may have a whole number there
    return flags
