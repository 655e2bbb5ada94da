"""What is open in one scan while its streams are joined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.sources.numbers import Numbers
from steering.sources.streams import Companion


class Value:
    """The samples of one frame in one companion stream."""

    __slots__ = ("mean", "rows", "settled", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.rows: dict[int, NDArray[np.float64]] = {}
        self.mean: NDArray[np.float64] | None = None
        self.settled = False

    def average(self) -> NDArray[np.float64]:
        """In the order of the samples, so that it does not depend on when they came."""
        if self.mean is None:
            rows = [self.rows[k] for k in sorted(self.rows)]
            self.mean = rows[0] if len(rows) == 1 else np.mean(rows, axis=0)
        return self.mean


class OpenScan:
    """What is open in one scan."""

    def __init__(self, companions: Sequence[Companion], first: int | None) -> None:
        self.frames: dict[int, tuple[Any, float]] = {}
        """Waiting, oldest first."""
        self.numbers = Numbers(first)
        self.values: dict[str, dict[int, Value]] = {c.name: {} for c in companions}
        self.unsettled: dict[str, dict[int, Value]] = {c.name: {} for c in companions}
        self.range: dict[str, tuple[int, int]] = {}
        """Lowest and highest number of each companion."""
        self.ended: set[str] = set()
        self.frames_in_all: tuple[int, float] | None = None
        """That a companion has said, and when: those that are not read yet are not missing."""

    def overdue(self, stream: str, limit: float, *, ahead: bool) -> list[int]:
        """Frame numbers of which a companion's samples wait since `limit` or before. ahead: also those after the newest
        frame that came."""
        waiting = takewhile(lambda one: one[1].since <= limit, self.unsettled[stream].items())
        return [number for number, _ in waiting if ahead or self.numbers.passed(number)]

    def miss(self, since: float = -np.inf) -> None:
        """All frames that there were are read: those that have not come are missing, since then, or since it was said
        how many there were."""
        if self.frames_in_all is not None:
            count, said = self.frames_in_all
            self.numbers.reach(count, max(said, since))
            self.frames_in_all = None


def interpolated(values: dict[int, Value], number: int, gap: int) -> NDArray[np.float64] | None:
    """The value at a number between its neighbours; None where they are missing or too far apart."""
    below = next((n for n in range(number - 1, number - gap - 1, -1) if n in values), None)
    above = next((n for n in range(number + 1, number + gap + 1) if n in values), None)
    if below is None or above is None or above - below - 1 > gap:
        return None
    share = (number - below) / (above - below)
    return (1 - share) * values[below].average() + share * values[above].average()
