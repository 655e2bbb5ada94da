"""The contract of a source: whatever yields chunks of frames and measures where it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.records.canvas import Canvas
from steering.records.decisions import Decision
from steering.records.geometry import Field, Geometry


class Source(Protocol):
    """The contract. A source is built in the driver and sent to a worker: it pickles until chunks() is called."""

    geometry: Geometry
    probe: NDArray[np.complex64]
    """(mode, y, x), scaled so that sum |probe|^2 is the counts of a frame on a transparent object."""
    field: Field
    """Limits of the probe's centre, in geometry.length_unit."""
    candidates: NDArray[np.float64]
    """(n, 2) of (y, x) in geometry.length_unit, which a policy may choose from."""
    frame_rate: float
    """Frames per second."""

    @property
    def frames_dropped(self) -> int:
        """Frames measured that the consumer of chunks() was too slow to take."""

    def chunks(self) -> Iterator[xr.Dataset]:
        """Measure what decisions ask for; yield chunks until the scans end. Called once."""

    def apply(self, decision: Decision) -> NDArray[np.float64] | None:
        """Queue positions to measure. Thread-safe; wakes a waiting chunks().

        Returns the positions (m, 2) of which no frame will come, so that nobody waits for them; None: all are queued.
        """

    def close(self) -> None:
        """End the scan after what is measured by now. Thread-safe; wakes a waiting chunks()."""

    def truth(self, scan: str) -> tuple[NDArray[np.complex64], Canvas] | None:
        """The object (Y, X) of a scan and where it lies, where it is known."""
