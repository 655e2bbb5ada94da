"""Judges a scan's positions when it is read: units that cannot be, encoder glitches, positions that never move."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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


def refuse_impossible(positions: NDArray[np.float64], window: float, unit: str) -> None:
    """Refuse positions (n, 2) that cannot be those of one ptychographic scan. window: side of a frame, in their unit.

    Raises ValueError where frames are all at one place, or none overlaps its neighbour.
    """
    if len(positions) < 2:
        return
    if (np.ptp(positions, axis=0) == 0).all():
        raise ValueError(
            f"found all {len(positions)} positions equal, expected a scan: was the encoder connected? Give them with "
            "positions=FILE:/path[unit] (--positions)"
        )
    some = positions[np.linspace(0, len(positions) - 1, min(_SAMPLE, len(positions))).astype(int)]
    nearest = float(np.median([_nearest(positions, one) for one in some]))
    if nearest <= window:
        return
    hint = next(
        (f": they would overlap if they were in {name}" for name, factor in _GUESSES if nearest * factor <= window), ""
    )
    raise ValueError(
        f"found positions {nearest:.3g} {unit} from their nearest neighbours, farther than a frame is wide "
        f"({window:.3g} {unit}), expected frames that overlap{hint if unit == 'm' else ''}. Say their unit: "
        "positions=FILE:/path[unit] (--positions)"
    )


_GUESSES = (("mm", 1e-3), ("um", 1e-6), ("nm", 1e-9))


def _nearest(positions: NDArray[np.float64], one: NDArray[np.float64]) -> float:
    distance = np.hypot(*(positions - one).T)
    apart = distance[distance > 0]
    return float(apart.min()) if len(apart) else 0.0
