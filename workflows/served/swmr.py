"""Writes HDF5 in SWMR mode, as a file writer does, a file for each scan; decisions come by a motion server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import zmq
from numpy.typing import NDArray

from served.zmq_motion import PandaAndMotion
from steering import Decision
from steering.sources.compression import compress


class SwmrPublisher:
    """Files scan-0.h5, scan-1.h5 and so on in a folder. A row is resized first, then written, then its key."""

    armed = False

    def __init__(self, folder: Path, *, shape: tuple[int, int] = (64, 64), keys: bool = True, flush: int = 1) -> None:
        """flush: frames between two flushes."""
        self._folder, self._shape, self._with_keys, self._each = folder, shape, keys, flush
        self._context = zmq.Context()
        self._panda = PandaAndMotion(self._context)
        pattern = folder / "scan-*.h5"
        self.addresses = {
            "frames": f"swmr:{pattern}",
            "positions": f"swmr:{pattern}?y=/entry/data/y&x=/entry/data/x",
            "motion": self._panda.addresses["motion"],
        }
        self._file: h5py.File | None = None
        self._scans = self._rows = 0
        self._written: list[int] = []
        """Frames whose keys are not written yet."""
        self.overflowed = 0

    def begin(self, scan: str) -> None:
        """A new file."""
        self._file = h5py.File(self._folder / f"scan-{self._scans}.h5", "w", libver="latest")
        self._scans += 1
        entry = self._file.create_group("entry")
        entry["title"] = scan
        data = entry.create_group("data")
        frames = {"chunks": (1, *self._shape), "maxshape": (None, *self._shape), "dtype": np.uint16}
        self._frames = data.create_dataset("data", (0, *self._shape), **frames, **hdf5plugin.Bitshuffle(cname="lz4"))
        many = {"chunks": (1024,), "maxshape": (None,)}
        self._axes = [data.create_dataset(name, (0,), np.float64, fillvalue=np.nan, **many) for name in "yx"]
        self._keys = entry.create_dataset("uniqueKeys", (0,), np.int64, **many) if self._with_keys else None
        self._rows, self._written = 0, []
        self._over = entry.create_dataset("scan_finished", (), np.int32)
        self._file.swmr_mode = True

    def frame(self, number: int, counts: NDArray) -> None:
        """Write a frame."""
        self.send(number, self.encoded(counts))

    def encoded(self, counts: NDArray) -> bytes:
        """A frame, to be written any number of times."""
        return compress("bslz4", counts)

    def send(self, number: int, payload: bytes) -> None:
        """Write a frame that is compressed already."""
        if number >= self._rows:
            # A row that is not written reads as fill values, which keys, or the reader's rule, tell from frames.
            self._rows = number + 1 if self._keys is None else (number // self._each + 1) * self._each
            self._frames.resize(self._rows, axis=0)
        self._frames.id.write_direct_chunk((number, 0, 0), payload)
        self._written.append(number)
        if number % self._each == self._each - 1:
            self._flush()

    def position(self, number: int, position: NDArray[np.float64]) -> None:
        """Write a position."""
        self.positions(number, position[None])

    def positions(self, number: int, positions: NDArray[np.float64]) -> None:
        """Write the positions (n, 2) of frames from a number on."""
        for dataset, values in zip(self._axes, positions.T, strict=True):
            if number + len(values) > len(dataset):
                dataset.resize(number + len(values), axis=0)
            dataset[number : number + len(values)] = values

    def missed(self) -> None:
        """Its row stays as it is."""

    def end(self, frames: int, last: bool) -> None:
        """Say that the scan is over, and close the file."""
        self._flush()
        self._over[()] = 1
        self._over.flush()
        self._file.close()

    def steered_by(self, apply: Callable[[Decision], None]) -> None:
        """By the motion server."""
        self._panda.steered_by(apply)

    def close(self) -> None:
        """Leave."""
        self._panda.close()
        self._context.term()

    def _flush(self) -> None:
        for dataset in (self._frames, *self._axes):
            dataset.flush()
        if self._keys is not None and self._written:  # after their rows
            first, last = min(self._written), max(self._written) + 1
            if last > len(self._keys):
                self._keys.resize(last, axis=0)
            keys = self._keys[first:last]
            numbers = np.array(self._written)
            keys[numbers - first] = numbers + 1
            self._keys[first:last] = keys
            self._keys.flush()
        self._written.clear()
