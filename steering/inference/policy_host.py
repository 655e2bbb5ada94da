"""The policy beside the predictor: it takes in frames, answers, and is saved for a predictor that takes over."""

from __future__ import annotations

import io
import pickle
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from steering.campaign import DecisionSuggested
from steering.inference.live import LiveImage
from steering.inference.replay import DeclinedPart, Replay
from steering.policies import Policy
from steering.records import Prediction


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyAnswer:
    """An answer of the policy, and at times the policy as it was after it.

    Whoever has kept them (`following`) can let the policy go on elsewhere: from its saved state, with what it was asked
    since then. What was answered is not decided again, and an answer that never arrived was not given.
    """

    decision: DecisionSuggested
    asked: int
    """Positions that were asked for."""
    declined: tuple[DeclinedPart, ...] = ()
    """What the policy heard of its earlier decisions just before."""
    ended: str = ""
    """And why its scan was ended, where it had suggested no stop."""
    ingested: Mapping[str, int]
    """How many frames of each scan the policy had taken in, the first to arrive."""
    policy: bytes | None = None
    """The saved state: pickled, without the live images. None: it was not saved with this answer, see `PolicyHost`."""
    bound: bool = False
    """This policy cannot be pickled."""
    since: tuple[PolicyAnswer, ...] = ()
    """With a state from `following`: the answers after the one that it was saved with."""
    saved_ingested: Mapping[str, int] = field(default_factory=dict)
    """And what the policy had taken in when it was saved."""

    def following(self, last: PolicyAnswer | None) -> PolicyAnswer:
        """This answer with the newest saved state, and with every answer since then: all that `PolicyHost` goes on
        from. last: the answer before, as this method returned it."""
        if self.policy is not None:
            return replace(self, saved_ingested=self.ingested)
        if last is None or self.bound:
            return self
        since = (*last.since, self)
        return replace(self, policy=last.policy, bound=last.bound, since=since, saved_ingested=last.saved_ingested)


class PolicyHost:
    """Asks a policy, and gives it each frame once. One thread owns it.

    The policy is saved with its first answer and with each that ends a scan; in between, when saving it takes no more
    than a share of the time since the last save.
    """

    def __init__(
        self,
        policy: Policy,
        scans: Mapping[str, LiveImage],
        last: PolicyAnswer | None = None,
        *,
        share: float = 0.02,
    ) -> None:
        """scans: live images by scan, looked at as they are then. last: go on from there, not from `policy`. share: of
        the time, for saving the policy."""
        self._policy = policy
        self._scans = scans
        self._share = share
        self._last = last
        self._lost = last is not None and last.bound
        self._again = Replay()
        self._ingested = {} if last is None else dict(last.saved_ingested)
        self._newest = None if last is None else last.decision.scan
        """Scan of which the policy has taken in a frame last."""
        self._bound = False
        self._saved_at: float | None = None
        """When the policy was last saved, by time.perf_counter; None: it is to be saved with the next answer."""
        self._cost_s = 0.0
        self.wants_prior_residual = bool(getattr(policy, "wants_prior_residual", False))
        """Whether the policy wants to know the residual of the image for each frame before it was added."""

    def ingest(self, prediction: Prediction, live: LiveImage) -> None:
        """Give the policy frames that stand at the end of the live image's table, unless it knows them."""
        n = len(prediction.frame_id)
        first = len(live.frames) - n
        done = max(0, self._ingested.get(live.scan, 0) - first)
        if done >= n or self._lost:
            return
        policy = self._awake()
        while done < n:
            self._again.catch_up(policy, self._ingested)
            until = self._again.frames_until(live.scan)
            stop = n if until is None or until - first <= done else min(n, until - first)
            part = prediction if stop - done == n else prediction.rows(slice(done, stop))
            policy.ingest(part, live.view())
            self._ingested[live.scan] = first + stop
            self._newest = live.scan
            done = stop

    def suggest(self, n: int, declined: Sequence[DeclinedPart] = (), ended: str = "") -> PolicyAnswer:
        """Tell the policy what was declined and why its scan was ended, and ask for up to n positions.

        Raises RuntimeError for a policy that was to go on elsewhere and cannot.
        """
        if self._lost:
            raise RuntimeError(
                "found the predictor's worker lost, and a policy that cannot be pickled, expected one that goes on "
                "elsewhere: keep files, sockets, threads and locks out of it"
            )
        policy = self._awake()
        self._again.catch_up(policy, None)
        self._again.decline(policy, declined)
        self._again.end(policy, ended)
        decision = self._again.suggest(policy, n)
        saved = self._saved(policy, decision.stop)
        return PolicyAnswer(
            decision=DecisionSuggested(
                time=time.time(),
                positions=tuple((float(y), float(x)) for y, x in decision.positions),
                reasons=decision.reasons,
                dwell=None if decision.dwell is None else tuple(float(d) for d in decision.dwell),
                stop=decision.stop,
                scan=self._newest,
            ),
            asked=n,
            declined=tuple(declined),
            ended=ended,
            ingested=dict(self._ingested),
            policy=saved,
            bound=self._bound,
        )

    def _awake(self) -> Policy:
        """The policy. One that goes on from elsewhere is made only now, when the images that it knew are there."""
        if self._last is not None and self._last.policy is not None:
            self._policy, account = _Loader(io.BytesIO(self._last.policy), self._scans).load()
            self._again = Replay(self._last.since, account)
        self._last = None
        return self._policy

    def _saved(self, policy: Policy, now: bool) -> bytes | None:
        """The policy pickled, where that is due; now: it is."""
        begun = time.perf_counter()
        due = now or self._saved_at is None or self._cost_s <= self._share * (begun - self._saved_at)
        if self._bound or not due:
            return None
        file = io.BytesIO()
        try:
            _Saver(file, self._scans).dump((policy, self._again.open))
        except Exception:  # the type depends on what it holds: a socket, a file, a thread or a lock
            self._bound = True
            return None
        self._saved_at = time.perf_counter()
        self._cost_s = self._saved_at - begun
        return file.getvalue()


Name = tuple[str, str]
"""Of a scan's live image, or of one of its fields."""


class _Saver(cloudpickle.Pickler):
    """Live images and their fields are only named: they are large, and are there again before the policy is."""

    def __init__(self, file: io.BytesIO, scans: Mapping[str, LiveImage]) -> None:
        super().__init__(file)
        self._images: list[tuple[Any, Name]] = []
        for scan, live in scans.items():
            view = live.view()  # empty of a scan that is over
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
        if field:
            return view[field].values if field in view else None
        return view


@dataclass(frozen=True, kw_only=True, eq=False)
class ResumeState:
    """What a predictor needs that takes the place of a lost one, before the frames come again."""

    version: int | None = None
    """To be put into service; None: the newest."""
    answer: PolicyAnswer | None = None
    """The newest, as `PolicyAnswer.following` makes it; None: the policy was not asked yet."""
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

    def unreported(self, scan: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the frames set aside that were not reported yet; each earlier report counts for one."""
        known, new = self.aside.get(scan, Counter()), []
        for frame in ids:
            if known[frame]:
                known[frame] -= 1
            else:
                new.append(frame)
        return tuple(new)
