"""The pixel grid that objects live on, and where the window of a frame falls on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steering.records.geometry import Field


@dataclass(frozen=True)
class Canvas:
    """A grid of object pixels, laid over the field that is scanned."""

    shape: tuple[int, int]
    """Pixels (y, x)."""
    origin: tuple[float, float]
    """Position (y, x) of pixel [0, 0], object pixels, relative to the centre of the scan's field."""

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"found a canvas of shape {self.shape}, expected (y, x) of 1 pixel or more")
        if len(self.origin) != 2 or not all(math.isfinite(v) for v in self.origin):
            raise ValueError(f"found a canvas origin {self.origin}, expected two finite numbers (y, x)")

    @classmethod
    def around(cls, field_px: Field, window: int, margin: int = 8) -> Canvas:
        """The canvas that holds the window of every position in a field.

        field_px: limits of the probe's centre, object pixels. window: pixels of a frame's side. margin: pixels to
        spare on every side.
        """
        if window < 1 or margin < 0:
            raise ValueError(f"found window {window} and margin {margin}, expected 1 or more and 0 or more pixels")
        low = (math.floor(field_px.y0), math.floor(field_px.x0))
        high = (math.ceil(field_px.y1), math.ceil(field_px.x1))
        shape = (high[0] - low[0] + window + 2 * margin + 1, high[1] - low[1] + window + 2 * margin + 1)
        return cls(shape, (float(low[0] - window // 2 - margin), float(low[1] - window // 2 - margin)))

    def around_windows(self, positions_px: ArrayLike, window: int) -> Canvas:
        """The part of this canvas that the windows of these positions (n, 2) lie in; all of it where there are none.

        A pixel more on every side, so that patches of the windows can be interpolated.
        """
        corner, _ = self.corners(positions_px, window)
        if not len(corner):
            return self
        low = np.maximum(corner.min(0) - 1, 0)
        high = np.minimum(corner.max(0) + window + 1, self.shape)
        (top, left), (bottom, right) = low.tolist(), high.tolist()
        return Canvas((bottom - top, right - left), (self.origin[0] + top, self.origin[1] + left))

    def part(self, other: Canvas) -> tuple[slice, slice]:
        """Rows and columns of this canvas that are those of another one, of which this canvas holds every pixel.

        Raises ValueError where it does not.
        """
        low = np.subtract(other.origin, self.origin).round().astype(int)
        high = low + other.shape
        if (low < 0).any() or (high > self.shape).any():
            raise ValueError(f"found {other}, expected a part of {self}")
        (top, left), (bottom, right) = low.tolist(), high.tolist()
        return slice(top, bottom), slice(left, right)

    def corners(self, positions_px: ArrayLike, window: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Where the windows of these positions start, in whole pixels, and what is left over.

        positions_px: (n, 2) of (y, x), object pixels. Returns corner (n, 2), so that the window is
        canvas[corner : corner + window], and fraction (n, 2) in [-0.5, 0.5): the probe's centre is at
        corner + window // 2 + fraction. Raises ValueError for a window that leaves the canvas.
        """
        centre = self._pixels(positions_px)
        nearest = np.floor(centre + 0.5)
        corner = nearest.astype(np.int64) - window // 2
        self._refuse_outside(centre, corner, corner + window, window)
        return corner, (centre - nearest).astype(np.float32)

    def cells(self, positions_px: ArrayLike, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Like `corners`, for bilinear interpolation: the corner is rounded down, the fraction lies in [0, 1].

        The interpolation of a patch of `size` pixels reads size + 1 pixels from the corner on.
        """
        centre = self._pixels(positions_px)
        top = np.array(self.shape) - size - 1
        corner = np.minimum(np.floor(centre).astype(np.int64) - size // 2, top)
        fraction = centre - size // 2 - corner
        self._refuse_outside(centre, corner, corner + size + fraction.round(6), size)
        return corner, fraction.astype(np.float32)

    def _pixels(self, positions_px: ArrayLike) -> NDArray[np.float64]:
        where = np.asarray(positions_px, np.float64)
        if where.ndim != 2 or where.shape[1] != 2:
            raise ValueError(f"found positions of shape {where.shape}, expected (n, 2) of (y, x)")
        if not np.isfinite(where).all():
            raise ValueError(f"found position {where[~np.isfinite(where).all(1)][0]}, expected finite (y, x)")
        return where - np.array(self.origin)

    def _refuse_outside(self, centre: NDArray, low: NDArray, high: NDArray, window: int) -> None:
        outside = (low < 0).any(1) | (high > np.array(self.shape)).any(1)
        if outside.any():
            y, x = centre[outside][0] + np.array(self.origin)
            raise ValueError(
                f"found position ({y:.1f}, {x:.1f}), whose window of {window} pixels leaves the canvas of "
                f"{self.shape[0]} x {self.shape[1]} pixels with origin {self.origin} ({int(outside.sum())} such "
                "positions in all); expected it inside: make the canvas around the whole field"
            )
