"""The records that cross a process boundary: chunks of frames, predictions, decisions, model versions.

Axis order is (frame, y, x) everywhere. Positions are (y, x) pairs of the probe's centre, relative to the centre of
the scan's field, in the unit of `Geometry.length_unit`. The zero frequency of a frame is at pixel
(y // 2, x // 2): sources bring it there, and it is moved nowhere else.
"""

from steering.records.canvas import Canvas
from steering.records.chunk import chunk_geometry, make_chunk, positions_px
from steering.records.decisions import MEASURED, Decision, ModelVersion, Prediction
from steering.records.geometry import Field, Geometry
from steering.records.ids import Ids, hashes
from steering.records.scan_names import scan_name
from steering.records.source import Source
from steering.records.travel import Travel

__all__ = [
    "MEASURED",
    "Canvas",
    "Decision",
    "Field",
    "Geometry",
    "Ids",
    "ModelVersion",
    "Prediction",
    "Source",
    "Travel",
    "chunk_geometry",
    "hashes",
    "make_chunk",
    "positions_px",
    "scan_name",
]
