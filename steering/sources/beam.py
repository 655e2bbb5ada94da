"""Frames that were taken without the beam: which they are, and what is measured again. Pure: times are arguments.

At a beam loss, behind a closed shutter and during a top-up a detector goes on, and counts next to nothing. Such frames
say nothing of the sample: they are set aside, and what they should have shown is measured when the beam is back. While
it is away one position is tried now and then, so that its return is seen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from steering.sources.motion import Order
from steering.sources.streams import Joined

NO_BEAM = "without beam"
"""The reason for which such frames are set aside."""
_ASKED = 4096
"""Positions that are remembered."""


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """Below what the beam counts as away."""

    least_counts: float = 0.0
    """Of a frame in its window, bad pixels left out; 0: they are not looked at."""
    least_monitor: float | None = None
    """Of the first monitor, the incident intensity, in its own unit; None: it is not looked at."""
    again_s: float = 1.0
    """Seconds from one try to the next while it is away."""

    def __post_init__(self) -> None:
        if not self.least_counts >= 0 or not self.again_s > 0 or self.least_monitor != self.least_monitor:
            raise ValueError(
                f"found least_counts={self.least_counts}, least_monitor={self.least_monitor}, again_s={self.again_s}; "
                "expected 0 or more counts, a number or None, and seconds above 0"
            )


class Beam:
    """Judges frames, and keeps what must be measured again."""

    def __init__(self, settings: BeamSettings, *, positions: str, monitor: str | None, steered: bool) -> None:
        """positions, monitor: names of these companions. steered: positions can be asked for."""
        self.settings, self._positions, self._monitor = settings, positions, monitor
        self._watches = steered and (settings.least_counts > 0 or settings.least_monitor is not None)
        self._asked: deque[tuple[float, float, float]] = deque(maxlen=_ASKED)
        """y, x, dwell (NaN: none)."""
        self._missed: list[tuple[float, float, float]] = []
        self._held: list[Order] = []
        """The end of the scan, and what came after it."""
        self._tried = -np.inf
        self.there = True
        """As the newest frame says."""
        self.again = 0
        """Positions that were asked for once more."""
        self.given_up = 0
        """Missed positions of scans that are over."""

    @property
    def missed(self) -> int:
        """Positions that are to be measured again."""
        return len(self._missed)

    def ask(self, order: Order) -> list[Order]:
        """What is asked of the beamline for this order now: the end of a scan waits until all that was missed of it is
        measured, and so does what is asked for after it."""
        if not self._watches:
            return [order]
        if self._held:
            self._held.append(order)
            return []
        seconds = np.full(len(order.positions), np.nan) if order.dwell is None else order.dwell
        self._asked += [(y, x, s) for (y, x), s in zip(order.positions.tolist(), seconds.tolist(), strict=True)]
        if not order.stop:
            return [order]
        self._held = [Order(order.positions[:0], None, True)]
        return [order._replace(stop=False)] if len(order.positions) else []

    def judge(self, joined: Joined) -> str:
        """Why a frame is set aside, empty where it is not."""
        self.there = self._has_beam(joined)
        if self.there:
            return ""
        if len(self._missed) >= _ASKED:
            self.given_up += 1
        elif self._asked:  # what was asked for, not where an encoder saw it: that may be beyond a limit
            y, x = joined.values[self._positions]
            self._missed.append(min(self._asked, key=lambda one: (one[0] - y) ** 2 + (one[1] - x) ** 2))
        return NO_BEAM

    def due(self, now: float, outstanding: int) -> list[Order]:
        """What is to be asked for now. outstanding: positions that were asked for and are not known to be measured, or
        whose frames are not judged yet."""
        count = 0
        if self.there:
            count = len(self._missed)
        elif self._missed and not outstanding and now - self._tried >= self.settings.again_s:
            count, self._tried = 1, now
        if count:
            taken, self._missed = np.array(self._missed[:count]), self._missed[count:]
            self.again += count
            return [Order(taken[:, :2], None if np.isnan(taken[:, 2]).any() else taken[:, 2], False)]
        if not self._held or self._missed or outstanding:
            return []
        (stop, *later), self._held = self._held, []
        return [stop, *(each for order in later for each in self.ask(order))]

    def ends(self) -> list[Order]:
        """Ends of scans that wait still, for where nothing more will be measured: a beamline must hear of them."""
        ends = [Order(order.positions[:0], None, True) for order in self._held if order.stop]
        self._held = []
        return ends

    def ended(self) -> list[Order]:
        """The beamline has ended the scan by itself: what would end it would end the next one. Returns what was held
        back after it, which may be asked for now."""
        later, self._held = self._held[1:], []
        return [each for order in later for each in self.ask(order)]

    def scan_over(self) -> None:
        """What is missed of a scan is not measured in the next one."""
        self.given_up += len(self._missed)
        self._missed = []

    def _has_beam(self, joined: Joined) -> bool:
        least, monitor = self.settings.least_monitor, self._monitor
        if least is not None and monitor is not None and joined.values[monitor][0] < least:
            return False
        if not self.settings.least_counts:
            return True
        counts = np.asarray(joined.frame[0])
        good = counts != np.iinfo(counts.dtype).max
        return bool(counts.sum(where=good, dtype=np.float64) >= self.settings.least_counts)
