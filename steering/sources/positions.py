"""Judges a scan's positions when it is read: units that cannot be, encoder glitches, positions that never move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steering.files.units import could_be, factor
from steering.records import Geometry

_FAR = 30.0
"""An outlier is so many times farther from the middle than the frame at the 90th percentile."""
_SAMPLE = 400


def outliers(positions: NDArray[np.float64], window: float) -> NDArray[np.int64]:
    """Numbers of the frames whose positions (n, 2) are far from all others. window: side of a frame, in their unit."""
    if len(positions) < 5:
        return np.zeros(0, np.int64)
    away = np.abs(positions - np.median(positions, axis=0)).max(1)
    usual = np.quantile(away, 0.9)
    found = np.flatnonzero(away > _FAR * max(usual, window / 2))
    return found if len(found) <= max(1, len(positions) // 10) else np.zeros(0, np.int64)


def refuse_impossible(positions: NDArray[np.float64], geometry: Geometry, units: Sequence[str] = ()) -> None:
    """Refuse positions (n, 2), in `geometry.length_unit`, that cannot be those of one ptychographic scan.

    units: in which they were written. Raises ValueError where frames are all at one place, none overlaps its neighbour,
    or all of them are within an object pixel: a scan along one axis, one that stays at places and one of few frames
    have a longer span.
    """
    if len(positions) < 2:
        return
    pixel, unit = geometry.object_pixel, geometry.length_unit
    window, span = pixel * geometry.shape[0], float(np.ptp(positions, axis=0).max())
    remedy = _SAY if units or unit == "m" else _CONVERT
    if span == 0:
        raise ValueError(
            f"found all {len(positions)} positions equal, expected a scan: was the encoder connected? Give them with "
            "positions=FILE:/path[unit] (--positions)"
        )
    some = positions[np.linspace(0, len(positions) - 1, min(_SAMPLE, len(positions))).astype(int)]
    nearest = float(np.median([_nearest(positions, one) for one in some]))
    if nearest <= window and span >= pixel:
        return
    likely = ""
    if len({factor(one, "length", "positions") for one in units}) == 1:
        likely = could_be(units[0], "length", lambda ratio: nearest * ratio <= window and span * ratio >= pixel)
    hint = f": they would overlap if they were in {likely}" if likely else ""
    if span < pixel:
        raise ValueError(
            f"found all {len(positions)} positions within {span:.3g} {unit} of each other, less than one object pixel "
            f"({pixel:.3g} {unit}), expected a scan{hint}. {remedy}"
        )
    raise ValueError(
        f"found positions {nearest:.3g} {unit} from their nearest neighbours, farther than a frame is wide "
        f"({window:.3g} {unit}), expected frames that overlap{hint}. {remedy}"
    )


def crowded(positions: NDArray[np.float64], geometry: Geometry) -> list[str]:
    """A note where positions (n, 2) are more than there are object pixels within their span.

    Many frames at few places are like that, and positions whose unit is a thousand times larger than said.
    """
    spans = np.ptp(positions, axis=0) / geometry.object_pixel if len(positions) else np.zeros(2)
    if len(positions) <= np.maximum(spans, 1).prod():
        return []
    return [
        f"{len(positions)} positions are within {spans[0]:.3g} x {spans[1]:.3g} object pixels (y, x), more than one "
        "for each pixel: is their unit right?"
    ]


_SAY = "Say their unit: positions=FILE:/path[unit] (--positions)"
_CONVERT = "Such files have positions in object pixels: convert them"


def _nearest(positions: NDArray[np.float64], one: NDArray[np.float64]) -> float:
    distance = np.hypot(*(positions - one).T)
    apart = distance[distance > 0]
    return float(apart.min()) if len(apart) else 0.0
