"""The data: folders in the layout of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.errors import UserError


def chosen_datasets(root: str | None, names: Sequence[str]) -> dict[str, Path]:
    """Folder of every data set; all there are if no names are given, none without a root."""
    if not root:
        if names:
            raise UserError(
                f"--datasets: {' '.join(names)}, but no data; give --data (or HIGHWAY_BP_DATA)"
            )
        return {}
    if not Path(root).is_dir():
        raise UserError(
            f"--data (or HIGHWAY_BP_DATA): {root} is not a folder; give the one that "
            f"holds the data sets"
        )
    there = datasets_below(Path(root))
    if not there:
        raise UserError(
            f"--data (or HIGHWAY_BP_DATA): {root} holds no folder with files; give the "
            f"one that holds the data sets"
        )
    for name in names:
        if name not in there:
            raise UserError(f"--datasets: {name} is not in {root}; give of {', '.join(there)}")
    return {name: there[name] for name in names or there}


def datasets_below(root: Path) -> dict[str, Path]:
    """The hub's ``owner/name`` and ``name``: a folder that holds files is a data set as a whole."""
    found = {}
    for folder in folders(root):
        holds_files = any(entry.is_file() for entry in folder.iterdir())
        for each in [folder] if holds_files else folders(folder):
            found[each.relative_to(root).as_posix()] = each
    return found


def folders(folder: Path) -> list[Path]:
    return sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
