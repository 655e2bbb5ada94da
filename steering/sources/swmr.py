"""HDF5 that is being written (SWMR): frames and positions are followed in one file or several.

A row that is not written yet reads as fill values that look like data. Where the file has keys (integers, 0: not
written) a row is taken when its key is there. Without keys the rule is: a frame, or a position, that holds nothing but
the dataset's fill value is never taken, and a position of which one number is the fill value not before later rows have
been there for `skip_s`, so that it is not one half of a position. A row that is not there by then counts as missing.

The scan is over when the scalar `finished` is not 0, when `total` rows are there, or when nothing was added for
`quiet_s`. A name with * or ? stands for a file for each scan, in the order of their names.
"""

from __future__ import annotations

import contextlib
import glob
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import hdf5plugin  # noqa: F401 - registers the compression filters that detectors write with
import numpy as np
from numpy.typing import NDArray

from steering.sources.compression import LARGEST
from steering.sources.streams import Began, Ended, Frame, Record, Samples
from steering.sources.swmr_file import SwmrFile

_KEYS = (
    "/entry/keys",
    "/entry/uniqueKeys",
    "/entry/solstice_scan/keys/uniqueKeys",
    "/entry/diamond_scan/keys/uniqueKeys",
)
_FINISHED = ("/entry/scan_finished", "/entry/solstice_scan/scan_finished", "/entry/diamond_scan/scan_finished")
_POLL_S, _ROWS, _AT_ONCE, _MOST = 0.005, 64, 2**27, 2**48
"""Seconds between two looks; rows, and bytes of them, that are read at once; numbers that a dataset has at most."""
_PATIENCE_S, _OPEN_S, _REOPEN_S = 5.0, 1.0, 0.05
"""Seconds that a file may be unreadable, that it is kept open while nothing comes, and between two openings."""


_Found = TypeVar("_Found", h5py.Dataset, h5py.Dataset | None)


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A file that is written, and how its rows are known to be there."""

    file: str
    """Path, or a pattern of paths."""
    keys: str = ""
    """Dataset of integers, 0 where a row is not written; empty: one of the usual names, or none."""
    finished: str = ""
    """Scalar that is not 0 when the scan is over; empty: one of the usual names, or none."""
    total: int = 0
    """Rows of a scan; 0: not known."""
    quiet_s: float = 60.0
    """Seconds without a new row after which the scan is over."""
    skip_s: float = 2.0
    """Seconds for which a row may be missing while later ones are there."""

    def scans(self, stopped: threading.Event) -> Iterator[Path | None]:
        """The file of each scan, in turn; None while the next is not there."""
        seen: set[str] = set()
        while not stopped.is_set():
            found = [name for name in sorted(glob.glob(self.file)) if name not in seen]
            if not found:
                stopped.wait(0.05)
                yield None
                continue
            seen.add(found[0])
            yield Path(found[0])
            if self.file == found[0]:
                return


@dataclass(frozen=True, kw_only=True)
class SwmrFrames:
    """Frames (n, y, x), or (..., y, x), of a dataset."""

    where: Followed
    data: str = "/entry/data/data"

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The frames, as they are written."""
        for path in self.where.scans(stopped):
            if path is None:
                yield None
                continue
            yield Began(path.stem)
            for row, values in _rows(path, self.where, (self.data,), 2, stopped):
                if row is None:
                    yield None
                    continue
                [frames] = values
                now = time.time()
                yield from (Frame(row + k, frame, now) for k, frame in enumerate(frames))
            yield Ended()


@dataclass(frozen=True, kw_only=True)
class SwmrPositions:
    """Positions, or a monitor, of datasets with a number for each frame."""

    where: Followed
    columns: tuple[str, ...]
    """Datasets, of positions y first."""
    scale: tuple[float, ...]

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The samples, as they are written."""
        for path in self.where.scans(stopped):
            if path is None:
                yield None
                continue
            yield Began(None)
            for row, values in _rows(path, self.where, self.columns, 0, stopped):
                if row is None:
                    yield None
                else:
                    yield Samples(row, np.stack(values, axis=1) * np.asarray(self.scale))
            yield Ended()


def _rows(
    path: Path, where: Followed, names: tuple[str, ...], inner: int, stopped: threading.Event
) -> Iterator[tuple[int | None, list[NDArray]]]:
    """Runs of rows that are written, in their order: the number of the first, and the values (row, ...) of each
    dataset; (None, []) now and then. inner: dimensions of one row's values."""
    with SwmrFile.followed(path) as shared:
        follower = _Follower(shared, where, names, inner)
        changed = time.monotonic()
        while not stopped.is_set():
            runs = follower.look()
            if runs:
                changed = time.monotonic()
                yield from runs
                continue
            if follower.over or time.monotonic() - changed > where.quiet_s:
                follower.refuse_unread()
                return
            yield None, []
            stopped.wait(_POLL_S)


