"""Rows of a file that is being written (SWMR): which of them are there, and whether more will come.

A row that is not written yet reads as fill values that look like data. Where the file has keys (integers, 0: not
written) a row is taken when its key is there. Without keys the rule is: a frame, or a position, that holds nothing but
the dataset's fill value is never taken, and a position of which one number is the fill value not before later rows have
been there for `skip_s`, so that it is not one half of a position. A row that is not there by then counts as missing.
Where many rows in a row are missing each look goes one block of rows further, so that a file that is laid out whole
beforehand is not read whole at each look.

The number of a frame is its row, or, in files of areaDetector, its NDArrayUniqueId less that of the first row: a writer
that drops an array leaves no row out. Positions that are written with the frames have the numbers of their frames.

The scan is over when the scalar `finished` is not 0, or when `total` rows are there. Where a file does not say when it
is finished the scan is over as well when nothing was added for `quiet_s`: elsewhere that is a pause.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import hdf5plugin  # noqa: F401 - registers the compression filters that detectors write with
import numpy as np
from numpy.typing import NDArray

from steering.sources.swmr_file import (
    RowNumbers,
    SwmrFile,
    Unfit,
    dataset_at,
    length,
    optional,
    read_rows,
    real_numbers,
    rows_at_once,
    written_with,
)

_KEYS = (
    "/entry/keys",
    "/entry/uniqueKeys",
    "/entry/solstice_scan/keys/uniqueKeys",
    "/entry/diamond_scan/keys/uniqueKeys",
)
_FINISHED = ("/entry/scan_finished", "/entry/solstice_scan/scan_finished", "/entry/diamond_scan/scan_finished")
_NUMBERS = (
    "/entry/instrument/NDAttributes/NDArrayUniqueId",
    "/entry/instrument/detector/NDAttributes/NDArrayUniqueId",
    "/entry/NDAttributes/NDArrayUniqueId",
    "/defaults/NDArrayUniqueId",
)
_STAT_S = 0.004
"""Seconds between two questions whether a file has changed, which cost next to nothing."""
ANYWAY_S = 0.03
"""Seconds after which it is looked at anyway: a network file system may not say so at once, and a file's clock may tick
more slowly than its writer writes."""
_PATIENCE_S, _OPEN_S, _REOPEN_S = 5.0, 1.0, 0.05
"""Seconds that a file may be unreadable, that it is kept open while nothing comes, and between two openings."""


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A file that is written, and how its rows are known to be there."""

    file: str
    """Path, or a pattern of paths."""
    keys: str = ""
    """Dataset of integers, 0 where a row is not written; empty: one of the usual names, or none."""
    finished: str = ""
    """Scalar that is not 0 when the scan is over; empty: one of the usual names, or none."""
    number: str = ""
    """Dataset of the frames' numbers, one for each row; none: rows count; empty: one of the usual names, where rows
    are in the order in which they were written."""
    first: int | None = None
    """Number there of the scan's first frame; None: that of the first row, which is wrong where the very first frame
    was not written."""
    total: int = 0
    """Rows of a scan; 0: not known."""
    quiet_s: float = 60.0
    """Seconds without a new row after which the scan is over, where the file has no `finished`."""
    skip_s: float = 2.0
    """Seconds for which a row may be missing while later ones are there."""
    steered: bool = False
    """What the run asks for is written there: not into a file that nobody writes to any more."""


class Run(NamedTuple):
    """Rows that are written and follow one another."""

    first: int
    numbers: NDArray[np.int64]
    """(row,) of their frames"""
    values: list[NDArray]
    """(row, ...) of each dataset"""


class _Gap(NamedTuple):
    """Rows, a block of them at most, that were not there while later ones were."""

    first: int
    last: int
    """After the last one."""
    since: float


def _between(first: int, runs: list[Run], last: int, since: float, most: int) -> list[_Gap]:
    """The rows from first to last that are in none of these runs, in gaps of so many rows at most."""
    edges = [first, *(edge for run in runs for edge in (run.first, run.first + len(run.numbers))), last]
    holes = zip(edges[::2], edges[1::2], strict=True)
    return [_Gap(row, min(row + most, high), since) for low, high in holes for row in range(low, high, most)]


