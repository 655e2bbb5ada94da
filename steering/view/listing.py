"""The runs below a folder, a line each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from steering.runner.folder import RunFolder
from steering.view.status import how

_INSIDE = {"models", "object.zarr", "labels", "credentials"}
"""Folders of a run, in which no other run is looked for."""


def listing(folder: Path) -> list[str]:
    """Every run below a folder and its state, in the order in which they began. Raises FileNotFoundError where the
    folder is not there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: found no such folder, expected one with runs below it")
    runs = sorted(runs_below(folder), key=lambda run: str(run.summary().get("started", "")))
    if not runs:
        return [f"no runs below {folder}"]
    names = [os.path.relpath(run.path) if run.path.is_relative_to(Path.cwd()) else str(run.path) for run in runs]
    width = max(map(len, names))
    return [f"{name:<{width}}  {how(run)}" for name, run in zip(names, runs, strict=True)]


def runs_below(folder: Path) -> Iterator[RunFolder]:
    """Every run in a folder or anywhere below it; a folder that may not be read is passed over."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "summary.json" not in files:
            continue
        folders[:] = [name for name in folders if name not in _INSIDE]
        run = RunFolder(path)
        try:
            run.summary()
        except (OSError, ValueError):  # another program's file of this name, or another user's
            continue
        yield run
