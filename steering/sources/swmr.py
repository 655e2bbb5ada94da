"""HDF5 that is being written (SWMR): frames and positions are followed in one file or several.

A name with * or ? stands for a file for each scan, in the order of their names. A scan that is steered is written after
the run has begun: a file that is there already, as that of another run, is passed over unless it changes. Which rows of
a file are there: `swmr_rows`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from steering.sources.streams import Began, Ended, Frame, Record, Samples, Unreadable
from steering.sources.swmr_rows import Followed, rows_of

BEFORE = "a file that was there when the run began: a steered scan is in one that is written to later"
"""Why it is passed over."""


@dataclass(frozen=True, kw_only=True)
class SwmrFrames:
    """Frames (n, y, x), or (..., y, x), of a dataset."""

    where: Followed
    data: str = "/entry/data/data"

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The frames, as they are written."""
        for path in _files(self.where, stopped):
            if not isinstance(path, Path):
                yield path
                continue
            yield Began(path.stem)
            for run in rows_of(path, self.where, (self.data,), 2, stopped):
                if run is None:
                    yield None
                    continue
                [frames] = run.values
                now = time.time()
                numbers = run.numbers.tolist()
                yield from (Frame(number, frame, now) for number, frame in zip(numbers, frames, strict=True))
            yield Ended()


@dataclass(frozen=True, kw_only=True)
class SwmrPositions:
    """Positions, or a monitor, of datasets with a number for each frame."""

    where: Followed
    columns: tuple[str, ...]
    """Datasets, of positions y first."""
    scale: tuple[float, ...]
    samples: int = 1
    """Rows of each frame; where they are several their place counts, and they have no numbers."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The samples, as they are written."""
        where = self.where if self.samples == 1 else replace(self.where, number="none")
        for path in _files(where, stopped):
            if not isinstance(path, Path):
                yield path
                continue
            yield Began(None)
            for run in rows_of(path, where, self.columns, 0, stopped):
                if run is None:
                    yield None
                    continue
                rows = np.stack(run.values, axis=1) * np.asarray(self.scale)
                gaps = np.flatnonzero(np.diff(run.numbers) != 1) + 1
                parts = zip(np.split(run.numbers, gaps), np.split(rows, gaps), strict=True)
                yield from (Samples(int(numbers[0]), part) for numbers, part in parts)
            yield Ended()


def _files(where: Followed, stopped: threading.Event) -> Iterator[Path | Unreadable | None]:
    """The file of each scan, in turn; None while the next is not there, Unreadable for one that is passed over."""
    before = {name: _written(name) for name in glob.glob(where.file)} if where.steered else {}
    yield from (Unreadable(BEFORE) for _ in before)
    seen: set[str] = set()
    while not stopped.is_set():
        found = [name for name in sorted(glob.glob(where.file)) if name not in seen]
        name = next((name for name in found if name not in before or _written(name) != before[name]), None)
        if name is None:
            stopped.wait(0.05)
            yield None
            continue
        seen.add(name)
        yield Path(name)
        if where.file == name:
            return


def _written(name: str) -> tuple[int, int] | None:
    """What changes when something is written to a file; None: it is not there."""
    with contextlib.suppress(OSError):
        status = os.stat(name)
        return status.st_mtime_ns, status.st_size
    return None