class _Follower:
    """Looks for rows that have been written since the last look."""

    def __init__(self, shared: SwmrFile, where: Followed, names: tuple[str, ...], inner: int) -> None:
        self._shared, self._where, self._names, self._inner = shared, where, names, inner
        self._generation = -1
        self._data: list[h5py.Dataset] = []
        self._keys: h5py.Dataset | None = None
        self._finished: h5py.Dataset | None = None
        self._rows = _ROWS
        """That are read at once."""
        self._patience = min(where.quiet_s, _PATIENCE_S)
        self._torn: float | None = None
        """Since when the file cannot be read."""
        self._error: Exception | None = None
        """And why."""
        self._next = 0
        """After the last row that was there."""
        self._holes: dict[int, float] = {}
        """Rows before it that were not, and since when."""
        self.over = False

    def look(self) -> list[tuple[int, list[NDArray]]]:
        """Runs of rows that are there now; empty where there are none, and then `over` says whether more may come.

        Raises OSError where the file cannot be read for several seconds, ValueError where it lacks a dataset as long.
        """
        with self._shared.turn:
            try:
                self._take_hold()
                runs = self._look()
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                self._endure(error)
                return []
            self._torn = self._error = None
            if not runs and not self.over and time.monotonic() - self._shared.opened > _OPEN_S:
                with contextlib.suppress(OSError):
                    self._shared.reopen()
            return runs

    def _take_hold(self) -> None:
        """Take the datasets out of the file, where it was opened anew."""
        file = self._shared.open()
        if self._generation != self._shared.generation:
            self._data = [_numbers(_dataset(file, name), self._inner + 1) for name in self._names]
            self._keys = _numbers(_optional(file, self._where.keys, _KEYS), 1)
            self._finished = _numbers(_optional(file, self._where.finished, _FINISHED), 0)
            self._rows = min(_rows_at_once(dataset, self._inner) for dataset in self._data)
            self._generation = self._shared.generation

    def _endure(self, error: Exception) -> None:
        """The writer lays the file out, or was between two writes, or the file must be opened anew."""
        now = time.monotonic()
        self._torn, self._error = self._torn or now, error
        if now - self._torn > self._patience:
            self.refuse_unread()
        self._generation = -1
        if now - self._shared.opened > _REOPEN_S:
            with contextlib.suppress(OSError):
                self._shared.reopen()

    def refuse_unread(self) -> None:
        """Raise what has kept the file from being read, where it is not read now: a scan that ends so had no end."""
        if isinstance(self._error, ValueError):
            raise self._error
        if self._error is not None:
            raise OSError(
                f"{self._shared.path}: found a file that cannot be followed ({self._error}), expected one in SWMR "
                "mode: its writer must set swmr_mode, on a local disk"
            ) from self._error

    def _look(self) -> list[tuple[int, list[NDArray]]]:
        finished = self._read_finished()  # before the rows: what was written before it is seen after it
        keys = None
        if self._keys is not None:  # before the rows as well: a key is written after its row
            self._keys.refresh()
            keys = _read(self._keys, 0, min(self._keys.size, self._next + self._rows), 0) != 0
        for dataset in self._data:
            dataset.refresh()
        there = min(_length(dataset, self._inner) for dataset in self._data)
        now = time.monotonic()
        late = {row: finished or now - since > self._where.skip_s for row, since in self._holes.items()}
        runs = [run for row in late for run in self._written(row, row + 1, keys, sure=not late[row])]
        new = self._written(self._next, min(there, self._next + self._rows), keys, sure=not finished)
        for first, _ in runs:
            del self._holes[first]
        self._holes = {row: since for row, since in self._holes.items() if not late[row]}
        for first, values in new:
            self._holes |= dict.fromkeys(range(self._next, first), now)
            self._next = first + len(values[0])
        self.over = not runs and not new and (finished or 0 < self._where.total <= self._next)
        return [*runs, *new]

    def _written(
        self, first: int, last: int, keys: NDArray[np.bool_] | None, *, sure: bool
    ) -> list[tuple[int, list[NDArray]]]:
        """Runs of rows among these that are there; sure: with no number that may be a fill value."""
        if last <= first:
            return []
        values = [_read(dataset, first, last, self._inner) for dataset in self._data]
        if keys is None:
            there = self._is_there(values, sure)
        else:
            there = np.concatenate([keys[first:last], np.zeros(last - first - len(keys[first:last]), bool)])
        there = np.concatenate([[False], there, [False]])
        edges = np.flatnonzero(np.diff(there.astype(np.int8))).reshape(-1, 2)
        return [(first + int(low), [each[low:high] for each in values]) for low, high in edges]

    def _is_there(self, values: list[NDArray], sure: bool) -> NDArray[np.bool_]:
        """(row,) by the fill values."""
        empty, nan = [], False
        for dataset, each in zip(self._data, values, strict=True):
            fill = dataset.fillvalue
            nan |= bool(fill != fill)  # noqa: PLR0124
            same = np.isnan(each) if fill != fill else each == fill  # noqa: PLR0124 - NaN
            empty.append(same.reshape(len(each), -1).all(axis=1))
        return ~(np.logical_or if sure or nan else np.logical_and).reduce(empty)

    def _read_finished(self) -> bool:
        if self._finished is None:
            return False
        self._finished.refresh()
        if self._finished.size != 1:
            raise ValueError(
                f"{self._shared.path}: found {self._finished.name} {self._finished.shape}, expected one number, not 0 "
                "when the scan is over"
            )
        return bool(np.ravel(self._finished[()])[0])


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        here: list[str] = []
        file.visititems(lambda path, node: here.append(f"/{path}") if isinstance(node, h5py.Dataset) else None)
        raise ValueError(f"{file.filename}: found the datasets {', '.join(here)[:400]}, expected {name} among them")
    return found


