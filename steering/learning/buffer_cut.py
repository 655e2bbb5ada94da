"""What a rehearsal buffer held at one moment, read by another thread while the buffer goes on changing.

A cut costs the thread that inserts next to nothing: rows are copied only when they are about to be overwritten and were
not read yet (copy on write). An insert overwrites a few rows in a step, so few are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.learning.rows import Rows

BLOCK_BYTES = 2**20
"""Read at once: copies of this size let other threads run, and are done before they are missed."""


class Overrun(RuntimeError):
    """So much was overwritten before it was read that the cut was given up."""


class Cut:
    """The samples of a buffer at one moment: those that were written after clock `since`, in the order of their slots.

    Made by the thread that inserts, which also announces what is about to be overwritten (`keep`); read (`blocks`) by
    another one.

    Args:
        rows: the buffer's storage, by field.
        counters: the rest of its state, see BufferState.
        inserted_at, key: int64 (n,) of its filled slots; copied here.
        since: 0 for all samples.
        most_bytes: that may be copied aside, for a disk that is slower than the inserts. Beyond it the cut is given up.
        done: called when the cut no longer needs to hear of it.
    """

    def __init__(
        self,
        rows: Mapping[str, Rows],
        counters: Mapping[str, Any],
        *,
        inserted_at: NDArray[np.int64],
        key: NDArray[np.int64],
        since: int,
        most_bytes: int,
        done: Callable[[], None],
    ) -> None:
        self.rows, self.counters, self.since = dict(rows), dict(counters), since
        self.count = len(key)
        """Samples that the buffer held."""
        self.slots = np.flatnonzero(inserted_at > since) if since else np.arange(self.count)
        """(n,) of those that are read, ascending."""
        self.inserted_at, self.key = (one[self.slots] if since else one.copy() for one in (inserted_at, key))
        self.kept_bytes = 0
        """Copied aside so far."""
        self._most, self._done = most_bytes, done
        self._lock = threading.Lock()
        self._wanted = np.full(self.count, not since)
        if since:
            self._wanted[self.slots] = True
        self._aside: dict[int, tuple[dict[str, NDArray[np.uint8]], int]] = {}
        """Of a slot that was overwritten since: its rows by field, and which of them it is."""
        self._overrun = False

    def keep(self, slots: NDArray[np.int64]) -> None:
        """Copy what these slots hold, where it was not read yet: they are about to be overwritten."""
        with self._lock:
            there = np.sort(slots[slots < self.count])
            there = there[self._wanted[there]]
            if self._overrun or not len(there):
                return
            width = sum(rows.width for rows in self.rows.values())
            if self.kept_bytes + len(there) * width > self._most:
                self._overrun = True
                self._aside.clear()
                return
            self._wanted[there] = False
            self.kept_bytes += len(there) * width
            copies = {name: np.empty((len(there), rows.width), np.uint8) for name, rows in self.rows.items()}
            for name, rows in self.rows.items():
                rows.read(there, copies[name])
            self._aside |= {slot: (copies, index) for index, slot in enumerate(there.tolist())}

    def blocks(self) -> Iterator[tuple[int, dict[str, NDArray[np.uint8]]]]:
        """Blocks of consecutive samples: (index of the first, uint8 (m, width) by field), valid until the next one.

        Raises Overrun where more was overwritten meanwhile than may be copied aside.
        """
        most = max(1, BLOCK_BYTES // max(1, sum(rows.width for rows in self.rows.values())))
        staging = {name: np.empty((most, rows.width), np.uint8) for name, rows in self.rows.items()}
        for first in range(0, len(self.slots), most):
            slots = self.slots[first : first + most]
            block = {name: space[: len(slots)] for name, space in staging.items()}
            for name, rows in self.rows.items():
                rows.read(slots, block[name])
            # What was overwritten while it was copied was copied aside before.
            with self._lock:
                if self._overrun:
                    raise Overrun(
                        f"found {self.kept_bytes / 2**20:.0f} MiB of the rehearsal buffer overwritten before they were "
                        "written to the disk, expected a disk that is faster than the inserts: the checkpoint was "
                        "given up; make checkpoints on a faster disk"
                    )
                moved = [(i, *self._aside.pop(slot)) for i, slot in enumerate(slots.tolist()) if slot in self._aside]
                for index, copies, row in moved:
                    for name, copied in copies.items():
                        block[name][index] = copied[row]
                self._wanted[slots] = False
            yield first, block

    def close(self) -> None:
        """Nothing is read any more."""
        with self._lock:
            self._wanted[:] = False
            self._aside.clear()
        self._done()
