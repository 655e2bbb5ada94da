"""What no decision may exceed, whatever a policy suggests. Pure: what was allowed so far is all it knows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from steering.campaign.events import DecisionSuggested
from steering.records import Field


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The beamline's safe limits; None: no such limit. Lengths are in the geometry's unit, times in seconds."""

    area: Field | None = None
    """Where the probe's centre may go; a run's own default is the field of its source."""
    frames: int | None = None
    """Most frames of a scan: with the last of them the scan is stopped."""
    shortest_dwell: float | None = None
    """A shorter dwell is lengthened to it."""
    exposure: float | None = None
    """Most seconds of beam that any measured place may get in a scan, from itself and from all places within `reach`:
    the dose that the sample stands, over the dose rate at the beamline."""
    reach: float = 0.0
    """How far the beam around a place counts as beam on it: the radius of the probe."""

    def __post_init__(self) -> None:
        numbers = (self.frames, self.shortest_dwell, self.exposure)
        if any(number is not None and not 0 < number < np.inf for number in numbers) or not 0 <= self.reach < np.inf:
            raise ValueError(f"found {self}, expected positive limits, and a reach of 0 or more")


@dataclass
class Guard:
    """Applies limits to the decisions of one scan after the other.

    frame_time: seconds of a position whose decision names no dwell.
    """

    limits: Limits
    frame_time: float = 0.0
    frames: int = 0
    """Positions allowed in this scan. One that brings no frame counts too: nobody knows whether the shutter opened."""
    _places: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))
    """(n, 4): y, x, dwell, and seconds of beam there from all places within reach, its own included."""

    def begin(self) -> None:
        """A new scan, and with it a new sample or a new place on it: nothing of it was measured yet."""
        self.frames, self._places = 0, np.zeros((0, 4))

    def limited(self, decision: DecisionSuggested) -> tuple[DecisionSuggested, Counter[str]]:
        """What of a decision is allowed, and how many positions were refused for each reason.

        A decision with which the scan reaches its most frames stops it. Changes nothing; see `allow`.
        """
        refused: Counter[str] = Counter()
        trial = replace(self)
        kept = []
        for index, position in enumerate(decision.positions):
            objection = trial._objection(position, self._dwell(decision, index))
            if objection is None:
                trial._add(position, self._dwell(decision, index))
                kept.append(index)
            else:
                refused[objection] += 1
        full = self.limits.frames is not None and trial.frames >= self.limits.frames
        reasons = tuple(decision.reasons[index] for index in kept)
        if full or decision.stop:
            why = decision.reasons[:1] if decision.stop else (f"the scan has its {self.limits.frames} frames",)
            reasons = reasons or why
        own_dwell = decision.dwell is not None or self.frame_time < (self.limits.shortest_dwell or 0.0)
        allowed = replace(
            decision,
            positions=tuple(decision.positions[index] for index in kept),
            reasons=reasons,
            dwell=tuple(self._dwell(decision, index) for index in kept) if own_dwell else None,
            stop=decision.stop or full,
        )
        return allowed, refused

    def allow(self, decision: DecisionSuggested) -> None:
        """Count the positions of a decision that will be carried out."""
        for index, position in enumerate(decision.positions):
            self._add(position, self._dwell(decision, index))

    def _dwell(self, decision: DecisionSuggested, index: int) -> float:
        dwell = self.frame_time if decision.dwell is None else decision.dwell[index]
        return max(dwell, self.limits.shortest_dwell or 0.0)

    def _objection(self, position: tuple[float, float], dwell: float) -> str | None:
        limits = self.limits
        if not np.isfinite((*position, dwell)).all():
            return "its position or dwell is no number"
        if limits.area is not None and not limits.area.contains(np.array([position]), _rounding(limits.area))[0]:
            return "outside the allowed area"
        if limits.frames is not None and self.frames >= limits.frames:
            return "the scan has its most frames"
        if limits.exposure is not None:
            near, beam = self._around(position)
            # Not the new place alone: those around it get its beam too.
            if dwell + max(beam, self._places[near, 3].max(initial=0.0)) > limits.exposure * (1 + 1e-9):
                return "the place has its most exposure"
        return None

    def _add(self, position: tuple[float, float], dwell: float) -> None:
        self.frames += 1
        if self.limits.exposure is not None:
            near, beam = self._around(position)
            places = self._places.copy()
            places[near, 3] += dwell
            self._places = np.concatenate([places, [[*position, dwell, beam + dwell]]])

    def _around(self, position: tuple[float, float]) -> tuple[NDArray[np.bool_], float]:
        """The places within reach of one, bool (n,), and the seconds of beam that they bring to it."""
        near = np.hypot(*(self._places[:, :2] - position).T) <= self.limits.reach
        return near, float(self._places[near, 2].sum())


def _rounding(area: Field) -> float:
    """How far a position on the edge may stand outside by the rounding of its unit."""
    return 1e-9 * (area.y1 - area.y0 + area.x1 - area.x0)
