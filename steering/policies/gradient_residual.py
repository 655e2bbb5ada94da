"""Measure where the image has the strongest gradients and the network the largest residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.policies.candidates import CandidatePolicy, pixel_of
from steering.policies.dwell import DwellRule
from steering.policies.interest import Cells, Scale, StructureMap
from steering.policies.path import short_path
from steering.policies.ranking import Ranking
from steering.policies.stop import StopRule
from steering.records import Prediction, Travel

_PRIOR_EXPOSURE = 1.0
"""Exposure, in frames, that every position is taken to have beforehand: the larger it is, the sooner a second frame on
structure is worth as much as a first one elsewhere."""
_SAMPLED = 4096
"""Candidates, evenly over the field, that stand for all in the means; of fewer all do."""


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
        self._group()
        self._forget()

    def _group(self) -> None:
        self._cells = Cells(self._candidates, self.beam)
        every = self._cells.members(np.arange(len(self._cells.count)))
        self._sample = np.sort(every[:: -(-len(every) // _SAMPLED)])
        self._ranking = Ranking(self._cells)
        self._interest = np.ones((2, len(every)))
        """Structure and residual of each candidate, relative to their means over the field."""
        self._blocks, self._mapped = np.zeros(len(every), np.int64), None
        """In which each of them lies in the structure's map, and of which image that is."""

    def __getstate__(self) -> dict[str, Any]:
        # Large, and all of it follows from the rest.
        made = ("_cells", "_sample", "_ranking", "_interest", "_blocks", "_mapped")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._group()

    def _forget(self) -> None:
        n = len(self._candidates)
        self._live: Any = None
        self._ranking.outdate(slice(None))
        self._interest[:] = 1.0
        self._exposure = np.zeros(n)
        self._residual = np.zeros(n)
        """Sum over the frames around each candidate: their residuals times closeness."""
        self._frames = np.zeros(n)
        """And of closeness alone."""

    def _see(self, live: Any) -> None:
        self._live = live if self._frames.any() else None
        self._ranking.outdate(slice(None))

    def _learn(self, prediction: Prediction, live: Any) -> None:
        self._live = live
        for where, residual in zip(prediction.position * pixel_of(live), prediction.residual, strict=True):
            rows, near = self._cells.near(where)
            self._residual[rows] += near * residual
            self._frames[rows] += near
            self._ranking.outdate(self._cells.of[rows])

    def _forgo(self, positions: NDArray[np.float64]) -> None:
        self._expose(positions, -1)
        self._here = None  # the stage did not go there

    def _expose(self, positions: NDArray[np.float64], sign: int = 1) -> None:
        """Count frames at positions (n, 2) as exposure of the candidates there, or take them out with sign -1."""
        for where in positions:
            rows, near = self._cells.near(where)
            self._exposure[rows] += sign * near
            self._ranking.outdate(self._cells.of[rows])

    def _choose(self, n: int) -> tuple[NDArray[np.int64], list[str]]:
        left, here = self._left.copy(), self._here
        self._look(left)
        chosen: list[int] = []
        reasons: list[str] = []
        for _ in range(n):
            while (best := self._ranking.best(*self._travelled(here))) < 0:
                self._look(left)  # of a large field not all that are left were looked at yet
            structure, residual = self._interest[:, best]
            reasons.append(_reason(structure, residual, self._exposure[best]))
            here = self._candidates[best]
            left[best] = False
            chosen.append(best)
            self._expose(here[None])
            rows, _ = self._cells.near(here)
            cells = np.unique(self._cells.of[rows])  # of the others nothing has changed
            self._rank(cells, self._cells.members(cells), left)
        order = self._sorted_by_path(np.array(chosen))
        return np.array(chosen)[order], [reasons[i] for i in order]

    def _travelled(self, here: NDArray[np.float64] | None) -> tuple[Any, ...]:
        if self.travel is None or here is None:
            return ()
        travel = self.travel
        return lambda there: 1 + travel.seconds(here, there) / self.frame_s, here, self._candidates

    def _sorted_by_path(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order in which to measure these candidates: a short path where travel takes time, else as they are."""
        free = self.travel is None
        order = np.arange(len(chosen)) if free else short_path(self._here, self._candidates[chosen])
        self._here = self._candidates[chosen[order[-1]]]
        return order

    def _look(self, left: NDArray[np.bool_]) -> None:
        """Find out what candidates are worth where image or frames have changed."""
        if self._live is not None:
            for low, high in self._structure.update(self._live):
                self._ranking.outdate(self._cells.touched(low, high))
            if self._mapped is not self._live:
                self._blocks, self._mapped = self._structure.blocks(self._candidates), self._live
        cells = self._ranking.due()
        rows = self._cells.members(cells)
        if self._live is not None:
            sampled = self._seen(self._sample)
            every = len(self._sample) == len(self._candidates)
            seen = [(value[rows], known[rows]) for value, known in sampled] if every else self._seen(rows)
            for interest, sample, (value, known) in zip(self._interest, sampled, seen, strict=True):
                interest[rows] = known * Scale.of(*sample).excess(value) + (1 - known) * self.explore
        self._rank(cells, rows, left)

    def _rank(self, cells: NDArray[np.int64], rows: NDArray[np.int64], left: NDArray[np.bool_]) -> None:
        value = self._interest[:, rows].sum(0)
        worth = np.where(left[rows], value / (self._exposure[rows] + _PRIOR_EXPOSURE) ** 2, -1.0)
        self._ranking.update(cells, rows, worth)

    def _seen(self, rows: NDArray[np.int64]) -> Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Structure and residual (k,) of these candidates, each with how far it is known."""
        frames = self._frames[rows]
        residual = self._residual[rows] / np.maximum(frames, 1e-6)
        return self._structure.read(self._blocks[rows]), (residual, frames / (frames + 0.1))


def _reason(structure: float, residual: float, exposure: float) -> str:
    if exposure < 0.1:
        return "explore: not measured yet"
    what = "structure" if structure >= residual else "residual"
    return f"{what}: gradient {structure:.1f} and residual {residual:.1f} of the mean, {exposure:.1f} frames so far"
