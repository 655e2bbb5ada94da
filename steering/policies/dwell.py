"""Dwell: as long as counting noise, and not the model, limits a frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.policies.interest import closeness
from steering.ptychography import beam_diameter
from steering.records import Prediction

_KEPT = 4096
"""Newest frames and positions that count: what a call costs does not grow with the scan."""


def enough_light(
    residual: NDArray[np.float64], floor: NDArray[np.float64], seconds: NDArray[np.float64], tolerance: float
) -> NDArray[np.float64]:
    """Seconds after which counting noise leaves no more of a frame's residual than the model does, or `tolerance`.

    residual: (n,) of frames of so many seconds. floor: (n,) what counting noise alone leaves (`poisson_floor`).
    The residual is the floor, which falls as 1 / time, and what the model misses, which does not: past the time at
    which the two are equal more exposure does not help.
    """
    missed = np.maximum(residual - floor, tolerance)
    return seconds * floor / missed


class DwellRule:
    """Chooses the dwell of each position by the frames around it: until counting noise no longer limits the frame.

    Where the residual is far above its floor, more exposure does not help: the model is the limit. Where it is at the
    floor, counting noise is, and more exposure helps until the floor is down at `tolerance`. In a new scan each
    position gets `frame_s` at first.
    """

    def __init__(
        self,
        probe: NDArray[np.complex64],
        *,
        frame_s: float,
        shortest: float,
        longest: float,
        tolerance: float = 0.005,
    ) -> None:
        """probe: (mode, N, N). frame_s: exposure of a frame to which no dwell was given, seconds. shortest, longest:
        limits of a dwell, seconds. tolerance: residual that counting noise may leave."""
        if not 0 < shortest <= frame_s <= longest < np.inf or not 0 < tolerance < 1:
            raise ValueError(
                f"found shortest={shortest}, frame_s={frame_s}, longest={longest}, tolerance={tolerance}, "
                "expected 0 < shortest <= frame_s <= longest, and a residual between 0 and 1"
            )
        self.frame_s = frame_s
        self.shortest = shortest
        self.longest = longest
        self.tolerance = tolerance
        self._beam = beam_diameter(np.asarray(probe, np.complex64))
        self.clear()

    def clear(self) -> None:
        """A new scan begins."""
        self._given_at = np.zeros((0, 2))
        self._given = np.zeros(0)
        self._where = np.zeros((0, 2))
        self._enough = np.zeros(0)
        self._pixel = 1.0

    def note(self, prediction: Prediction, pixel: float) -> None:
        """Take in predictions of the newest frames; pixel: of the object, length unit. The floor is that of the counts
        which each frame has, not which its exposure should bring: a beam that has lost light is no error of the model.
        Frames without counts, or whose floor is not known, say nothing of the light and are left out."""
        floor = prediction.poisson_floor
        if floor is None:
            raise ValueError(
                "found predictions without the Poisson floor of their frames, expected it for a dwell rule: give it "
                "with each outcome, computed by steering.ptychography.poisson_floor"
            )
        self._pixel = pixel
        usable = floor < 1
        where, residual, floor = prediction.position[usable] * pixel, prediction.residual[usable], floor[usable]
        seconds = np.full(len(where), self.frame_s)
        if len(self._given):
            nearest = ((where[:, None] - self._given_at[None]) ** 2).sum(-1).argmin(1)
            seconds = self._given[nearest]
        found = enough_light(residual.astype(np.float64), floor, seconds, self.tolerance)
        self._where = np.concatenate([self._where, where])[-_KEPT:]
        self._enough = np.concatenate([self._enough, found])[-_KEPT:]

    def seconds(self, where: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) seconds at positions (n, 2), length unit; they are noted as given."""
        dwell = np.full(len(where), self.frame_s)
        if len(self._enough):
            # A small share of the mean of all, for positions without frames nearby; logarithms, since times are ratios.
            near = closeness(where, self._where, self._beam * self._pixel) + 0.01 / len(self._where)
            dwell = np.exp(near @ np.log(self._enough) / near.sum(1))
        dwell = np.clip(dwell, self.shortest, self.longest)
        self._given_at = np.concatenate([self._given_at, where])[-_KEPT:]
        self._given = np.concatenate([self._given, dwell])[-_KEPT:]
        return dwell
