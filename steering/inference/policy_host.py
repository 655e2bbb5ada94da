"""The policy beside the predictor: what it takes in, what it answers, and what of it outlives the predictor."""

from __future__ import annotations

import io
import pickle
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from steering.campaign import DecisionSuggested
from steering.inference.live import LiveImage
from steering.policies import Policy
from steering.records import Decision, Prediction


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyAnswer:
    """An answer of the policy together with the policy as it was after it.

    Whoever has the newest one can let the policy go on elsewhere: what was answered is not said again, and an answer
    that never arrived was not given.
    """

    decision: DecisionSuggested
    policy: bytes | None
    """Pickled, without the live images; None: this policy cannot be."""
    ingested: Mapping[str, int]
    """How many frames of each scan it had taken in, the first to arrive."""


class PolicyHost:
    """Asks a policy, and tells it of each frame once. One thread owns it."""

    def __init__(self, policy: Policy, scans: Mapping[str, LiveImage], last: PolicyAnswer | None = None) -> None:
        """scans: live images by scan, looked at as they are then. last: go on from there, not from `policy`."""
        self._policy = policy
        self._scans = scans
        self._last = last
        self._lost = last is not None and last.policy is None
        self._ingested = {} if last is None else dict(last.ingested)
        self.wants_prior_residual = bool(getattr(policy, "wants_prior_residual", False))
        """Whether the policy wants to know the residual of the image for each frame before it was added."""

    def ingest(self, prediction: Prediction, live: LiveImage) -> None:
        """Tell the policy of frames that stand at the end of the live image's table, unless it knows them."""
        first = len(live.frames) - len(prediction.frame_id)
        known = max(0, self._ingested.get(live.scan, 0) - first)
        if known >= len(prediction.frame_id) or self._lost:
            return
        self._awake().ingest(prediction.rows(slice(known, None)) if known else prediction, live.view())
        self._ingested[live.scan] = len(live.frames)

    def suggest(self, n: int, declined: Sequence[tuple[DecisionSuggested, str]] = ()) -> PolicyAnswer:
        """Tell the policy what was declined, and ask for up to n positions. Raises RuntimeError for a policy that was
        to go on elsewhere and cannot."""
        if self._lost:
            raise RuntimeError(
                "found the predictor's worker lost, and a policy that cannot be pickled, expected one that goes on "
                "elsewhere: keep files, sockets, threads and locks out of it"
            )
        policy = self._awake()
        for part, reason in declined if hasattr(policy, "declined") else ():
            where = np.array(part.positions, np.float64)
            policy.declined(Decision(positions=where, reasons=part.reasons, stop=part.stop), reason)
        decision = policy.suggest(n)
        return PolicyAnswer(
            decision=DecisionSuggested(
                time=time.time(),
                positions=tuple((float(y), float(x)) for y, x in decision.positions),
                reasons=decision.reasons,
                dwell=None if decision.dwell is None else tuple(float(d) for d in decision.dwell),
                stop=decision.stop,
            ),
            policy=self._pickled(policy),
            ingested=dict(self._ingested),
        )

    def _awake(self) -> Policy:
        """The policy. One that goes on from elsewhere is made only now, when the images that it knew are there."""
        if self._last is not None and self._last.policy is not None:
            self._policy = _Loader(io.BytesIO(self._last.policy), self._scans).load()
        self._last = None
        return self._policy

    def _pickled(self, policy: Policy) -> bytes | None:
        file = io.BytesIO()
        try:
            _Saver(file, self._scans).dump(policy)
        except Exception:  # whatever a socket, a file, a thread or a lock says to that
            return None
        return file.getvalue()


Name = tuple[str, str]
"""Of a scan's live image, or of one of its fields."""


class _Saver(cloudpickle.Pickler):
    """Live images and their fields are only named: they are large, and are there again before the policy is."""

    def __init__(self, file: io.BytesIO, scans: Mapping[str, LiveImage]) -> None:
        super().__init__(file)
        self._images: list[tuple[Any, Name]] = []
        for scan, live in scans.items():
            view = live.view()
            self._images.append((view, (scan, "")))
            self._images += [(field.values, (scan, str(name))) for name, field in view.data_vars.items()]
        self._names = {id(thing): name for thing, name in self._images}

    def persistent_id(self, thing: Any) -> Name | None:
        """The name of a live image or of a field of one; None: it is neither, and is saved whole."""
        return self._names.get(id(thing))


class _Loader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, scans: Mapping[str, LiveImage]) -> None:
        super().__init__(file)
        self._scans = scans

    def persistent_load(self, name: Name) -> Any:
        """What has that name now; None where there is no such scan any more."""
        scan, field = name
        if scan not in self._scans:
            return None
        view = self._scans[scan].view()
        return view[field].values if field else view


@dataclass(frozen=True, kw_only=True, eq=False)
class ResumeState:
    """What a predictor is told that takes the place of a lost one, before the frames come again."""

    version: int | None = None
    """To be put into service; None: the newest."""
    answer: PolicyAnswer | None = None
    """The newest; None: the policy was not asked yet."""
    predicted: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Of each scan, the frames whose prediction is known already, and the version that made it."""
    aside: Mapping[str, Counter[int]] = field(default_factory=dict)
    """And those that are known to be set aside, and how often."""
    over: tuple[str, ...] = ()
    """Scans whose frames do not come again."""

    def first_version(self, scan: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) int64 the version that was the first to predict each frame; -1 where none is known."""
        known = self.predicted.get(scan, {})
        return np.array([known.get(i, -1) for i in ids.tolist()], np.int64)

    def news(self, scan: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the frames set aside that were not told yet; each time that one was told counts once."""
        known, new = self.aside.get(scan, Counter()), []
        for frame in ids:
            if known[frame]:
                known[frame] -= 1
            else:
                new.append(frame)
        return tuple(new)
