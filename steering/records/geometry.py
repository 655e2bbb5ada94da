"""The detector's geometry and mask, and the field that may be scanned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """The far-field geometry of a recording.

    For a recording without wavelength, distance and detector pixel all three are None: its lengths are then in object
    pixels, and `length_unit` says so.
    """

    shape: tuple[int, int]
    """Detector pixels (y, x) of a frame; square, since one object pixel size follows from it."""
    wavelength: float | None = None
    """Metres."""
    distance: float | None = None
    """Sample to detector, metres."""
    detector_pixel: float | None = None
    """Pitch of a detector pixel, metres."""
    mask: NDArray[np.bool_] | None = None
    """(y, x), True where a pixel must NOT be used: gap, dead, hot, saturated. None: every pixel counts."""
    origin: tuple[float, float] = (0.0, 0.0)
    """(y, x), length_unit: added to positions it makes them those of the file or the stage that they come from."""

    def __post_init__(self) -> None:
        ny, nx = self.shape
        if ny != nx or ny < 8 or ny % 2:
            raise ValueError(
                f"found frames of {ny} x {nx} pixels, expected a square of even size, 8 or more: crop them"
            )
        given = [v is not None for v in (self.wavelength, self.distance, self.detector_pixel)]
        if any(given) and not all(given):
            raise ValueError(
                f"found wavelength={self.wavelength}, distance={self.distance}, detector_pixel={self.detector_pixel}; "
                "expected all three in metres, or none of them (lengths are then object pixels)"
            )
        for name in ("wavelength", "distance", "detector_pixel"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise ValueError(f"found {name}={value}, expected a positive length in metres")
        if self.mask is not None:
            mask = np.asarray(self.mask)
            if mask.dtype != np.bool_ or mask.shape != self.shape:
                raise ValueError(
                    f"found a mask of {mask.dtype} {mask.shape}, expected bool {self.shape}, True = do not use"
                )
            if mask.all():
                raise ValueError("found a mask that hides every pixel, expected True only where a pixel is bad")
            object.__setattr__(self, "mask", mask)

    @property
    def object_pixel(self) -> float:
        """Size of an object pixel in `length_unit`: wavelength * distance / (pixels * detector_pixel), or 1."""
        if self.wavelength is None or self.distance is None or self.detector_pixel is None:
            return 1.0
        return self.wavelength * self.distance / (self.shape[0] * self.detector_pixel)

    @property
    def optics(self) -> dict[str, float]:
        """wavelength, distance and detector_pixel in metres; empty where they are not known."""
        known = {name: getattr(self, name) for name in ("wavelength", "distance", "detector_pixel")}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def length_unit(self) -> str:
        """`m` where the geometry is known, else `object pixel`."""
        return "object pixel" if self.wavelength is None else "m"

    def good(self) -> NDArray[np.bool_]:
        """(y, x), True where a pixel counts."""
        return np.ones(self.shape, bool) if self.mask is None else ~self.mask


@dataclass(frozen=True)
class Field:
    """The rectangle that may be scanned: limits of the probe's centre, in the geometry's length unit."""

    y0: float
    y1: float
    x0: float
    x1: float

    def __post_init__(self) -> None:
        limits = (self.y0, self.y1, self.x0, self.x1)
        if not all(np.isfinite(limits)) or self.y1 < self.y0 or self.x1 < self.x0:
            raise ValueError(f"found a field of y {self.y0}..{self.y1}, x {self.x0}..{self.x1}; expected low..high")

    def contains(self, positions: NDArray[np.float64], tolerance: float = 0.0) -> NDArray[np.bool_]:
        """(n,) True where a position (n, 2) lies inside, edges and `tolerance` included."""
        y, x = np.asarray(positions, float).reshape(-1, 2).T
        inside_y = (y >= self.y0 - tolerance) & (y <= self.y1 + tolerance)
        return inside_y & (x >= self.x0 - tolerance) & (x <= self.x1 + tolerance)

    def scaled(self, factor: float) -> Field:
        """The same rectangle in another unit: metres to object pixels by factor 1 / object_pixel."""
        return Field(self.y0 * factor, self.y1 * factor, self.x0 * factor, self.x1 * factor)
