"""Dwell: as long as counting noise, and not the model, limits a frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.policies.interest import closeness
from steering.ptychography import beam_diameter, expected_floor
from steering.records import Prediction

_KEPT = 4096
"""Newest frames and positions that count: what a call costs does not grow with the scan."""


def enough_light(
    residual: NDArray[np.float64], floor: NDArray[np.float64], seconds: NDArray[np.float64], tolerance: float
) -> NDArray[np.float64]:
    """Seconds after which counting noise leaves no more of a frame's residual than the model does, or `tolerance`.

    residual: (n,) of frames of so many seconds. floor: (n,) what counting noise alone would leave (`expected_floor`).
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
        """probe: (mode, N, N), its power the counts of `frame_s` seconds on a transparent object. shortest, longest:
        limits of a dwell, seconds. tolerance: residual that counting noise may leave."""
        if not 0 < shortest <= frame_s <= longest < np.inf or not 0 < tolerance < 1:
            raise ValueError(
                f"found shortest={shortest}, frame_s={frame_s}, longest={longest}, tolerance={tolerance}, "
                "expected 0 < shortest <= frame_s <= longest, and a residual between 0 and 1"
            )
        self.probe = np.asarray(probe, np.complex64)
        self.frame_s = frame_s
        self.shortest = shortest
        self.longest = longest
        self.tolerance = tolerance
        self._beam = beam_diameter(self.probe)
        self.clear()

    def clear(self) -> None:
        """A new scan begins."""
        self._given_at = np.zeros((0, 2))
        self._given = np.zeros(0)
        self._where = np.zeros((0, 2))
        self._enough = np.zeros(0)
        self._pixel = 1.0

    def note(self, prediction: Prediction, pixel: float) -> None:
        """Take in predictions of the newest frames; pixel: of the object, length unit."""
        self._pixel = pixel
        where = prediction.position * pixel
        seconds = np.full(len(where), self.frame_s)
        if len(self._given):
            nearest = ((where[:, None] - self._given_at[None]) ** 2).sum(-1).argmin(1)
            seconds = self._given[nearest]
        # The floor is not quite 1 / time where counts are few: it is computed for the exposure that each frame had.
        ratios, group = np.unique(seconds / self.frame_s, return_inverse=True)
        floor = np.zeros(len(where))
        for k, ratio in enumerate(ratios):
            scaled = self.probe * np.float32(np.sqrt(ratio))
            floor[group == k] = expected_floor(prediction.patches[group == k], scaled)
        found = enough_light(prediction.residual.astype(np.float64), floor, seconds, self.tolerance)
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
