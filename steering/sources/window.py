"""The network's window of a detector's frames: region, centre, binning, orientation, flags; for every source.

A frame is cut around the beam's centre, binned so that counts are kept, turned to agree with the positions, and given
in one dtype whatever the detector sends. Where a pixel has no count (see `steering.sources.flags`) it reads the
all-ones value of that dtype, which the mask of a chunk understands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steering.sources.correction import Correction
from steering.sources.flags import saturated, without_count
from steering.sources.orientation import ORIENTATIONS, turn


@dataclass(frozen=True, kw_only=True)
class Window:
    """How frames (y, x) of a detector become frames (size, size) for the network."""

    size: int
    """Pixels of the side, after binning; even."""
    roi: tuple[int, int, int, int] | None = None
    """y0, y1, x0, x1 of the part that is used, detector pixels; None: the whole frame."""
    centre: tuple[float, float] | None = None
    """Of the beam (y, x), detector pixels of the whole frame, which comes to (size // 2, size // 2); None: the
    middle of the region."""
    binning: int = 1
    """Detector pixels, along each side, that are added to one."""
    orientation: str = "none"
    """A name of ORIENTATIONS: how frames must be turned to agree with the positions."""
    dtype: str = "uint32"
    """Of the counts that come out. uint16 halves what is sent; counts above 65533 then become 65534."""
    correction: Correction | None = None
    """What turns readings of the whole detector into photons, before frames are cut."""

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 2 or self.binning < 1:
            raise ValueError(
                f"found a window of {self.size} pixels and binning {self.binning}, expected an even size of 8 or more, "
                "and 1 or more"
            )
        if self.orientation not in ORIENTATIONS or self.dtype not in ("uint16", "uint32"):
            raise ValueError(
                f"found orientation={self.orientation!r}, dtype={self.dtype!r}; expected one of "
                f"{', '.join(ORIENTATIONS)}, and uint16 or uint32"
            )
        refuse_empty_region(self.roi)

    def corner(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Detector pixel (y, x) at which the window of a frame of this shape begins; it may be outside."""
        y0, y1, x0, x1 = region(self.roi, shape)
        # The zero frequency belongs to the middle of a binned pixel of an even number of detector pixels.
        middle = self.centre or (y0 + (y1 - y0) // 2, x0 + (x1 - x0) // 2)
        half = self.size // 2 * self.binning + (self.binning - 1) / 2 * (self.centre is not None)
        y, x = (int(np.floor(m - half + 0.5)) for m in middle)
        return y, x

    def cut(self, frame: NDArray, bad: NDArray[np.bool_] | None = None) -> NDArray:
        """A frame (y, x) as (size, size) in `dtype`. bad: (y, x) of the detector, pixels without counts.

        Pixels of the window outside the region, and binned pixels that hold a flag, read all ones. Raises ValueError
        for a frame that is not (y, x) of real counts, or that the region does not fit into.
        """
        if frame.ndim != 2 or frame.dtype.kind not in "uif":
            raise ValueError(f"found a frame of {frame.dtype} {frame.shape}, expected (y, x) of real counts")
        counts, flagged = self._region(frame, bad)
        if self.binning > 1:
            n, b = self.size, self.binning
            whole = counts.astype(np.uint64) if counts.dtype.kind in "ui" else counts
            counts = np.where(flagged, 0, whole).reshape(n, b, n, b).sum((1, 3))
            flagged = np.asarray(flagged.reshape(n, b, n, b).any((1, 3)))
        top = np.iinfo(self.dtype).max
        out = _as_unsigned(counts, flagged, np.dtype(self.dtype))
        if flagged.any():
            out = out if out is not counts else out.copy()
            out[flagged] = top
        if self.orientation != "none":
            out = turn(out[None], "centre", self.orientation)[0]
        return np.ascontiguousarray(out)

    def mask(self, shape: tuple[int, int], bad: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """(size, size), True where no frame of this shape has counts: outside its region, or in a bad pixel."""
        blank = np.zeros(shape, np.uint16)
        return self.cut(blank, bad) == np.iinfo(self.dtype).max

    def parts(self, shape: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Which pixels (y, x) of frames of this shape are in the window, and where in it, before it is binned.

        Raises ValueError for a region that such frames do not hold, and for a window with none of it.
        """
        side = self.size * self.binning
        y, x = self.corner(shape)
        y0, y1, x0, x1 = region(self.roi, shape)
        low, high = (max(y, y0), max(x, x0)), (min(y + side, y1), min(x + side, x1))
        if low[0] >= high[0] or low[1] >= high[1]:
            raise ValueError(f"found the window at ({y}, {x}) outside the region, expected the beam's centre inside it")
        return (
            (slice(low[0], high[0]), slice(low[1], high[1])),
            (slice(low[0] - y, high[0] - y), slice(low[1] - x, high[1] - x)),
        )

    def _region(self, frame: NDArray, bad: NDArray[np.bool_] | None) -> tuple[NDArray, NDArray[np.bool_]]:
        """The window's detector pixels, and which of them have no counts."""
        side = self.size * self.binning
        part, place = self.parts(frame.shape)
        inner = frame[part]
        flagged = without_count(inner)
        if bad is not None:
            flagged = flagged | bad[part]
        return placed(inner, flagged, place, side)


def placed(
    counts: NDArray, bad: NDArray[np.bool_], place: tuple[slice, slice], side: int
) -> tuple[NDArray, NDArray[np.bool_]]:
    """Counts (..., y, x) and their bad pixels (y, x) at a place in a square of this side; what is around is bad."""
    if counts.shape[-2:] == (side, side):
        return counts, bad
    square, outside = np.zeros((*counts.shape[:-2], side, side), counts.dtype), np.ones((side, side), bool)
    square[..., *place], outside[place] = counts, bad
    return square, outside


def refuse_empty_region(roi: tuple[int, int, int, int] | None) -> None:
    """Raises ValueError for a region y0, y1, x0, x1 without pixels."""
    if roi is not None and not (0 <= roi[0] < roi[1] and 0 <= roi[2] < roi[3]):
        raise ValueError(f"found roi {roi}, expected y0, y1, x0, x1 with y0 < y1 and x0 < x1, 0 or more")


def region(roi: tuple[int, int, int, int] | None, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """y0, y1, x0, x1 of the used part of frames (y, x) of this shape. Raises ValueError where it leaves them."""
    y0, y1, x0, x1 = roi or (0, shape[0], 0, shape[1])
    if y1 > shape[0] or x1 > shape[1]:
        raise ValueError(f"found frames of {shape}, expected them to hold the region y {y0}..{y1}, x {x0}..{x1}")
    return y0, y1, x0, x1


def marked(frame: NDArray, saturation: float | None) -> NDArray:
    """A frame (y, x) as the detector gives it, its counts above `saturation`, where that is known, flagged as
    saturated: the highest unsigned value but one."""
    if saturation is None or frame.dtype.kind != "u":
        return frame
    top = np.iinfo(frame.dtype).max
    above = (frame > saturation) & (frame < top - 1)
    return np.where(above, top - 1, frame).astype(frame.dtype) if above.any() else frame


def unflagged(frame: NDArray, bad: NDArray[np.bool_] | None, saturation: float | None) -> NDArray:
    """A frame (y, x) without flags: pixels that are saturated in it have what they have at the least, `saturation` or,
    where that is not known, the largest count of the frame's other pixels; all others that are flagged have 0."""
    full = saturated(frame)
    out = np.where(without_count(frame), 0, frame).astype(frame.dtype)
    if full.any():
        out[full] = out.max() if bad is None else out.max(where=~bad, initial=0)
        if saturation is not None:
            out[full] = saturation
    return out


def _as_unsigned(counts: NDArray, flagged: NDArray[np.bool_], dtype: np.dtype) -> NDArray:
    """Counts in an unsigned dtype, those that are too large as the largest that is no flag."""
    if counts.dtype == dtype:
        return counts
    largest = np.iinfo(dtype).max - 1
    if counts.dtype.kind == "f":
        return np.minimum(np.where(flagged, 0.0, counts.astype(np.float64)), float(largest)).astype(dtype)
    if np.iinfo(counts.dtype).max > largest:
        counts = np.minimum(counts, largest)
    return np.where(flagged, 0, counts).astype(dtype)
