"""The policy beside the predictor: it takes in frames, answers, and is saved for a predictor that takes over."""

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
from steering.inference.answers import Answers, PolicyAnswer
from steering.inference.live import LiveImage
from steering.inference.policy_replay import DeclinedPart, PolicyReplay
from steering.inference.saved_policy import SavedPolicy, SavedPredictor, policy_state
from steering.policies import Policy
from steering.records import Ids, Prediction


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
        saved: SavedPolicy | None = None,
        answered: Sequence[PolicyAnswer] = (),
    ) -> None:
        """scans: live images by scan, looked at as they are then. last: go on from there, not from `policy`. share: of
        the time, for saving the policy. saved: `policy` is new, and goes on from there; `last` counts before it.
        answered: what was answered since the scan began."""
        self._policy = policy
        self._scans = scans
        self._share = share
        self._last = last
        self._lost = last is not None and last.bound
        self._again = PolicyReplay()
        self._ingested = {} if last is None else dict(last.saved_ingested)
        self._from_file = saved if last is None else None
        self._answers = Answers(answered)
        if self._from_file is not None:
            self._ingested = self._from_file.known(scans)
        self._bound = False
        self._saved_at: float | None = None
        """When the policy was last saved, by time.perf_counter; None: it is to be saved with the next answer."""
        self._cost_s = 0.0
        self.wants_prior_residual = bool(getattr(policy, "wants_prior_residual", False))
        """Whether the policy wants to know the residual of the image for each frame before it was added."""

    def ingest(self, prediction: Prediction, live: LiveImage, first: int | None = None) -> None:
        """Give the policy frames, unless it knows them. first: row of the first of them in the live image's table;
        None: they stand at its end."""
        n = len(prediction.frame_id)
        first = len(live.frames) - n if first is None else first
        done = max(0, self._ingested.get(live.scan, 0) - first)
        if done >= n or self._lost:
            return
        policy = self.awake()
        while done < n:
            self._again.catch_up(policy, self._ingested)
            until = self._again.frames_until(live.scan)
            stop = n if until is None or until - first <= done else min(n, until - first)
            part = prediction if stop - done == n else prediction.rows(slice(done, stop))
            policy.ingest(part, live.view())
            self._ingested[live.scan] = first + stop
            done = stop

    def state(self) -> dict[str, Any]:
        """What `SavedPolicy` makes a new policy go on from, in JSON's types: for a file, so nothing is pickled."""
        policy = self.awake()
        self._again.catch_up(policy, None)
        return policy_state(policy, self._again.open, self._ingested, self._answers.kept)

    def suggest(
        self, n: int, declined: Sequence[DeclinedPart] = (), ended: str = "", *, action: int = 0
    ) -> PolicyAnswer:
        """Tell the policy what was declined and why its scan was ended, and ask for up to n positions.

        action: by which it is asked; what was answered to it already is answered again. Raises RuntimeError for a
        policy that was to go on elsewhere and cannot.
        """
        known = self._answers.to(action)
        if known is not None:
            return known
        if self._lost:
            raise RuntimeError(
                "found the predictor's worker lost, and a policy that cannot be pickled, expected one that goes on "
                "elsewhere: keep files, sockets, threads and locks out of it"
            )
        policy = self.awake()
        self._again.catch_up(policy, None)
        self._again.decline(policy, declined)
        self._again.end(policy, ended)
        decision = self._again.suggest(policy, n)
        saved = self._saved(policy, decision.stop)
        answer = PolicyAnswer(
            action=action,
            decision=DecisionSuggested(
                ingested=tuple(self._ingested.items()),
                time=time.time(),
                positions=tuple((float(y), float(x)) for y, x in decision.positions),
                reasons=decision.reasons,
                dwell=None if decision.dwell is None else tuple(float(d) for d in decision.dwell),
                stop=decision.stop,
                scan=next(reversed(self._ingested), None),
            ),
            asked=n,
            declined=tuple(declined),
            ended=ended,
            ingested=dict(self._ingested),
            policy=saved,
            bound=self._bound,
        )
        self._answers.note(answer)
        return answer

    def awake(self) -> Policy:
        """The policy. One that goes on from elsewhere is made only now, when the images that it knew are there."""
        if self._last is not None and self._last.policy is not None:
            self._policy, account = _Loader(io.BytesIO(self._last.policy), self._scans).load()
            self._again = PolicyReplay(self._last.since, account)
        elif self._from_file is not None:
            self._again = self._from_file.applied(self._policy, self._scans)
        self._last = self._from_file = None
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
    saved: SavedPredictor | None = None
    """From a checkpoint: scans and policy as they were then."""
    answered: tuple[PolicyAnswer, ...] = ()
    """What the policy has answered since the scan began."""
    reported: Mapping[str, Ids] = field(default_factory=dict)
    """Of each scan, frames that were reported as predicted, beside those in `predicted`."""
    aside_before: Mapping[str, Ids] = field(default_factory=dict)
    """Of each scan, frames that were reported as set aside and do not come again."""

    def first_version(self, scan: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) int64 the version that was the first to predict each frame; -1 where none is known."""
        known = self.predicted.get(scan, {})
        return np.array([known.get(i, -1) for i in ids.tolist()], np.int64)

    def unheard(self, scan: str, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) True for frames that were predicted and not reported; none of a scan whose frames do not come again."""
        told = self.reported.get(scan, Ids())
        new = np.array([i not in told for i in ids.tolist()], bool)
        return new & (self.first_version(scan, ids) < 0) & (scan not in self.over)

    def unreported(self, scan: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the frames set aside that were not reported yet; each earlier report counts for one."""
        known, new = self.aside.get(scan, Counter()), []
        for frame in ids:
            if known[frame]:
                known[frame] -= 1
            else:
                new.append(frame)
        return tuple(new)
