"""Files that are read while they are written, and their datasets: one handle of each file in this process, opened anew
now and then.

HDF5 keeps one state for all handles of a file in a process. Part of it, such as the end of the file, is read only when
the file is opened, so that what is laid out later at its end cannot be read: the file must then be closed by everybody
and opened again.

A reader of SWMR tries a part whose checksum is wrong again 100 times, after twice as long each time, which is for ever
in a file that is damaged, or whose writer was killed, and it stops the whole process meanwhile: it is made to give up.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from steering.sources.compression import LARGEST

_ROWS, _AT_ONCE, _MOST = 64, 2**27, 2**48
"""Rows, and bytes of them, that are read at once; numbers that a dataset has at most."""
_PIECES = 2**16
"""Of a file's layout that a frame is in, at most, and that are read at once: each takes some 10 us."""
_HIGHEST = 2**40
"""Frame numbers are below."""
_ATTEMPTS = 24
"""They take 17 ms in all."""
_Found = TypeVar("_Found", h5py.Dataset, h5py.Dataset | None)


class Unfit(ValueError):
    """A file is not as is expected of it, in our words; errors of h5py are other ones."""


class SwmrFile:
    """A file that one or several threads follow. Use it while holding `turn`, and look at `generation` first: another
    one means that what was taken out of `file` before is closed."""

    turn = threading.RLock()
    _followed: ClassVar[dict[str, SwmrFile]] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: h5py.File | None = None
        self.generation = 0
        self.opened = 0.0
        """time.monotonic"""
        self._users = 0
        self._descriptor = os.open(path, os.O_RDONLY)

    @classmethod
    @contextlib.contextmanager
    def followed(cls, path: Path) -> Iterator[SwmrFile]:
        """The one handle of a file, not opened yet or as others have it."""
        with cls.turn:
            shared = cls._followed.get(str(path)) or cls(path)
            cls._followed[str(path)] = shared
            shared._users += 1
        try:
            yield shared
        finally:
            with cls.turn:
                shared._users -= 1
                if not shared._users:
                    del cls._followed[str(path)]
                    shared._close()
                    os.close(shared._descriptor)

    def written(self) -> tuple[int, int]:
        """What changes when something is written to the file: its time stamp, and its bytes."""
        status = os.fstat(self._descriptor)
        return status.st_mtime_ns, status.st_size

    def open(self) -> h5py.File:
        """The open file. Raises OSError where it cannot be opened now."""
        with self.turn:
            return self.file if self.file is not None else self.reopen()

    def reopen(self) -> h5py.File:
        """Close it for all and open it again; also where it was renamed meanwhile. Raises OSError."""
        with self.turn:
            self._close()
            self.generation += 1
            self.opened = time.monotonic()
            access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
            access.set_libver_bounds(h5py.h5f.LIBVER_LATEST, h5py.h5f.LIBVER_LATEST)
            _give_up_soon(access)
            flags = h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ
            try:
                self.file = h5py.File(h5py.h5f.open(os.fsencode(self._name()), flags, fapl=access))
            except (RuntimeError, ValueError) as error:  # of h5py, by what is damaged
                raise OSError(str(error)) from error
            return self.file

    def _name(self) -> str:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return str(self.path)
        return f"/proc/self/fd/{self._descriptor}"

    def _close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(RuntimeError, OSError, ValueError):
                self.file.close()
        self.file = None


def _give_up_soon(access: h5py.h5p.PropFAID) -> None:
    """Set how often a part of a file is read again; h5py has no name for it."""
    library = _hdf5()
    if library is not None:
        library.H5Pset_metadata_read_attempts(ctypes.c_int64(access.id), ctypes.c_uint(_ATTEMPTS))


