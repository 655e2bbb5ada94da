"""Which numbers of a stream have come, which are missing, and which are lost: in bounded memory."""

from __future__ import annotations

from itertools import islice

_REMEMBERED = 65536


class Numbers:
    """The frame numbers of one scan. Of more than 65536 the oldest are forgotten: one of them counts as seen."""

    def __init__(self, first: int | None) -> None:
        """first: the number that the scan begins with; None: the first that comes."""
        self._first = self._next = first
        """All from the first to here have come, are missing, or are lost."""
        self._forgotten: int | None = None
        self._seen: dict[int, None] = {}
        self._missing: dict[int, float] = {}
        """Since when a later one is known; oldest first."""
        self._skipped = 0
        """Missing and too many to be named."""
        self.lost: dict[int, None] = {}
        """Given up."""

    def __contains__(self, number: int) -> bool:
        return number in self._seen or (self._forgotten is not None and number < self._forgotten)

    @property
    def complete(self) -> bool:
        """None is missing."""
        return not self._missing and not self._skipped

    def passed(self, number: int) -> bool:
        """This one, or a later one, has come or is missing."""
        return self._next is not None and number < self._next

    def expect(self, first: int) -> None:
        """The first number is this one, where none has come."""
        if self._next is None:
            self._first = self._next = first

    def anew(self) -> Numbers:
        """As they were before any number was known."""
        return Numbers(self._first)

    def add(self, number: int, now: float) -> tuple[bool, bool]:
        """A number has come. Returns whether it is new, and whether none higher came before."""
        if number in self or number in self.lost:
            return False, False
        in_order = self._next is None or number >= self._next
        self._missing.pop(number, None)
        self.reach(number, now)
        self._next = max(self._next or 0, number + 1)
        self._seen[number] = None
        if len(self._seen) > _REMEMBERED:
            self._forget(self._seen)
        return True, in_order

    def reach(self, number: int, now: float) -> None:
        """Those below this number are to come, or are missing."""
        if self._next is None:
            self._next = number
        if number - self._next > _REMEMBERED:
            self._skipped += number - self._next - _REMEMBERED
            self._next = number - _REMEMBERED
        for skipped in range(self._next, number):
            self._missing[skipped] = now
        self._next = max(self._next, number)

    def give_up(self, limit: float) -> int:
        """Numbers that are missing since `limit` or before are lost. Returns how many."""
        given_up = self._skipped
        self._skipped = 0
        while self._missing and (oldest := next(iter(self._missing.items())))[1] <= limit:
            del self._missing[oldest[0]]
            self.lost[oldest[0]] = None
            given_up += 1
        if len(self.lost) > _REMEMBERED:
            self._forget(self.lost)
        return given_up

    def _forget(self, numbers: dict[int, None]) -> None:
        for old in list(islice(numbers, _REMEMBERED // 2)):
            del numbers[old]
            self._forgotten = max(self._forgotten or 0, old + 1)
