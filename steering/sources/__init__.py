"""Where frames come from: the simulated beamline, recorded scans, and one file for each further kind.

Whatever yields chunks this way is a source; a new kind is one file here and one line in tests/test_source_contract.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.ptychography import Canvas
from steering.records import Decision, Field, Geometry
from steering.sources.generated import line_field, particle_field
from steering.sources.orientation import ORIENTATIONS
from steering.sources.recordings import Recording, read_recording
from steering.sources.replay import Replay
from steering.sources.simulated import SimulatedBeamline, Stage, detector_gap, hard_xray_geometry, sample

__all__ = [
    "ORIENTATIONS",
    "Recording",
    "Replay",
    "SimulatedBeamline",
    "Source",
    "Stage",
    "detector_gap",
    "hard_xray_geometry",
    "line_field",
    "particle_field",
    "read_recording",
    "sample",
]


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

    def apply(self, decision: Decision) -> None:
        """Queue positions to measure. Thread-safe; wakes a waiting chunks()."""

    def close(self) -> None:
        """End the scan after what is measured by now. Thread-safe; wakes a waiting chunks()."""

    def truth(self, scan: str) -> tuple[NDArray[np.complex64], Canvas] | None:
        """The object (Y, X) of a scan and where it lies, where it is known."""