def _numbers(dataset: _Found, axes: int) -> _Found:
    """The dataset, if there is none or it is one of real numbers with so many axes or more. Raises ValueError."""
    if dataset is not None and (dataset.dtype.kind not in "uifb" or dataset.ndim < axes):
        raise ValueError(
            f"{dataset.file.filename}: found {dataset.name} {dataset.dtype} {dataset.shape}, expected real numbers and "
            f"{axes} axes or more"
        )
    return dataset


def _rows_at_once(dataset: h5py.Dataset, inner: int) -> int:
    """Rows of so many dimensions each that are read at once. Raises ValueError for a shape that no scan has."""
    size = dataset.dtype.itemsize * math.prod(dataset.shape[dataset.ndim - inner :] if inner else ())
    if size > LARGEST or math.prod(dataset.shape) > _MOST:
        raise ValueError(
            f"{dataset.file.filename}: found {dataset.name} {dataset.dtype} {dataset.shape}, expected at most "
            f"{LARGEST} bytes in a frame, and {_MOST} numbers in all"
        )
    return max(1, min(_ROWS, _AT_ONCE // max(size, 1)))


def _optional(file: h5py.File, name: str, usual: tuple[str, ...]) -> h5py.Dataset | None:
    if name:
        return _dataset(file, name)
    found: Any = next((file[one] for one in usual if isinstance(file.get(one), h5py.Dataset)), None)
    return found


def _length(dataset: h5py.Dataset, inner: int) -> int:
    """Rows that are there, however many scan axes they are spread over."""
    outer = dataset.shape[: dataset.ndim - inner] if inner else dataset.shape
    return int(np.prod(outer))


def _read(dataset: h5py.Dataset, first: int, last: int, inner: int) -> NDArray:
    """Rows first to last in C order, (row, y, x) or (row,)."""
    outer = dataset.ndim - inner
    if outer == 1 or (inner == 0 and dataset.size == dataset.shape[0]):
        values = np.asarray(dataset[first:last])
    else:
        where = np.unravel_index(np.arange(first, last), dataset.shape[:outer])
        values = np.stack([dataset[tuple(int(axis[k]) for axis in where)] for k in range(last - first)])
    return values.reshape(last - first, *dataset.shape[outer:]) if inner else values.reshape(last - first)
