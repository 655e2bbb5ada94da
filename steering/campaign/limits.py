"""Safe limits that hold for every decision, whatever a policy suggests. Pure: only what was allowed so far counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from steering.campaign.events import DecisionSuggested
from steering.records import Field

Positions = tuple[tuple[float, float], ...]


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

    def narrowed(self, area: Field | None, shortest_dwell: float | None) -> Limits:
        """These limits and further ones. Raises ValueError where they leave nothing, or are none."""
        if area is not None and self.area is not None:
            own, area_given = self.area, area
            low, high = (max(own.y0, area.y0), max(own.x0, area.x0)), (min(own.y1, area.y1), min(own.x1, area.x1))
            if low[0] > high[0] or low[1] > high[1]:
                raise ValueError(f"found {area_given}, expected an area that has something of {own}")
            area = Field(low[0], high[0], low[1], high[1])
        dwells = [dwell for dwell in (self.shortest_dwell, shortest_dwell) if dwell is not None]
        return replace(self, area=area or self.area, shortest_dwell=max(dwells, default=None))


@dataclass
class Guard:
    """Applies limits to the decisions of one scan after the other.

    frame_time: seconds of a position whose decision names no dwell.
    """

    limits: Limits
    frame_time: float = 0.0
    asked: Limits | None = None
    """A person's further limits: the allowed area and the shortest dwell."""
    frames: int = 0
    """Positions allowed in this scan. One that brings no frame counts too: nobody knows whether the shutter opened."""
    _places: NDArray[np.float64] = field(default_factory=lambda: np.zeros((4, 0)))
    """(4, n): y, x, dwell, and seconds of beam there from all places within reach, its own included."""

    @property
    def held(self) -> Limits:
        """The limits that hold now."""
        asked = self.asked
        return self.limits if asked is None else self.limits.narrowed(asked.area, asked.shortest_dwell)

    def begin(self) -> None:
        """A new scan, and with it a new sample or a new place on it: nothing of it was measured yet."""
        self.frames, self._places = 0, np.zeros((4, 0))

    def limited(self, decision: DecisionSuggested) -> tuple[DecisionSuggested, dict[str, Positions]]:
        """What of a decision is allowed, and which positions were refused for each reason.

        A decision with which the scan reaches its most frames stops it. Changes nothing; see `allow`.
        """
        dwell = self._dwell(decision)
        trial = replace(self)
        objections = trial._objections(decision.positions, dwell)
        refused: dict[str, Positions] = {}
        for position, objection in zip(decision.positions, objections, strict=True):
            if objection is not None:
                refused[objection] = (*refused.get(objection, ()), position)
        kept = [index for index, objection in enumerate(objections) if objection is None]
        full = bool(trial.full)
        reasons = tuple(decision.reasons[index] for index in kept)
        if full or decision.stop:
            why = decision.reasons[:1] if decision.stop else (trial.full,)
            reasons = reasons or why
        own_dwell = decision.dwell is not None or self.frame_time < (self.held.shortest_dwell or 0.0)
        allowed = replace(
            decision,
            positions=tuple(decision.positions[index] for index in kept),
            reasons=reasons,
            dwell=tuple(dwell[index] for index in kept) if own_dwell else None,
            stop=decision.stop or full,
        )
        return allowed, refused

    @property
    def full(self) -> str:
        """Why no further position of this scan is allowed; empty where some may be."""
        most = self.limits.frames
        return f"the scan has its {most} frames" if most is not None and self.frames >= most else ""

    def allow(self, decision: DecisionSuggested) -> None:
        """Count the positions of a decision that will be carried out."""
        self._make_room(len(decision.positions))
        for position, dwell in zip(decision.positions, self._dwell(decision), strict=True):
            self._add(position, dwell)

    def _dwell(self, decision: DecisionSuggested) -> list[float]:
        """Seconds of each position."""
        named = (self.frame_time,) * len(decision.positions) if decision.dwell is None else decision.dwell
        shortest = self.held.shortest_dwell or 0.0
        return [max(dwell, shortest) for dwell in named]

    def _objections(self, positions: Sequence[tuple[float, float]], dwell: Sequence[float]) -> list[str | None]:
        """Why each position is refused; None where it is allowed, and then it counts for those that follow."""
        limits, where = self.held, np.array(positions, float).reshape(-1, 2)
        numbers = np.isfinite(np.column_stack([where, dwell])).all(1)
        inside = numbers if limits.area is None else limits.area.contains(where, _rounding(limits.area))
        most = np.inf if limits.exposure is None else limits.exposure * (1 + 1e-9)
        self._make_room(len(positions))
        found: list[str | None] = []
        for k, position in enumerate(positions):
            objection = None
            if not numbers[k]:
                objection = "its position or dwell is no number"
            elif not inside[k]:
                objection = "outside the allowed area"
            elif limits.frames is not None and self.frames >= limits.frames:
                objection = "the scan has its most frames"
            elif not self._add(position, dwell[k], most=most):
                objection = "the place has its most exposure"
            found.append(objection)
        return found

    def _make_room(self, count: int) -> None:
        """A table of one's own with room for so many places more: `_add` writes into it."""
        if self.limits.exposure is not None:
            self._places = np.concatenate([self._places[:, : self.frames], np.empty((4, count))], axis=1)

    def _add(self, position: tuple[float, float], dwell: float, *, most: float = np.inf) -> bool:
        """Count a position; False, and nothing is counted, where any place would get more than `most` seconds by it."""
        if self.limits.exposure is not None:
            y, x, seconds, total = self._places[:, : self.frames]
            near = np.flatnonzero(np.hypot(y - position[0], x - position[1]) <= self.limits.reach)
            beam = float(seconds[near].sum())
            # Not the new place alone: those around it get its beam too.
            if dwell + max(beam, total[near].max(initial=0.0)) > most:
                return False
            total[near] += dwell
            self._places[:, self.frames] = *position, dwell, beam + dwell
        self.frames += 1
        return True


def _rounding(area: Field) -> float:
    """How far a position on the edge may stand outside by the rounding of its unit."""
    return 1e-9 * (area.y1 - area.y0 + area.x1 - area.x0)
