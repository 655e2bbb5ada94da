"""Measure where the image has the strongest gradients and the network the largest residuals."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.policies.candidates import CandidatePolicy, pixel_of
from steering.policies.dwell import DwellRule
from steering.policies.interest import Nearby, StructureMap, excess
from steering.policies.path import short_path
from steering.policies.stop import StopRule
from steering.records import Prediction, Travel

_PRIOR_EXPOSURE = 1.0
"""Exposure, in frames, that every position is taken to have beforehand: the larger it is, the sooner a second frame on
structure is worth as much as a first one elsewhere."""


class GradientResidual(CandidatePolicy):
    """Each next position where a frame has the highest value for its time.

    The value of a frame is (structure + residual) / (exposure + 1)^2: structure is the squared gradient of the live
    image under the beam, residual the far-field residual of the frames around, both relative to their mean over the
    field; exposure is the number of frames there, pending ones included. The power is that of an average: one frame
    more than n lowers its variance by 1 / (n (n + 1)). Where nothing is known, structure and residual count as the mean
    times `explore`, so that separate features are found. The positions of one suggestion are sorted into a short path.
    """

    _STATE = (*CandidatePolicy._STATE, "_exposure", "_residual", "_frames", "_here")

    def __init__(
        self,
        candidates: NDArray[np.float64],
        *,
        beam: float,
        travel: Travel | None = None,
        frame_s: float = 0.02,
        explore: float = 1.0,
        stop: StopRule | None = None,
        dwell: DwellRule | None = None,
    ) -> None:
        """beam: diameter of the illumination, length unit. travel: time of the stage's moves; None: none, and the order
        is that of value. frame_s: seconds of a frame without travel. explore: see above."""
        super().__init__(candidates, stop=stop, dwell=dwell)
        if not (np.isfinite(beam) and beam > 0 and np.isfinite(frame_s) and frame_s > 0 and explore >= 0):
            raise ValueError(
                f"found beam={beam}, frame_s={frame_s}, explore={explore}, expected a positive diameter in the "
                "candidates' unit, positive seconds, and 0 or more"
            )
        self.beam = beam
        self.travel = travel
        self.frame_s = frame_s
        self.explore = explore
        self._here: NDArray[np.float64] | None = None
        self._structure = StructureMap(beam)
        self._near = Nearby(self._candidates, beam)
        self._forget()

    def _forget(self) -> None:
        n = len(self._candidates)
        self._live: Any = None
        self._exposure = np.zeros(n)
        self._residual = np.zeros(n)
        """Sum over the frames around each candidate: their residuals times closeness."""
        self._frames = np.zeros(n)
        """And of closeness alone."""

    def _see(self, live: Any) -> None:
        self._live = live if self._frames.any() else None

    def _learn(self, prediction: Prediction, live: Any) -> None:
        self._live = live
        for where, residual in zip(prediction.position * pixel_of(live), prediction.residual, strict=True):
            rows, near = self._near(where)
            self._residual[rows] += near * residual
            self._frames[rows] += near

    def _forgo(self, positions: NDArray[np.float64]) -> None:
        self._expose(positions, -1)
        self._here = None  # the stage did not go there

    def _expose(self, positions: NDArray[np.float64], sign: int = 1) -> None:
        """Count frames at positions (n, 2) as exposure of the candidates there, or take them out with sign -1."""
        for where in positions:
            rows, near = self._near(where)
            self._exposure[rows] += sign * near

    def _choose(self, n: int) -> tuple[NDArray[np.int64], list[str]]:
        structure, residual = self._interest()
        value = structure + residual
        chosen: list[int] = []
        reasons: list[str] = []
        left, here = self._left.copy(), self._here
        worth = np.where(left, value / (self._exposure + _PRIOR_EXPOSURE) ** 2, -1.0)
        for _ in range(n):
            gain = worth
            if self.travel is not None and here is not None:
                gain = worth / (1 + self.travel.seconds(here, self._candidates) / self.frame_s)
            best = int(gain.argmax())
            reasons.append(_reason(structure[best], residual[best], self._exposure[best]))
            here = self._candidates[best]
            left[best] = False
            chosen.append(best)
            self._expose(here[None])
            rows, _ = self._near(here)  # of the others nothing has changed
            worth[rows] = np.where(left[rows], value[rows] / (self._exposure[rows] + _PRIOR_EXPOSURE) ** 2, -1.0)
        order = self._sorted_by_path(np.array(chosen))
        return np.array(chosen)[order], [reasons[i] for i in order]

    def _sorted_by_path(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order in which to measure these candidates: a short path where travel takes time, else as they are."""
        free = self.travel is None
        order = np.arange(len(chosen)) if free else short_path(self._here, self._candidates[chosen])
        self._here = self._candidates[chosen[order[-1]]]
        return order

    def _interest(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Structure and residual (n,) of each candidate, relative to their means over the field."""
        if self._live is None:
            return np.ones(len(self._left)), np.ones(len(self._left))
        structure, seen = self._structure.at(self._candidates, self._live)
        measured = self._frames / (self._frames + 0.1)
        residual = self._residual / np.maximum(self._frames, 1e-6)
        pairs = ((structure, seen), (residual, measured))
        found = [known * excess(value, known) + (1 - known) * self.explore for value, known in pairs]
        return found[0], found[1]


def _reason(structure: float, residual: float, exposure: float) -> str:
    if exposure < 0.1:
        return "explore: not measured yet"
    what = "structure" if structure >= residual else "residual"
    return f"{what}: gradient {structure:.1f} and residual {residual:.1f} of the mean, {exposure:.1f} frames so far"
