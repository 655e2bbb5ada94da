"""The contract of a policy, and what ours share: which candidates are left in a scan, and when a scan is new."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steering.policies.dwell import DwellRule
from steering.policies.stop import StopRule
from steering.records import Decision, Prediction
from steering.records.optional_parts import optional


class Policy(Protocol):
    """The contract of a policy, which may be a class of your own, in a workflow file or in a module beside it.

    A policy lives in the predictor's process, and its methods are called one after the other, in the thread that
    predicts: they must be fast, start no work and open no file.

    Pickling. It is pickled to the worker with cloudpickle, and again after each `suggest`, so that another predictor
    can go on with it when the worker is lost. One that cannot be pickled, because of a file, a socket, a thread or a
    lock, works, but the run ends with its worker. `live` may be kept: it is not copied into the pickle.

    The attribute `wants_prior_residual` is optional: where it is True, predictions carry `prior_residual`, which costs
    as much again as the residual.
    """

    @abstractmethod
    def ingest(self, prediction: Prediction, live: Any) -> None:
        """Take in predictions of frames, each frame once, in the order of arrival.

        prediction: of one scan, positions in object pixels. live: the live image of that scan, an xarray.Dataset of
        amplitude, phase (radians) and weight (of one frame: 1 where its beam is strongest) over (y, x), coordinates in
        the geometry's length unit; do not write to it. It shows the image as it is when it is read: copy what should
        stay. Its attribute `edits`, int64 (Y / 64, X / 64), optional, is a number for each 64 x 64 pixels that is
        another one once something there has changed: a policy need not read the whole image each time.
        """

    @abstractmethod
    def suggest(self, n: int) -> Decision:
        """Up to n positions (length unit) to measure next, each with its reason; stop=True with the last of a scan.

        It is called while frames of earlier suggestions are still to come. The first call after a stop begins the next
        scan. An exception ends the run.
        """

    @optional
    def declined(self, decision: Decision, reason: str) -> None:
        """Take in what of an earlier suggestion is not carried out: vetoed, outside the safe limits, or refused by the
        source. There will be no frame at its positions; with stop=True the scan goes on.

        It is called before the next `suggest`. This method is optional.
        """

    @optional
    def state(self) -> Mapping[str, Any]:
        """What this policy has learnt and suggested: numbers, text, numpy arrays of numbers, and collections of these.
        Optional, together with `restore`; a policy without them is asked again, from the beginning of the scan, for
        what it had answered when a run is recovered."""

    @optional
    def restore(self, state: Mapping[str, Any], live: Any) -> None:
        """On a new policy: go on from what `state` returned elsewhere. live: as in `ingest`, of the scan being
        measured; None before its first frame."""

    @optional
    def ended(self, reason: str) -> None:
        """The scan of the newest suggestion is over with it, though that was no stop: it has its most frames. The next
        `suggest` begins the next scan.

        It is called before that `suggest`, after `declined`. This method is optional.
        """


class CandidatePolicy:
    """Suggests each candidate at most once in a pass; a subclass chooses which.

    A pass belongs to one scan. A new one begins after this policy's own stop, and when predictions come under the name
    of another scan. Both may announce the same scan, and predictions come late: a pass that was begun before the first
    prediction of its scan is not begun again, and predictions of earlier scans are ignored.

    Declined candidates are not suggested again in the same pass. After a declined stop the pass goes on; when no
    candidate is left it suggests the stop alone, and a stop rule starts again with new frames.

    A subclass defines `_choose`; one that uses predictions defines `_learn`, `_forget` and `_forgo` too, and names the
    attributes that these change in `_STATE`.
    """

    _STATE: tuple[str, ...] = (
        "_left",
        "_over",
        "_suggested",
        "_declined",
        "_suggested_before",
        "_measured",
        "_scan",
        "_stopped_scan",
    )
    """Attributes that change while a scan goes on."""

    def __init__(
        self, candidates: NDArray[np.float64], *, stop: StopRule | None = None, dwell: DwellRule | None = None
    ) -> None:
        """candidates: (n, 2) of (y, x), length unit. stop: ends a scan early. dwell: how long to stay at each."""
        self._candidates = checked(candidates)
        self._stop = stop
        self._dwell = dwell
        self._left = np.ones(len(self._candidates), bool)
        """(n,) True for candidates that were not suggested in this pass."""
        self._over = False
        self._suggested = False
        """Something was suggested in this pass."""
        self._declined = 0
        """Positions of this pass that will not be measured."""
        self._suggested_before = 0
        """Positions of all earlier passes that are measured."""
        self._measured = 0
        """Frames predicted so far; more than the earlier passes had positions: this pass is being measured."""
        self._scan: str | None = None
        self._stopped_scan: str | None = None
        """The scan that was measured when this pass was begun after a stop: its frames may still come."""

    @property
    def wants_prior_residual(self) -> bool:
        """Whether predictions should carry the prior residual, which a stop rule needs."""
        return self._stop is not None

    def ingest(self, prediction: Prediction, live: Any) -> None:
        """A prediction of another scan begins a new pass, unless none of this pass has been measured yet."""
        if self._scan not in (None, prediction.scan) and self._measured > self._suggested_before:
            self._begin(None)
        self._scan = prediction.scan
        # Frames beyond those suggested were measured without this policy: a source that its runner has left alone.
        most = max(self._measured, self._expected)
        self._measured = min(self._measured + len(prediction.frame_id), most)
        mine = self._measured > self._suggested_before or self._scan != self._stopped_scan
        if mine and len(prediction.frame_id):
            if self._stop is not None:
                self._stop.note(prediction)
            if self._dwell is not None:
                self._dwell.note(prediction, pixel_of(live))
            self._learn(prediction, live)

    def suggest(self, n: int) -> Decision:
        """Up to n candidates; the last of a scan come with stop=True, and after them a new pass begins."""
        if n < 1:
            raise ValueError(f"found n={n} positions asked for, expected 1 or more")
        if self._over:
            self._begin(self._scan)
        self._suggested = True
        enough = self._stop.reason() if self._stop else None
        if not self._left.any():
            enough = "every candidate was suggested"
        if enough is not None:
            self._over = True
            return Decision(positions=np.empty((0, 2)), reasons=(enough,), stop=True)
        chosen, reasons = self._choose(min(n, self._todo))
        self._left[chosen] = False
        self._over = not self._left.any()
        where = self._candidates[chosen]
        dwell = None if self._dwell is None else self._dwell.seconds(where)
        return Decision(positions=where, reasons=tuple(reasons), dwell=dwell, stop=self._over)

    def declined(self, decision: Decision, reason: str) -> None:
        """Expect no frames at these positions; after a declined stop the pass goes on."""
        self._declined += len(decision.positions)
        if len(decision.positions):
            self._forgo(decision.positions)
        if decision.stop:
            self._over = False
            if self._stop is not None:
                self._stop.look_again()

    def state(self) -> dict[str, Any]:
        """See `Policy`."""
        rules = {name: dict(vars(rule)) for name, rule in self._rules().items()}
        return {**{name: getattr(self, name) for name in self._STATE}, "rules": rules}

    def restore(self, state: Mapping[str, Any], live: Any) -> None:
        """See `Policy`. Raises ValueError for a state of other candidates."""
        if np.shape(state["_left"]) != self._left.shape:
            raise ValueError(
                f"found the state of a policy with {len(state['_left'])} candidates, expected {len(self._left)}: "
                "recover a run with the workflow and the arguments that it had"
            )
        for name in self._STATE:
            setattr(self, name, state[name])
        for name, rule in self._rules().items():
            vars(rule).update({key: value for key, value in state["rules"].get(name, {}).items() if key in vars(rule)})
        self._see(live)

    def _rules(self) -> dict[str, StopRule | DwellRule]:
        return {name: rule for name, rule in (("stop", self._stop), ("dwell", self._dwell)) if rule is not None}

    def ended(self, reason: str) -> None:
        """The pass of the newest suggestion is over."""
        self._over = self._over or self._suggested

    def _see(self, live: Any) -> None:
        """Take the live image of the scan that goes on."""

    @property
    def _expected(self) -> int:
        """Frames that all suggestions so far bring."""
        return self._suggested_before + len(self._left) - self._todo - self._declined

    @property
    def _todo(self) -> int:
        """Candidates that are left."""
        return int(np.count_nonzero(self._left))

    def _begin(self, stopped: str | None) -> None:
        self._suggested = False
        self._suggested_before = self._expected
        self._declined = 0
        self._stopped_scan = stopped
        self._left[:] = True
        self._over = False
        for rule in (self._stop, self._dwell):
            if rule is not None:
                rule.clear()
        self._forget()

    def _choose(self, n: int) -> tuple[NDArray[np.int64], list[str]]:
        """n of the candidates that are left, in the order of measurement, and the reason for each."""
        raise NotImplementedError(
            f"found {type(self).__name__} without _choose, expected it to choose candidates: define _choose"
        )

    def _learn(self, prediction: Prediction, live: Any) -> None:
        """Take in predictions of this pass."""

    def _forgo(self, positions: NDArray[np.float64]) -> None:
        """Take in that suggested positions (n, 2) will not be measured."""

    def _forget(self) -> None:
        """A new pass begins."""


class Ordered(CandidatePolicy):
    """Suggests the candidates in an order that is fixed beforehand."""

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
        done = len(self._order) - self._todo
        chosen = self._order[done : done + n]
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
