"""A recorded scan played back as a beamline: it answers only the positions that are asked for."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.ptychography import Canvas
from steering.records import Decision, Field, make_chunk
from steering.sources.pacing import Pacer
from steering.sources.recordings import Recording

_AGAIN = 100
"""Frames of a chunk that is given again."""


class Replay:
    """A source: each position asked for is answered with the nearest recorded frame that is not yet given away.

    geometry, probe (m, N, N) complex64 (rescaled to the recorded counts), field, candidates (n, 2) = the recorded
    positions, frame_rate: see the contract, `Source`. A frame's id is its number in the file, and its
    position the recorded one. No frame is given twice; the scan ends when all are given.
    """

    def __init__(
        self,
        recording: Recording,
        *,
        tolerance: float,
        frame_rate: float = 50.0,
        chunk_frames: int = 10,
        scan: str = "scan",
        reference: tuple[NDArray[np.complex64], Canvas] | None = None,
    ) -> None:
        """tolerance: in the geometry's length unit. reference: a trusted object (Y, X) and where it lies, if known."""
        if not (np.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"found tolerance={tolerance}, expected 0 or more {recording.geometry.length_unit}")
        self.recording = recording
        self.geometry = recording.geometry
        self.probe = recording.fitted_probe()
        self.candidates = recording.positions
        low, high = recording.positions.min(0), recording.positions.max(0)
        self.field = Field(float(low[0]), float(high[0]), float(low[1]), float(high[1]))
        self.frame_rate = frame_rate
        self.tolerance = tolerance
        self.scan = scan
        self.scans = (scan,)
        self.frames = len(recording.counts)
        self._reference = reference
        self._handed: Collection[int] = ()
        self._index = {number: index for index, number in enumerate(recording.numbers.tolist())}
        self._free = np.ones(len(recording.positions), bool)
        self._pacer: Pacer[int] = Pacer([len(recording.positions)], frame_rate=frame_rate, chunk_frames=chunk_frames)

    @property
    def frames_dropped(self) -> int:
        """Frames played that the consumer of chunks() was too slow to take."""
        return self._pacer.frames_dropped

    def chunks(self) -> Iterator[xr.Dataset]:
        """Play; yield chunks in the recorded dtype until all is given, a decision to stop is done, or close()."""
        self._skip_handed()
        return self._pacer.run(self._measure)

    def position(self) -> dict[str, Any]:
        """See the contract, `Source`."""
        with self._pacer.lock:
            return {**self._pacer.position(), "given": np.flatnonzero(~self._free).tolist()}

    def resume(self, position: Mapping[str, Any], handed: Collection[int] = ()) -> None:
        """See the contract, `Source`."""
        self._free[np.array(position["given"], np.int64)] = False
        self._pacer.resume(position, int)
        self._handed = frozenset(handed)

    def again(self, ids: Sequence[int]) -> Iterator[xr.Dataset]:
        """See the contract, `Source`: every frame of the recording."""
        known = [self._index[i] for i in sorted(set(ids)) if i in self._index]
        for start in range(0, len(known), _AGAIN):
            yield self._measure(0, known[start : start + _AGAIN], np.zeros(0))

    def _skip_handed(self) -> None:
        """Leave out what was handed out before this source was made, up to the last such frame."""
        handed = {self._index[number] for number in self._handed if number in self._index}
        rows = [row for row, index in enumerate(self._pacer.waiting()) if index in handed]
        self._pacer.skip(1 + max(rows, default=-1))

    def apply(self, decision: Decision) -> NDArray[np.float64]:
        """Queue the recorded frames nearest to a decision's positions; dwell, where given, sets the pace only. Returns
        the positions (m, 2) that have none within the tolerance."""
        with self._pacer.lock:
            found = [self._claim(position) for position in decision.positions]
            kept = [k for k, index in enumerate(found) if index is not None]
            dwell = None if decision.dwell is None else np.asarray(decision.dwell, np.float64)[kept]
            targets = [index for index in found if index is not None]
            self._pacer.add(targets, dwell=dwell, stop=decision.stop, scan=decision.scan)
            return decision.positions[[index is None for index in found]]

    def close(self) -> None:
        """End the scan; a waiting chunks() hands out what was played and ends."""
        self._pacer.close()

    def truth(self, scan: str) -> tuple[NDArray[np.complex64], Canvas] | None:
        """The reference (Y, X) and where it lies; None for another scan, or where none was given."""
        return self._reference if scan == self.scan else None

    def _claim(self, position: NDArray[np.float64]) -> int | None:
        distance = np.hypot(*(self.recording.positions - position).T)
        distance[~self._free] = np.inf
        nearest = int(distance.argmin())
        if not distance[nearest] <= self.tolerance:
            return None
        self._free[nearest] = False
        return nearest

    def _measure(self, part: int, targets: list[int], seconds: NDArray[np.float64]) -> xr.Dataset:
        counts, positions = self.recording.counts[targets], self.recording.positions[targets]
        numbers = self.recording.numbers[targets]
        return make_chunk(counts, numbers, positions, self.geometry, scan=self.scan, acquired=time.time())
