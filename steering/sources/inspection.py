"""What a file would be read as: for `steering inspect`, in lines for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steering.files import isolated
from steering.sources.recordings import ReadSettings


def inspect_lines(path: str | Path, settings: ReadSettings | None = None) -> list[str]:
    """What was recognised in a recorded scan, with units and shapes, and what is missing. Frames are not read.

    Raises ValueError and OSError as `read_recording`.
    """
    settings, place = settings or ReadSettings(), Path(path)
    if place.is_dir():
        raise IsADirectoryError(
            f"{place}: found a folder, expected a recorded scan: give a file in it (of Eiger data the master file)"
        )
    if not place.is_file():
        raise FileNotFoundError(f"found no file {place}, expected a recorded scan: check the path")
    given = {name: where for name in ("frames", "positions") if (where := getattr(settings, name)) is not None}
    try:
        found = isolated("steering.files.scan:read_scan_file", place, settings.bounds, given=given, look=True)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    except OSError as error:
        raise OSError(f"{place}: {error}") from error
    said = found["said"]
    lines = [f"layout: {found['layout']}", f"frames: {said.get('frames', 'none')}"]
    if found["amplitude"]:
        lines.append("frames are amplitudes: they are squared")
    if "positions" in found:
        lines.append(f"positions: {said.get('positions', 'scan')}, {_span(found)}")
    for name, key in (
        ("wavelength", "energy"),
        ("distance", ""),
        ("detector_pixel", ""),
        ("object_pixel", ""),
    ):
        if name in found:
            where = said.get(name) or said.get(key) or ""
            lines.append(f"{name.replace('_', ' ')}: {found[name]:.6g} m" + (f" ({where})" if where else ""))
    for name in ("mask", "probe"):
        lines.append(f"{name}: {said.get(name, 'none')}")
    lines += [f"note: {line}" for line in found["notes"]]
    lines += [f"doubtful: {line}" for line in found["doubts"].values()]
    return lines + [f"missing: {line}" for line in found["missing"]]


def _span(found: dict[str, Any]) -> str:
    where, unit = np.asarray(found["positions"]), found["length"]
    if not len(where) or not np.isfinite(where).all():
        return f"{len(where)}, not all finite"
    scale, short = (1e6, "um") if unit == "m" else (1.0, "object pixels")
    (y0, x0), (y1, x1) = where.min(0) * scale, where.max(0) * scale
    return f"{len(where)} (y, x), y from {y0:.6g} to {y1:.6g} {short}, x from {x0:.6g} to {x1:.6g} {short}"
