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
    y: NDArray[np.float64], x: NDArray[np.float64], frames: int, shape: tuple[int, ...] = (), order: str = ""
) -> tuple[NDArray[np.float64], str]:
    """(n, 2) of each frame, from y and x of each, or of the rows and columns of a raster, and words on what was taken.

    shape: of the raster, where it is known. order: "yx" or "xy", the slow axis first, where the file says it. Where
    nothing tells, y is the slow one. Raises ValueError where y and x are neither, or contradict the raster.
    """
    if len(y) * len(x) == frames > 1:
        shapes = {"yx": (len(y), len(x)), "xy": (len(x), len(y))}
        fitting = [name for name, one in shapes.items() if len(_long(shape)) < 2 or shape == one]
        if not fitting or (order and order not in fitting):
            said = f", {order[0]} as the slow axis," if order else ""
            raise ValueError(
                f"found {len(y)} positions in y, {len(x)} in x{said} and frames of ({shape[0]}, {shape[1]}, y, x), "
                f"expected the raster's rows and columns: {_EACH}"
            )
        note = (
            "positions are the rows and columns of a raster, and nothing says which axis is the slow one: y is taken. "
            f"If it is x, {_EACH}"
        )
        grid = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
        where = (grid if (order or fitting[0]) == "yx" else grid.swapaxes(0, 1)).reshape(-1, 2)
        return where, note if len(fitting) > 1 and not order and min(len(y), len(x)) > 1 else ""
    if len(y) != len(x):
        raise ValueError(
            f"found {len(y)} positions in y, {len(x)} in x and {frames} frames, expected one (y, x) for each frame, or "
            "the rows and columns of a raster"
        )
    return np.stack([y, x], axis=1), ""


def refuse_other_grid(grid: tuple[int, ...], shape: tuple[int, ...], name: str) -> None:
    """Refuse positions on a grid that is not the raster's; axes of 1 count for nothing. shape: of the raster, where it
    is known. Raises ValueError: values in another order would be those of other frames."""
    if len(_long(grid)) > 1 and len(_long(shape)) > 1 and _long(grid) != shape:
        raise ValueError(
            f"found {name} on a grid of {_long(grid)} and frames of ({shape[0]}, {shape[1]}, y, x), expected one grid: "
            f"{_EACH}"
        )


_EACH = "give the position of each frame, in the frames' order (--positions FILE:/path[unit])"


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