def rows_of(
    path: Path, where: Followed, names: tuple[str, ...], inner: int, stopped: threading.Event
) -> Iterator[Run | None]:
    """Runs of rows that are written, in their order; None now and then. inner: dimensions of one row's values."""
    with SwmrFile.followed(path) as shared:
        follower = _Follower(shared, where, names, inner)
        changed = time.monotonic()
        while not stopped.is_set():
            before = shared.written()
            runs = follower.look()
            if runs:
                changed = time.monotonic()
                yield from runs
            elif follower.over or (not follower.says_end and time.monotonic() - changed > where.quiet_s):
                follower.refuse_unread()
                return
            else:
                yield None
            anyway = time.monotonic() + ANYWAY_S
            while not follower.more and not stopped.wait(_STAT_S):
                if shared.written() != before or time.monotonic() > anyway:
                    break


class _Follower:
    """Looks for rows that have been written since the last look."""

    def __init__(self, shared: SwmrFile, where: Followed, names: tuple[str, ...], inner: int) -> None:
        self._shared, self._where, self._names, self._inner = shared, where, names, inner
        self._generation = -1
        self._data: list[h5py.Dataset] = []
        self._keys: h5py.Dataset | None = None
        self._numbers: RowNumbers | None = None
        self._unnumbered = 0
        """Rows that are written and whose numbers are not."""
        self._finished: h5py.Dataset | None = None
        self._rows = 1
        """That are read at once."""
        self._patience = min(where.quiet_s, _PATIENCE_S)
        self._torn: float | None = None
        """Since when the file cannot be read."""
        self._error: Exception | None = None
        """And why."""
        self._next = 0
        """After the last row that was there."""
        self._ahead = 0
        """Where rows are looked for next, after a block of them that holds none."""
        self._gaps: list[_Gap] = []
        """Rows before the last one that were not there, those that are looked at next first."""
        self._ended = False
        """The file said, before this look, that the scan is over."""
        self.over = self.more = False
        """No row will come; another look may find some at once."""

    @property
    def says_end(self) -> bool:
        """Whether the file says when the scan is over."""
        return self._finished is not None

    def look(self) -> list[Run]:
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
            self._data = [real_numbers(dataset_at(file, name), self._inner + 1) for name in self._names]
            self._keys = real_numbers(optional(file, self._where.keys, _KEYS), 1)
            self._finished = real_numbers(optional(file, self._where.finished, _FINISHED), 0)
            self._numbers = self._numbers_in(file)
            self._rows = min(rows_at_once(dataset, self._inner) for dataset in self._data)
            self._generation = self._shared.generation

    def _numbers_in(self, file: h5py.File) -> RowNumbers | None:
        """The numbers of rows, where the file has them and these datasets are written with the frames."""
        where = self._where
        if where.number == "none":
            return None
        found, asked = optional(file, where.number, _NUMBERS), bool(where.number) or where.first is not None
        if found is None:
            return RowNumbers(dataset_at(file, _NUMBERS[0]), where.first) if asked else None
        if not asked and (found.ndim > 1 or any(each.ndim > self._inner + 1 for each in self._data)):
            return None  # spread over scan axes: a row is the place of a frame, and no array before it need be missing
        beside = {self._inner > 0 or written_with(each, found) for each in self._data}
        if not asked and len(beside) > 1:
            raise Unfit(
                f"{file.filename}: found columns of which some are attributes that are written with the frames, "
                "expected all or none: give number=/PATH, or number=none, which counts rows"
            )
        return RowNumbers(real_numbers(found, 1), where.first) if asked or True in beside else None

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
        if isinstance(self._error, Unfit):
            raise self._error
        if self._error is not None:
            raise OSError(
                f"{self._shared.path}: found a file that cannot be followed ({self._error}), expected one in SWMR "
                "mode: its writer must set swmr_mode, on a local disk"
            ) from self._error
        if self._unnumbered and self._numbers is not None and self._next <= 1:
            raise ValueError(
                f"{self._shared.path}: found {self._unnumbered} rows without a number in {self._numbers.name}, "
                "expected one for each: give number=/PATH of another dataset, or number=none, which counts rows"
            )

    def _look(self) -> list[Run]:
        rows, gaps = self._rows, self._gaps_in_turn()
        ahead = max(self._ahead, self._next + rows)
        blocks = [(self._next, self._next + rows), (ahead, ahead + rows)]
        keys = self._written_by_keys([*blocks, *((gap.first, gap.last) for gap in gaps)])
        for dataset in self._data:  # after the keys: a key is written after its row
            dataset.refresh()
        there, now, self._unnumbered = min(length(dataset, self._inner) for dataset in self._data), time.monotonic(), 0
        found, missing = list[Run](), list[_Gap]()
        for gap in gaps:
            late = self._ended or now - gap.since > self._where.skip_s
            runs = self._written(gap.first, gap.last, keys, sure=not late)
            found += runs
            missing += [] if late else _between(gap.first, runs, gap.last, gap.since, rows)
        for first, last in blocks:
            new = self._written(first, min(there, last), keys, sure=not self._ended)
            if new or last >= there:
                break
        through = ahead + rows >= there
        self._gaps = [*self._gaps[len(gaps) :], *missing]
        if new:
            self._gaps += _between(self._next, new, new[-1].first, now, rows)
            self._next = new[-1].first + len(new[-1].numbers)
        self._ahead = 0 if new or through else ahead + rows
        if not found and not new:
            self._judge_end(through)
        self.more = (bool(new) and self._next == last) or (self._ended and not self.over)
        return [*found, *new]

    def _gaps_in_turn(self) -> list[_Gap]:
        """Those that are looked at now: as many as have the rows of a block in all, or one."""
        rows = itertools.accumulate(gap.last - gap.first for gap in self._gaps)
        return self._gaps[: max(1, sum(each <= self._rows for each in rows))]

    def _judge_end(self, through: bool) -> None:
        """Whether no row will come, after a look that found none. through: it was the last of those that look at all
        rows in turn."""
        full = 0 < self._where.total <= self._next
        self.over = not self._gaps and (full or (self._ended and through))
        if not self.over and self._read_finished() != self._ended:
            # All rows are looked at once more after this was read: what was written before it is seen then.
            self._ended, self._ahead = not self._ended, 0

    def _written_by_keys(self, blocks: list[tuple[int, int]]) -> dict[int, NDArray[np.bool_]] | None:
        """(row,) whether the keys of blocks, first to last, are there, by their first rows; None: there are no keys."""
        if self._keys is None:
            return None
        self._keys.refresh()
        found = dict[int, NDArray[np.bool_]]()
        for first, last in blocks:
            there = max(first, min(self._keys.size, last))
            found[first] = np.zeros(last - first, bool)
            if there > first:
                found[first][: there - first] = read_rows(self._keys, first, there, 0) != 0
        return found

    def _written(self, first: int, last: int, keys: dict[int, NDArray[np.bool_]] | None, *, sure: bool) -> list[Run]:
        """Runs of rows among these that are there; sure: with no number that may be a fill value."""
        if last <= first or (keys is not None and not keys[first].any()):
            return []
        values = [read_rows(dataset, first, last, self._inner) for dataset in self._data]
        there = self._is_there(values, sure) if keys is None else keys[first][: last - first]
        numbers = np.arange(first, last)
        if self._numbers is not None:
            numbered, numbers = self._numbers.of(first, last, sure=sure)
            self._unnumbered += int((there & ~numbered).sum())
            there = there & numbered
        there = np.concatenate([[False], there, [False]])
        edges = np.flatnonzero(np.diff(there.astype(np.int8))).reshape(-1, 2)
        return [Run(first + int(low), numbers[low:high], [each[low:high] for each in values]) for low, high in edges]

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
            raise Unfit(
                f"{self._shared.path}: found {self._finished.name} {self._finished.shape}, expected one number, not 0 "
                "when the scan is over"
            )
        return bool(np.ravel(self._finished[()])[0])