@functools.cache
def _hdf5() -> ctypes.CDLL | None:
    """The library that h5py has loaded; None where it is not found: then the source ends a receiver that is stuck."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for name in dict.fromkeys(line.partition("/")[2] for line in lines):
        if name.rpartition("/")[2].startswith("libhdf5") and "_hl" not in name:
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(f"/{name}")
                if hasattr(library, "H5Pset_metadata_read_attempts"):
                    return library
    return None


class RowNumbers:
    """The numbers of frames in a dataset beside them, one for each row."""

    def __init__(self, found: h5py.Dataset, first: int | None) -> None:
        """first: the number there of the scan's first frame; None: that of the first row. Raises ValueError for a shape
        that no scan has."""
        rows_at_once(found, 0)
        self.name = str(found.name)
        self._dataset, self._first, self._relative = found, first, first is None

    def of(self, low: int, high: int, *, sure: bool) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """(row,) whether the numbers of these rows are written, and those that are, from 0 on. sure: a fill value is no
        number. Raises ValueError for what numbers no frames."""
        self._dataset.refresh()
        found = np.full(high - low, np.nan)
        there = min(high, length(self._dataset, 0)) - low
        if there > 0:
            found[:there] = read_rows(self._dataset, low, low + there, 0)
        fill = float(self._dataset.fillvalue)
        written = ~np.isnan(found) & (found != fill)
        if low == 0 and found[0] == fill == self._first:
            written[0] = written.any() or not sure  # of a scan whose numbers begin with it
        begins = low == 0 and self._relative  # the first row has 0, whatever is written there
        written[0] &= not begins
        rows, numbers = np.flatnonzero(written), np.zeros(high - low, np.int64)
        if len(rows):
            numbers[rows] = self._counted(low + rows, found[rows])
        written[0] |= begins
        return written, numbers

    def _counted(self, rows: NDArray[np.int64], found: NDArray[np.float64]) -> NDArray[np.int64]:
        if self._first is None:
            # Read after those of later rows: it was written before them.
            self._dataset.refresh()
            first = np.asarray(read_rows(self._dataset, 0, 1, 0), np.float64)
            self._first = int(self._whole(np.zeros(1, np.int64), first, 0)[0])
        return self._whole(rows, found, self._first + self._relative) - self._first

    def _whole(self, rows: NDArray[np.int64], found: NDArray[np.float64], least: int) -> NDArray[np.int64]:
        wrong = ~((found >= least) & (found < _HIGHEST) & (found == np.floor(found)))
        if wrong.any():
            raise Unfit(
                f"{self._dataset.file.filename}: found the number {found[wrong][0]:g} of row {rows[wrong][0]} in "
                f"{self.name}, expected whole ones of {least} or more: give number=/PATH of another dataset, first=N "
                "of the scan's first frame, or number=none, which counts rows"
            )
        return found.astype(np.int64)


def written_with(found: h5py.Dataset, numbers: h5py.Dataset) -> bool:
    """Whether a dataset gets a row with each frame that is written, as the attributes of areaDetector's arrays do."""
    return "NDAttrName" in found.attrs or found.parent == numbers.parent


def dataset_at(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset of a name. Raises ValueError where there is none."""
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        here: list[str] = []
        file.visititems(lambda path, node: here.append(f"/{path}") if isinstance(node, h5py.Dataset) else None)
        raise Unfit(f"{file.filename}: found the datasets {', '.join(here)[:400]}, expected {name} among them")
    return found


def real_numbers(found: _Found, axes: int) -> _Found:
    """The dataset, if there is none or it is one of real numbers with so many axes or more. Raises ValueError."""
    if found is not None and (found.dtype.kind not in "uifb" or found.ndim < axes):
        raise Unfit(
            f"{found.file.filename}: found {found.name} {found.dtype} {found.shape}, expected real numbers and "
            f"{axes} axes or more"
        )
    return found


def rows_at_once(found: h5py.Dataset, inner: int) -> int:
    """Rows of so many dimensions each that are read at once. Raises ValueError for a shape that no scan has."""
    row = found.shape[found.ndim - inner :] if inner else ()
    size, pieces = found.dtype.itemsize * math.prod(row), 1
    if found.chunks is not None:
        pieces = math.prod(-(-n // piece) for n, piece in zip(row, found.chunks[found.ndim - inner :], strict=True))
    if size > LARGEST or math.prod(found.shape) > _MOST or pieces > _PIECES:
        raise Unfit(
            f"{found.file.filename}: found {found.name} {found.dtype} {found.shape} in pieces of {found.chunks}, "
            f"expected at most {LARGEST} bytes and {_PIECES} pieces in a frame, and {_MOST} numbers in all"
        )
    return max(1, min(_ROWS, _AT_ONCE // max(size, 1), _PIECES // max(pieces, 1)))


def optional(file: h5py.File, name: str, usual: tuple[str, ...]) -> h5py.Dataset | None:
    """The dataset of a name; without one the first that is there of the usual names."""
    if name:
        return dataset_at(file, name)
    found: Any = next((file[one] for one in usual if isinstance(file.get(one), h5py.Dataset)), None)
    return found


def length(found: h5py.Dataset, inner: int) -> int:
    """Rows that are there, however many scan axes they are spread over."""
    outer = found.shape[: found.ndim - inner] if inner else found.shape
    return int(np.prod(outer))


def read_rows(found: h5py.Dataset, first: int, last: int, inner: int) -> NDArray:
    """Rows first to last in C order, (row, y, x) or (row,)."""
    outer = found.ndim - inner
    if outer == 1 or (inner == 0 and found.size == found.shape[0]):
        values = np.asarray(found[first:last])
    else:
        # A piece of each line of the last scan axis: one reading costs as much for a line as for a row.
        width, lines = found.shape[outer - 1], found.shape[: outer - 1]
        edges = [first, *range((first // width + 1) * width, last, width), last]
        pieces = []
        for low, high in itertools.pairwise(edges):
            line = [int(axis) for axis in np.unravel_index(low // width, lines)]
            pieces.append(found[(*line, slice(low % width, low % width + high - low))])
        values = np.concatenate(pieces)
    return values.reshape(last - first, *found.shape[outer:]) if inner else values.reshape(last - first)
