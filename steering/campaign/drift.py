"""When has trust fallen, and when is it back: a test over the newest frames whose rate of false alarms is stated.

Every frame comes with the share of the validation frames of its model version that look as bad as it or worse. Where
nothing has changed, the newest n frames and the m validation frames are draws of one kind, every order of them is as
likely as any other, and two figures have laws that are known exactly for every n and m, whatever the residuals' own
law: Mann and Whitney's U, the number of pairs in which the validation frame looks as bad (Ann. Math. Stat. 18, 50
(1947)), and the number of frames worse than all but a few validation frames (Gumbel and von Schelling, Ann. Math.
Stat. 21, 247 (1950)). The first tells when most frames are somewhat worse; the second when some are far worse, as on a
sample that is empty between its features. A validation sample of a few dozen is no approximation, and with one too
small to tell no alarm is raised. The law asks that frames come in no order of their own: a scan that walks into a
region which the model explains worse than where its validation frames lie raises drift, and should.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest

from steering.campaign.events import DriftLowered, DriftRaised, PredictionReady

BACK = 0.05
"""Trust is back once the newest frames are no worse than this share of windows is where nothing has changed."""


@dataclass
class DriftTest:
    """Raises drift and lowers it again, frame by frame; residual and neighbour offset are tested apart.

    frames: the newest ones of a scan that count, at most. false_alarm: chance of an alarm, for each frame, though
    nothing has changed; each of the two tests has half of it.
    """

    frames: int
    false_alarm: float
    unjudged: dict[str, int] = field(default_factory=dict)
    """Frames that were no evidence, counted by the reason."""
    _scan: str | None = None
    _windows: dict[str, Window] = field(default_factory=dict)
    _fell_with: int | None = None
    """The version that drift was raised with; None: it is not."""

    def take(self, event: PredictionReady, *, expected: float | None) -> list[DriftRaised | DriftLowered]:
        """What follows from predicted frames; expected: residual that the model in service should reach."""
        for reason in filter(None, event.why_not):
            self.unjudged[reason] = self.unjudged.get(reason, 0) + 1
        if event.scan != self._scan:
            self._scan = event.scan
            self._windows = {by: Window(self.frames, self.false_alarm / 2) for by in ("residual", "offset")}
        found: list[DriftRaised | DriftLowered] = []
        for frame in zip_longest(event.trust_by_residual, event.trust_by_offset):
            for window, trust in zip(self._windows.values(), frame, strict=True):
                window.add(math.nan if trust is None else trust, event.validation_frames)
            found += self._judge(event, expected)
        return found

    @property
    def levels(self) -> dict[str, float]:
        """Of the newest frames, by what tells it: see `Window.level`."""
        return {by: window.level for by, window in self._windows.items()}

    def _judge(self, event: PredictionReady, expected: float | None) -> list[DriftRaised | DriftLowered]:
        fallen = [by for by, window in self._windows.items() if window.fallen]
        if fallen and self._fell_with is None:
            self._fell_with = event.version
            window = self._windows[fallen[0]]
            return [
                DriftRaised(
                    time=event.time,
                    scan=event.scan,
                    version=event.version,
                    by=fallen[0],
                    trust=window.level,
                    lowest=window.lowest(window.false_alarm / 2),
                    worse=window.worse,
                    most=window.most(window.false_alarm / 2),
                    residual=event.residual,
                    expected=expected,
                )
            ]
        if self._fell_with is not None and self._is_back:
            since, self._fell_with = self._fell_with, None
            return [
                DriftLowered(
                    time=event.time,
                    scan=event.scan,
                    version=event.version,
                    since=since,
                    trust=self._windows["residual"].level,
                    residual=event.residual,
                    expected=expected,
                )
            ]
        return []

    @property
    def _is_back(self) -> bool:
        """Both look as usual; offsets count as soon as there are enough of them."""
        residual, offset = self._windows["residual"], self._windows["offset"]
        return residual.back and (offset.back or not offset.full) and not offset.fallen


@dataclass
class Window:
    """The newest frames of a scan that are evidence, and what one kind of trust tells of them.

    frames: so many at most. false_alarm: chance, for each frame that comes, that `fallen` holds though the frames are
    like the validation frames; over a scan of N frames it is at most N times that, however the windows overlap.
    """

    frames: int
    false_alarm: float
    _as_bad: deque[tuple[int, int]] = field(default_factory=deque)
    """Of each frame, how many validation frames look as bad, and how many there are."""

    def add(self, trust: float, validation_frames: int) -> None:
        """Take in a frame: trust as `Verdict.by_residual` or `by_offset` has it, against so many validation frames.

        NaN (no evidence) is passed over, and so is what was judged against none.
        """
        if math.isnan(trust) or validation_frames < 1:
            return
        self._as_bad.append((round((validation_frames + 1) * trust) - 1, validation_frames))
        if len(self._as_bad) > self.frames:
            self._as_bad.popleft()

    @property
    def level(self) -> float:
        """Mean share of the validation frames that look as bad: near 0.5 where nothing has changed, 0 for the worst.
        NaN for no frames."""
        return sum(bad / m for bad, m in self._as_bad) / len(self._as_bad) if self._as_bad else math.nan

    @property
    def worse(self) -> int:
        """Frames that are worse than all but `spared` validation frames."""
        return sum(bad <= spared(self._least) for bad, _ in self._as_bad)

    def lowest(self, chance: float) -> float:
        """The level that the frames fall to or below by chance with this probability at most; negative: none."""
        n, m = len(self._as_bad), self._least
        return lowest_u(n, m, chance) / (n * m) if n else -1.0

    def most(self, chance: float) -> int:
        """As many frames or more are `worse` by chance with this probability at most."""
        return most_worse(len(self._as_bad), self._least, chance)

    @property
    def fallen(self) -> bool:
        """The newest frames are worse than chance explains."""
        if not self._as_bad:
            return False
        half = self.false_alarm / 2
        return self.level <= self.lowest(half) or self.worse >= self.most(half)

    @property
    def full(self) -> bool:
        """There are as many frames as may be."""
        return len(self._as_bad) == self.frames

    @property
    def back(self) -> bool:
        """The window is full, and its frames look as frames usually do.

        Where versions with different numbers of validation frames are in it, no law is exact: to the fewest of them a
        low level may be chance, so it has to be usual to the most as well. Where the fewest cannot tell, as one cannot,
        it is False.
        """
        n, held_against = len(self._as_bad), [m for _, m in self._as_bad]
        return (
            self.full
            and all(0 <= lowest_u(n, m, BACK) < self.level * n * m for m in (min(held_against), max(held_against)))
            and self.worse < self.most(BACK)
        )

    @property
    def _least(self) -> int:
        return min((m for _, m in self._as_bad), default=1)


def spared(m: int) -> int:
    """How many of m validation frames may be worse than a frame that counts as worse: one spoilt frame in 50 does not
    blind the test."""
    return m // 50


@lru_cache(maxsize=4096)
def lowest_u(n: int, m: int, chance: float) -> int:
    """The largest u with P(U <= u) <= chance for Mann and Whitney's U of n and m draws of one law; -1 for none.

    The number of orders with U = u is the coefficient of q^u in the Gaussian binomial (m + n over n). Only its low
    end is worked out, in whole numbers.
    """
    few, many = sorted((n, m))
    allowed = math.floor(chance * math.comb(n + m, n))
    if allowed < 1:
        return -1
    reach = n * m // 2 + 1  # beyond the middle no chance below one half is exceeded
    orders = [1] + [0] * reach
    for i in range(1, few + 1):
        for u in range(reach, many + i - 1, -1):  # times 1 - q^(many + i)
            orders[u] -= orders[u - many - i]
        for u in range(i, reach + 1):  # divided by 1 - q^i
            orders[u] += orders[u - i]
    total = 0
    for u, count in enumerate(orders):
        total += count
        if total > allowed:
            return u - 1
    return reach


@lru_cache(maxsize=4096)
def most_worse(n: int, m: int, chance: float) -> int:
    """The smallest k with P(K >= k) <= chance, K the number of n draws above all but `spared(m)` of m draws of the same
    law; n + 1 for none.

    In C(k + s, k) C(n - k + m - s - 1, n - k) of all C(n + m, n) orders K is k, where s are spared.
    """
    s, total = spared(m), 0
    allowed = math.floor(chance * math.comb(n + m, n))
    for k in range(n, -1, -1):
        total += math.comb(k + s, k) * math.comb(n - k + m - s - 1, n - k)
        if total > allowed:
            return k + 1
    return 0
