"""What every policy shares: which candidates are still to be measured in the scan at hand, and when a scan is new."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steering.policies.dwell import DwellRule
from steering.policies.stop import StopRule
from steering.records import Decision, Prediction


class Policy(Protocol):
    """The contract of the plug."""

    def ingest(self, prediction: Prediction, live: Any) -> None:
        """Take in what was predicted of the newest frames (positions in object pixels), and the live image as it is
        now: an xarray.Dataset of amplitude, phase and weight over (y, x), coordinates in the length unit.

        `prediction.prior_residual` is there for a policy whose attribute `wants_prior_residual` is True.
        """

    def suggest(self, n: int) -> Decision:
        """Up to n positions to measure next, each with its reason; stop=True when these are the scan's last.

        Asked again after a stop, it begins the next scan: the source has gone on to another sample.
        """

    def declined(self, decision: Decision, reason: str) -> None:
        """What of an earlier suggestion is not carried out: vetoed, against the safe limits, or refused by the source.

        No frame comes of its positions; with stop=True the scan goes on. It is called before the next `suggest`. A
        policy that does not care need not define it.
        """


class Walk:
    """Visits each candidate of a scan at most once, and begins anew for a new scan. Where to, a kind of walk says.

    A scan is new when this policy has stopped the one before it, or when the source says so: predictions come under
    another name. The two may be the same scan, and predictions come late; a walk that was begun ahead of its scan's
    first prediction is not begun again, and what is predicted of an earlier scan teaches it nothing.

    Candidates that were declined are not suggested again in this walk. After a stop that was declined the walk goes on;
    when no candidate is left it suggests the stop alone, and a stop rule looks at new frames only.

    A kind defines `_choose`; one that looks at what was measured defines `_learn`, `_forget` and `_forgo` too.
    """

    def __init__(
        self, candidates: NDArray[np.float64], *, stop: StopRule | None = None, dwell: DwellRule | None = None
    ) -> None:
        """candidates: (n, 2) of (y, x), length unit. stop: ends a scan early. dwell: how long to stay at each."""
        self._candidates = checked(candidates)
        self._stop = stop
        self._dwell = dwell
        self._left = np.ones(len(self._candidates), bool)
        """(n,) True for candidates that were not suggested in this walk."""
        self._over = False
        self._declined = 0
        """Positions of this walk that will not be measured."""
        self._suggested_before = 0
        """Positions of all walks before this one."""
        self._measured = 0
        """Frames predicted so far: more than the walks before had positions means that this walk is being measured."""
        self._scan: str | None = None
        self._stopped_scan: str | None = None
        """The scan that was being measured when this walk was begun after a stop: its frames may still come."""

    @property
    def wants_prior_residual(self) -> bool:
        """Whether predictions should carry the prior residual of their frames, which only a stop rule needs."""
        return self._stop is not None

    def ingest(self, prediction: Prediction, live: Any) -> None:
        """A prediction of another scan starts the walk anew, unless none of this walk has been measured yet."""
        if self._scan not in (None, prediction.scan) and self._measured > self._suggested_before:
            self._begin(None)
        self._scan = prediction.scan
        self._measured += len(prediction.frame_id)
        mine = self._measured > self._suggested_before or self._scan != self._stopped_scan
        if mine and len(prediction.frame_id):
            if self._stop is not None:
                self._stop.note(prediction)
            if self._dwell is not None:
                self._dwell.note(prediction, pixel_of(live))
            self._learn(prediction, live)

    def suggest(self, n: int) -> Decision:
        """Up to n candidates; the last of a scan come with stop=True, and after them a new walk begins."""
        if n < 1:
            raise ValueError(f"found a wish for {n} positions, expected 1 or more")
        if self._over:
            self._begin(self._scan)
        enough = self._stop.reason() if self._stop else None
        if not self._left.any():
            enough = "every candidate was suggested"
        if enough is not None:
            self._over = True
            return Decision(positions=np.empty((0, 2)), reasons=(enough,), stop=True)
        chosen, reasons = self._choose(min(n, int(self._left.sum())))
        self._left[chosen] = False
        self._over = not self._left.any()
        where = self._candidates[chosen]
        dwell = None if self._dwell is None else self._dwell.seconds(where)
        return Decision(positions=where, reasons=tuple(reasons), dwell=dwell, stop=self._over)

    def declined(self, decision: Decision, reason: str) -> None:
        """Positions that are not measured bring no frame; a stop that is not carried out ends nothing."""
        self._declined += len(decision.positions)
        if len(decision.positions):
            self._forgo(decision.positions)
        if decision.stop:
            self._over = False
            if self._stop is not None:
                self._stop.clear()

    def _begin(self, stopped: str | None) -> None:
        self._suggested_before += len(self._left) - int(self._left.sum()) - self._declined
        self._declined = 0
        self._stopped_scan = stopped
        self._left[:] = True
        self._over = False
        for rule in (self._stop, self._dwell):
            if rule is not None:
                rule.clear()
        self._forget()

    def _choose(self, n: int) -> tuple[NDArray[np.int64], list[str]]:
        """n of the candidates that are left, in the order in which to measure, and the reason for each."""
        raise NotImplementedError(f"{type(self).__name__} does not say where to measure: define _choose")

    def _learn(self, prediction: Prediction, live: Any) -> None:
        """Take in what was measured of this walk."""

    def _forgo(self, positions: NDArray[np.float64]) -> None:
        """Positions (n, 2) that were suggested will not be measured."""

    def _forget(self) -> None:
        """A new walk begins."""


class Ordered(Walk):
    """A walk in an order that is fixed beforehand."""

    def __init__(
        self,
        candidates: NDArray[np.float64],
        order: NDArray[np.int64],
        reason: str,
        *,
        stop: StopRule | None = None,
        dwell: DwellRule | None = None,
    ) -> None:
        super().__init__(candidates, stop=stop, dwell=dwell)
        self._order = order
        self._reason = reason

    def _choose(self, n: int) -> tuple[NDArray[np.int64], list[str]]:
        done = len(self._order) - int(self._left.sum())
        chosen = self._order[self._left[self._order]][:n]
        return chosen, [f"{self._reason}, {done + i + 1} of {len(self._order)}" for i in range(n)]


def pixel_of(live: Any) -> float:
    """Size of an object pixel of the live image, in the length unit."""
    y = live["y"].values
    return float(y[1] - y[0])


def checked(candidates: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 2) float64 candidates, refused when empty or not finite."""
    where = np.array(candidates, np.float64)
    if where.ndim != 2 or where.shape[1] != 2 or not len(where) or not np.isfinite(where).all():
        raise ValueError(f"found candidates of shape {where.shape}, expected (n, 2) finite (y, x), n of 1 or more")
    return where
