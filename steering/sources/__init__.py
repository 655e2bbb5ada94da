"""Sources of frames: the simulated beamline and recorded scans.

The contract is `Source`. A new kind is one file here and one line in tests/test_source_contract.py.
"""

from __future__ import annotations

from steering.records import Source
from steering.sources.finding import FoundOrientation, find_orientation, oriented
from steering.sources.generated import line_field, particle_field
from steering.sources.inspection import inspect_lines
from steering.sources.orientation import ORIENTATIONS
from steering.sources.recordings import ReadSettings, Recording, read_probe, read_recording
from steering.sources.replay import Replay
from steering.sources.simulated import SimulatedBeamline, Stage, detector_gap, hard_xray_geometry, sample
from steering.sources.start import with_probe

__all__ = [
    "ORIENTATIONS",
    "FoundOrientation",
    "ReadSettings",
    "Recording",
    "Replay",
    "SimulatedBeamline",
    "Source",
    "Stage",
    "detector_gap",
    "find_orientation",
    "hard_xray_geometry",
    "inspect_lines",
    "line_field",
    "oriented",
    "particle_field",
    "read_probe",
    "read_recording",
    "sample",
    "with_probe",
]
