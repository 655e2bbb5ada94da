"""Sources of frames: the simulated beamline and recorded scans.

The contract is `Source`. A new kind is one file here and one line in tests/test_source_contract.py.
"""

from __future__ import annotations

from steering.records import Source
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
