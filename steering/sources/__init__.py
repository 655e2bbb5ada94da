"""Sources of frames: the simulated beamline, recorded scans, and live streams.

The contract is `Source`. A new kind is one file here and one line in tests/test_source_contract.py. A live protocol is
a class with `records`, see steering.sources.streams, which `LiveSource` turns into a source.

Names are imported when they are asked for: the process that receives a stream needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.records import Source as Source
    from steering.sources.finding import (
        FoundOrientation as FoundOrientation,
        find_orientation as find_orientation,
        oriented as oriented,
    )
    from steering.sources.first_probe import begun_and_oriented as begun_and_oriented, with_probe as with_probe
    from steering.sources.generated import line_field as line_field, particle_field as particle_field
    from steering.sources.inspection import inspect_lines as inspect_lines
    from steering.sources.live import (
        LiveSource as LiveSource,
        LiveSourceSettings as LiveSourceSettings,
        Streams as Streams,
    )
    from steering.sources.orientation import ORIENTATIONS as ORIENTATIONS
    from steering.sources.probe_file import read_probe as read_probe
    from steering.sources.recordings import (
        ReadSettings as ReadSettings,
        Recording as Recording,
        read_recording as read_recording,
    )
    from steering.sources.replay import Replay as Replay
    from steering.sources.simulated import (
        SimulatedBeamline as SimulatedBeamline,
        Stage as Stage,
        detector_gap as detector_gap,
        hard_xray_geometry as hard_xray_geometry,
        sample as sample,
    )
    from steering.sources.streams import JoinSettings as JoinSettings
    from steering.sources.window import Window as Window

_NAMES = {
    "steering.records": "Source",
    "steering.sources.finding": "FoundOrientation find_orientation oriented",
    "steering.sources.generated": "line_field particle_field",
    "steering.sources.inspection": "inspect_lines",
    "steering.sources.live": "LiveSourceSettings LiveSource Streams",
    "steering.sources.orientation": "ORIENTATIONS",
    "steering.sources.probe_file": "read_probe",
    "steering.sources.recordings": "ReadSettings Recording read_recording",
    "steering.sources.replay": "Replay",
    "steering.sources.simulated": "SimulatedBeamline Stage detector_gap hard_xray_geometry sample",
    "steering.sources.first_probe": "begun_and_oriented with_probe",
    "steering.sources.streams": "JoinSettings",
    "steering.sources.window": "Window",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_HOMES)


if not TYPE_CHECKING:  # to a type checker a name that is not above is a mistake

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first asked for."""
        if name not in _HOMES:
            raise AttributeError(f"module 'steering.sources' has no attribute {name!r}")
        found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
