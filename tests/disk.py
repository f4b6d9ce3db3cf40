"""What a power cut would leave: only content and names that were forced to disk (fsync) are sure to be there after it.

    with Disk() as disk:
        replace_durably(path, text)
    assert disk.renamed == [path] and disk.at_risk() == []
"""

import os
from pathlib import Path

TEMPORARY = (".tmp", ".deleting")  # ends of names whose content nobody relies on


def content(path: Path) -> object:
    """Of a file its bytes, of a folder the names in it."""
    return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()


class Disk:
    """Watches os.fsync, os.rename and os.replace of this process while its block runs."""

    def __init__(self):
        self.synced: dict[Path, object] = {}  # what was there when it was last forced to disk
        self.renamed: list[Path] = []  # new names, in order
        self.problems: list[str] = []

    def __enter__(self) -> "Disk":
        self.real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
        os.fsync = self._fsync
        os.rename = lambda old, new, **how: self._rename("rename", old, new, how)
        os.replace = lambda old, new, **how: self._rename("replace", old, new, how)
        return self

    def __exit__(self, *error) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)

    def at_risk(self) -> list[str]:
        """What a power cut now could undo or leave half written; renames whose folder was not forced to disk, too."""
        return self.problems + [f"the name {path} is not on disk" for path in self.renamed if not self._has_name(path)]

    def _has_name(self, path: Path) -> bool:
        return path.name in self.synced.get(path.parent, [])

    def _fsync(self, handle: int) -> None:
        self.real["fsync"](handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        self.synced[path] = content(path)

    def _rename(self, call: str, old: str | Path, new: str | Path, how: dict) -> None:
        old, new = Path(old).resolve(), Path(new).resolve()
        if not new.name.endswith(TEMPORARY):
            for path in [old, *old.rglob("*")]:
                if self.synced.get(path) != content(path):
                    self.problems.append(f"{path.name} was not on disk as {old.name} became {new.name}")
            for earlier in self.renamed:  # the next step relies on the one before
                if not self._has_name(earlier):
                    self.problems.append(f"the name {earlier.name} was not on disk as {old.name} became {new.name}")
            self.renamed.append(new)
            # That an older file had this name once is no sign of the new one.
            self.synced.pop(new.parent, None)
        elif any(not self._has_name(path) for path in self.renamed):
            self.problems.append(f"{old.name} was given up before what replaces it had its name on disk")
        self.real[call](old, new, **how)
