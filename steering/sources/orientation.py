"""Orientation and zero frequency of a detector's frames: the only place that changes either."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ORIENTATIONS = {
    "none": (False, False, False),
    "flip_y": (False, True, False),
    "flip_x": (False, False, True),
    "rot180": (False, True, True),
    "transpose": (True, False, False),
    "rot90": (True, True, False),
    "rot270": (True, False, True),
    "antitranspose": (True, True, True),
}
"""name: (first exchange y and x, then reverse y, then reverse x)."""


def turn(frames: NDArray, zero_frequency: str, orientation: str) -> NDArray:
    """Turn frames about their zero frequency, and bring that to pixel (y // 2, x // 2).

    frames: (n, y, x). zero_frequency: where it is in them, "corner" or "centre" (y // 2, x // 2). orientation: a
    name of ORIENTATIONS. Raises ValueError for other values.
    """
    if zero_frequency not in ("corner", "centre"):
        raise ValueError(f"found zero_frequency={zero_frequency!r}, expected 'corner' or 'centre'")
    if orientation not in ORIENTATIONS:
        raise ValueError(f"found orientation={orientation!r}, expected one of {', '.join(ORIENTATIONS)}")
    exchange, *reverse = ORIENTATIONS[orientation]
    turned = frames.swapaxes(1, 2) if exchange else frames
    for axis in (1, 2):
        n = turned.shape[axis]
        frequency = np.arange(n) - n // 2
        source = (-frequency if reverse[axis - 1] else frequency) + (n // 2 if zero_frequency == "centre" else 0)
        turned = np.take(turned, source % n, axis=axis)
    return turned
