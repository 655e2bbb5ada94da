"""The lengths of a recorded scan: its optics in metres, and its positions in the unit of its geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.files.units import ENERGY_TO_WAVELENGTH, impossible
from steering.records import Geometry

_OPTICS = ("wavelength", "distance", "detector_pixel")
_MOST_OBJECT_PIXEL = 1e-5
_SAME = 0.02
"""Object pixels that a file says and that follow from its optics may differ so much."""


def optics(
    fields: Mapping[str, Any], *, energy: float | None, distance: float | None, detector_pixel: float | None
) -> dict[str, float]:
    """Wavelength, distance and detector pixel of a file, metres; empty where only object pixels are known.

    fields: as `read_scan_file` returns them. energy: eV, in place of the file's, as are distance and detector_pixel,
    metres. Raises ValueError for numbers that are missing or cannot be.
    """
    refuse_impossible_numbers(energy=energy, distance=distance, detector_pixel=detector_pixel)
    given = {"distance": distance, "detector_pixel": detector_pixel}
    given["wavelength"] = None if energy is None else ENERGY_TO_WAVELENGTH / energy
    known = {name: fields[name] if value is None else value for name, value in given.items() if value or name in fields}
    missing = [
        line for line in fields["missing"] if not any(line.startswith(f"no {n.replace('_', ' ')} ") for n in known)
    ]
    if missing:
        raise ValueError(f"found {missing[0]}")
    doubts = fields["doubts"]
    if "object_pixel" in doubts:
        raise ValueError(doubts["object_pixel"])
    if len(known) < len(_OPTICS):
        return {}
    for name, read in (("wavelength", "wavelength"), ("wavelength", "energy"), *((n, n) for n in _OPTICS[1:])):
        if given[name] is None and read in doubts:
            raise ValueError(doubts[read])
    return {name: known[name] for name in _OPTICS}


def refuse_impossible_numbers(*, energy: float | None, distance: float | None, detector_pixel: float | None) -> None:
    """Refuse numbers (eV, metres; None: not given) that are orders of magnitude away from any X-ray beamline's."""
    lengths = (("distance", distance, "m"), ("detector_pixel", detector_pixel, "m"))
    for name, value, unit in (("energy", energy, "eV"), *lengths):
        if value is not None and (doubt := impossible(name, value, unit)):
            raise ValueError(doubt)


def refuse_impossible_optics(geometry: Geometry) -> None:
    """Refuse optics that together cannot be, by the object pixel that they make."""
    pixel, wavelength = geometry.object_pixel, geometry.wavelength
    if wavelength is not None and not wavelength / 2 <= pixel <= _MOST_OBJECT_PIXEL:
        raise ValueError(
            f"found an object pixel of {pixel:.3g} m by a wavelength of {wavelength:.3g} m, a distance of "
            f"{geometry.distance:.3g} m and {geometry.shape[0]} detector pixels of {geometry.detector_pixel:.3g} m, "
            f"expected half a wavelength to {_MOST_OBJECT_PIXEL:.3g} m: give the one that is wrong (--energy, "
            "--distance, --pixel)"
        )


def positions_in_unit(fields: Mapping[str, Any], whole: list[float], geometry: Geometry) -> NDArray[np.float64]:
    """Positions (n, 2) of a file in `geometry.length_unit`.

    whole: pixels (y, x) of a frame before it was cut, as its pixels are now; object pixels grow as frames are cut.
    Raises ValueError where the file's object pixel is not the one of its optics.
    """
    where, side = np.asarray(fields["positions"], np.float64), geometry.shape[0]
    in_pixels, in_metres = fields["length"] == "object pixel", geometry.length_unit == "m"
    if in_pixels:
        return where * side / np.array(whole) * geometry.object_pixel
    if "object_pixel" not in fields:
        return where
    said, made = fields["object_pixel"], geometry.object_pixel * side / whole[1]
    if not in_metres:
        return where / said * side / whole[1]  # of a square detector pixel, so that both axes have the same
    if abs(made / said - 1) > _SAME:
        raise ValueError(
            f"found an object pixel of {said:.4g} m in the file, and of {made:.4g} m by wavelength, distance and "
            "detector pixel, expected one: give the one that is wrong (--energy, --distance, --pixel), or none of them"
        )
    return where
