"""Ids of frames, many of which follow each other."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def hashes(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(n,) a hash of each number, the same on every machine: the finaliser of splitmix64 (Steele, Lea and Flood,
    OOPSLA 2014)."""
    mixed = numbers.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found


@dataclass
class Ids:
    """A set of ids that takes as little room as there are gaps in it."""

    ranges: list[list[int]] = field(default_factory=list)
    """The first and the last id of each, in order; none touches the next."""

    @classmethod
    def of(cls, ranges: Iterable[Iterable[int]]) -> Ids:
        """Of ranges as they stand in a file. Raises ValueError for anything else."""
        found = cls()
        try:
            for first, last in ranges:
                if int(first) > int(last):
                    raise ValueError(f"a range from {first} to {last}")
                found._add(int(first), int(last))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"found no ranges of ids ({error}), expected pairs of a first and a last one") from error
        return found

    def __contains__(self, one: object) -> bool:
        if not isinstance(one, int | np.integer):
            return False
        place = bisect_left(self.ranges, int(one), key=lambda each: each[1])
        return place < len(self.ranges) and self.ranges[place][0] <= int(one)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    @property
    def count(self) -> int:
        """How many ids these are."""
        return sum(last - first + 1 for first, last in self.ranges)

    def add(self, ids: Iterable[int]) -> None:
        """Take these in too."""
        every = np.unique(np.fromiter(ids, np.int64))
        if len(every):
            gaps = np.flatnonzero(np.diff(every) > 1)
            firsts, lasts = every[[0, *(gaps + 1)]], every[[*gaps, -1]]
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                self._add(first, last)

    def update(self, other: Ids) -> None:
        """Take those of another set in too."""
        for first, last in other.ranges:
            self._add(first, last)

    def _add(self, first: int, last: int) -> None:
        low = bisect_left(self.ranges, first - 1, key=lambda each: each[1])
        high = bisect_right(self.ranges, last + 1, key=lambda each: each[0])
        if low < high:
            first, last = min(first, self.ranges[low][0]), max(last, self.ranges[high - 1][1])
        self.ranges[low:high] = [[first, last]]
