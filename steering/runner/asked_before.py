"""What a source that cannot say where it was had been asked for before everything was lost: it is asked for once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steering.campaign import FellBack
from steering.campaign.limits import Positions
from steering.campaign.unmeasured import Asked, Unmeasured, positions_of
from steering.records import Decision

QUIET_S = 10.0
"""Without a frame, beside the longest exposure, after which none is on its way any more: see
`LiveSourceSettings.give_up_s`."""


class AskedBefore:
    """Positions that were asked for and have brought no frame, while nobody knows whether the beamline has them still.

    It may go on with them, as a motion server with a queue of its own does: to ask at once would expose them twice. So
    its frames are waited for, and what is decided meanwhile waits behind. Once it is quiet, what is left is asked for.
    Pure: times are arguments.
    """

    def __init__(self, before: Sequence[Asked] = (), frame_s: float = 0.0) -> None:
        """before: what was asked for, in its order, as far as it has brought no frame. frame_s: exposure of a position
        whose decision names no dwell, seconds."""
        self._frame_s = frame_s
        self._left = Unmeasured(list(before))
        self._behind: list[Asked] = []
        self._quiet_since: float | None = None
        """None: a frame is being handed on, or nobody listens yet."""

    def holds(self, one: Asked) -> bool:
        """Whether this has to wait behind what was asked for before; then it is kept here."""
        waits = bool(self._left.count or self._behind)
        if waits:
            self._behind.append(one)
        return waits

    def busy(self) -> None:
        """A frame has come, and is being handed on."""
        self._quiet_since = None

    def listening(self, now: float) -> None:
        """From now on the next frame is waited for."""
        self._quiet_since = now

    def came(self, where: NDArray[np.float64]) -> Positions:
        """Frames have come, measured at these positions (n, 2): each is that of the nearest position left, for those
        before it may have been measured while nobody listened. Returns these, as they were asked for."""
        found: list[tuple[float, float]] = []
        for y, x in where:
            left = [each for one in self._left.left for each in positions_of(one)]
            if not left:
                break
            found.append(min(left, key=lambda each: (each[0] - y) ** 2 + (each[1] - x) ** 2))
            self._left.without((found[-1],))
        return tuple(found)

    def lost(self, frames: int) -> None:
        """So many are known to be lost on their way."""
        self._left.arrived(frames)

    def due(self, now: float) -> list[Asked]:
        """What to ask for now, once."""
        if self._left.count:
            if self._quiet_since is None or now - self._quiet_since < QUIET_S + self._longest:
                return []
            self._behind[:0] = self._left.left
            self._left = Unmeasured()
        found, self._behind = self._behind, []
        return found

    @property
    def _longest(self) -> float:
        decisions = [one.decision for one in self._left.left if not isinstance(one, FellBack)]
        return max([self._frame_s, *(seconds for decision in decisions for seconds in decision.dwell or ())])


def as_decision(one: Asked) -> Decision:
    """As a source takes it."""
    if isinstance(one, FellBack):
        return Decision(positions=np.array(one.positions), reasons=("safe raster",) * len(one.positions))
    decision = one.decision
    return Decision(
        positions=np.array(decision.positions),
        reasons=decision.reasons,
        dwell=None if decision.dwell is None else np.array(decision.dwell),
        stop=decision.stop,
        scan=one.scan,
    )
