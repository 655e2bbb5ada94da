"""What is known of each frame of a scan: columns of rows, which one thread appends and others read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

BULKY = ("counts", "patch")
"""Columns that may leave memory: counts go to the run folder, patches are let go of."""
_BLOCK_BYTES = 2**23
"""A block of rows has about this size: what is written at once when it leaves memory."""
_BLOCK_ROWS = (16, 1024)
_PAGE = 1024
Rows = slice | NDArray[np.int64]


class Index:
    """Frame ids and their rows, in pages: it grows by small steps only."""

    def __init__(self) -> None:
        self._pages: dict[int, dict[int, int]] = {}

    def __contains__(self, frame: object) -> bool:
        return isinstance(frame, int) and frame in self._pages.get(frame // _PAGE, ())

    def get(self, frame: int) -> int | None:
        """The row of a frame; None where it is not known."""
        page = self._pages.get(frame // _PAGE)
        return None if page is None else page.get(frame)

    def add(self, frame: int, row: int) -> None:
        """Say where a frame stands."""
        self._pages.setdefault(frame // _PAGE, {})[frame] = row


class Table:
    """One row per frame, in the order of arrival, found again by frame id.

    One thread appends and sets; nothing that it does grows with the rows. Any number of others read: they see every row
    that `len` counts, whole, as it was before or after a `set`.
    """

    def __init__(self) -> None:
        self.row = Index()
        self.blocks: list[dict[str, NDArray | None]] = []
        """Columns of `block_rows` rows each; a bulky one that is None is gone."""
        self.block_rows = 0
        self.edits = 0
        """Twice the number of calls of `set`; odd during one."""
        self.changes: list[NDArray[np.int64]] = []
        """Rows of each call of `set`, in that order: what a reader must read again."""
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, frame_id: NDArray[np.int64], **columns: NDArray) -> int:
        """Add frames; every call names the same columns. Returns how many bytes of bulky columns were newly asked for.

        Raises ValueError for a frame that is known already.
        """
        again = [frame for frame in frame_id.tolist() if frame in self.row]
        if again:
            raise ValueError(f"found frame ids {again[:5]} a second time in one scan, expected each frame once")
        values = {"frame_id": frame_id} | {name: np.asarray(column) for name, column in columns.items()}
        if not self.block_rows:
            row = sum(each.dtype.itemsize * math.prod(each.shape[1:]) for each in values.values())
            low, high = _BLOCK_ROWS
            self.block_rows = min(high, max(low, _BLOCK_BYTES // row))
        done, n, asked = 0, len(frame_id), 0
        while done < n:
            at = (self._rows + done) % self.block_rows
            if self._rows + done == len(self.blocks) * self.block_rows:
                asked += self._grow(values)
            taken = min(n - done, self.block_rows - at)
            for name, column in values.items():
                self._there(len(self.blocks) - 1, name)[at : at + taken] = column[done : done + taken]
            done += taken
        for i, frame in enumerate(frame_id.tolist()):
            self.row.add(frame, self._rows + i)
        self._rows += n  # from here on others see them
        return asked

    def restore(self, columns: dict[str, NDArray], block_rows: int) -> None:
        """Add a block of rows as another table had it; bulky columns may lack. Raises ValueError where it does not
        follow on what is there."""
        ids = columns["frame_id"]
        if self._rows % block_rows or self.block_rows not in (0, block_rows) or len(ids) > block_rows:
            raise ValueError(
                f"found a block of {len(ids)} rows after {self._rows}, expected full blocks of {block_rows} before it"
            )
        self.block_rows = block_rows
        block: dict[str, NDArray | None] = dict.fromkeys(BULKY)
        for name, values in columns.items():
            there = np.empty((block_rows, *values.shape[1:]), values.dtype)
            there[: len(ids)] = values[: len(ids)]
            block[name] = there
        self.blocks.append(block)
        for i, frame in enumerate(ids.tolist()):
            self.row.add(frame, self._rows + i)
        self._rows += len(ids)

    def set(self, rows: NDArray[np.int64], **columns: NDArray) -> None:
        """Write these rows of some columns; what is gone of them is left out."""
        self.edits += 1
        for name, column in columns.items():
            for block, at, where in self._parts(rows):
                there = self.blocks[block][name]
                if there is not None:
                    there[at] = column[where]
        self.edits += 1
        self.changes.append(rows)

    def fill(self, rows: NDArray[np.int64], **columns: NDArray) -> None:
        """Write what was not known yet when these rows were appended. Whoever has read them does not hear of it."""
        for name, column in columns.items():
            for block, at, where in self._parts(rows):
                self._there(block, name)[at] = column[where]

    def read(self, *names: str, rows: Rows = slice(None)) -> tuple[NDArray, ...]:
        """Copies of these rows of some columns, each row whole. Raises KeyError for rows that are gone."""
        which = np.arange(*rows.indices(self._rows)) if isinstance(rows, slice) else rows
        parts: list[list[NDArray]] = [[] for _ in names]
        order = []
        for block, at, where in self._parts(which):
            for mine, values in zip(parts, self._whole(block, at, names), strict=True):
                mine.append(values)
            order.append(where)
        if not parts[0]:
            return tuple(self._empty(name) for name in names)
        place = np.concatenate(order)
        if (np.diff(place) == 1).all():
            return tuple(mine[0] if len(mine) == 1 else np.concatenate(mine) for mine in parts)
        back = np.argsort(place)
        return tuple(np.concatenate(mine)[back] for mine in parts)

    def __getitem__(self, name: str) -> NDArray:
        """A copy of a whole column."""
        return self.read(name)[0]

    def kept(self, rows: NDArray[np.int64], name: str) -> NDArray[np.bool_]:
        """(n,) True for rows of which this column is still there, in memory or in the run folder."""
        if not len(rows):
            return np.zeros(0, bool)
        blocks, place = np.unique(rows // self.block_rows, return_inverse=True)
        return np.array([self.blocks[block][name] is not None for block in blocks.tolist()])[place]

    def leave(self, block: int, move: Callable[[NDArray], NDArray | None]) -> int:
        """Let the bulky columns of a block that is full leave memory. Returns the bytes that they took.

        move: takes counts and returns what stands for them from now on, None: nothing does.
        """
        columns = self.blocks[block]
        taken = bulk_of(columns)
        counts = columns["counts"]
        if isinstance(counts, np.ndarray) and not isinstance(counts, np.memmap):
            columns["counts"] = move(counts)
        columns["patch"] = None
        return taken

    def bulk(self, block: int) -> int:
        """Bytes of memory that the bulky columns of a block take."""
        return bulk_of(self.blocks[block])

    def _grow(self, values: dict[str, NDArray]) -> int:
        block: dict[str, NDArray | None] = {
            name: np.empty((self.block_rows, *column.shape[1:]), column.dtype) for name, column in values.items()
        }
        self.blocks.append(block)
        return bulk_of(block)

    def _there(self, block: int, name: str) -> NDArray:
        column = self.blocks[block][name]
        if column is None:
            raise KeyError(f"found {name} of rows from {block * self.block_rows} on no longer kept, expected them")
        return column

    def _whole(self, block: int, at: Rows, names: tuple[str, ...]) -> list[NDArray]:
        while True:
            before = self.edits
            values = [np.array(self._there(block, name)[at]) for name in names]
            if before % 2 == 0 and self.edits == before:
                return values

    def _parts(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, Rows, NDArray[np.int64]]]:
        """Block by block: its number, the rows of it, and where these stand among `rows`."""
        if not len(rows):
            return
        block, at = np.divmod(rows, self.block_rows)
        for number in np.unique(block).tolist():
            where = np.flatnonzero(block == number)
            inside = at[where]
            if len(inside) == inside[-1] - inside[0] + 1 and (np.diff(inside) == 1).all():
                yield number, slice(int(inside[0]), int(inside[-1]) + 1), where
            else:
                yield number, inside, where

    def _empty(self, name: str) -> NDArray:
        column = self.blocks[0][name] if self.blocks else None
        return np.zeros((0,), np.float64) if column is None else column[:0].copy()


def bulk_of(block: dict[str, NDArray | None]) -> int:
    """Bytes of memory that the bulky columns of a block take."""
    columns = (block[name] for name in BULKY if name in block)
    return sum(each.nbytes for each in columns if each is not None and not isinstance(each, np.memmap))
