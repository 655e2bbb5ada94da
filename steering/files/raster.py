"""Rows and columns: whether the second axis of 4-dimensional frames is a raster's columns or a detector's channels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CHANNELS = 8
"""No detector has more."""
_LIKELY = 3
"""Where nothing tells, so many are channels, and more are the columns of a raster."""


def channels(rows: int, columns: int, counted: tuple[int, ...]) -> tuple[int, str]:
    """How many channels each of `rows` frames has where frames are (rows, columns, y, x), and words on it.

    counted: how many positions there are, (n,), or how many values in y and in x, (n, m), each frame's or a raster's
    rows and columns; empty where it is not known. 1: they are rows * columns frames of one channel.
    """
    both, shape = rows * columns, f"found frames of ({rows}, {columns}, y, x)"
    if columns == 1 or both in (int(np.prod(counted)) if counted else 0, *counted):
        return 1, ""
    if columns <= _CHANNELS and set(counted) == {rows}:
        return columns, f"{shape} and {rows} positions: they have {columns} channels, of which the first is used"
    if columns <= _LIKELY:
        return columns, (
            f"{shape}, and positions that do not say what their second axis is: taken as {columns} channels, of which "
            "the first is used"
        )
    return 1, f"{shape}, and positions that do not say what their second axis is: taken as a raster of {both} frames"


def each(
    y: NDArray[np.float64], x: NDArray[np.float64], frames: int, shape: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    """(n, 2) of each frame, from y and x of each, or of the rows and columns of a raster.

    shape: of the raster, where it is known; its first axis is the slow one, of y where both fit. Raises ValueError
    where y and x are neither.
    """
    if len(y) * len(x) == frames > 1:
        grid = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
        x_first = shape == (len(x), len(y)) != (len(y), len(x))
        return (grid.swapaxes(0, 1) if x_first else grid).reshape(-1, 2)
    if len(y) != len(x):
        raise ValueError(
            f"found {len(y)} positions in y, {len(x)} in x and {frames} frames, expected one (y, x) for each frame, or "
            "the rows and columns of a raster"
        )
    return np.stack([y, x], axis=1)
