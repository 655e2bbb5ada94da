"""Which scan an array of EPICS belongs to, and when it was taken. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steering.sources.streams import Began, Record

_RESTART, _REORDERED, _AGAIN_S = 64, 16, 0.2
"""A uniqueId so far below a higher one that came before begins another scan, where time stamps say nothing. Where they
do one that is later begins one: at all where it is farther below than plugins in several threads reorder; and by so
many seconds where it is not, as some servers stamp arrays when they send them."""


def numbered(unique: int, first: int) -> int:
    """The number of the frame with a uniqueId, where that of the scan's first is `first`. Raises ValueError below."""
    if unique < first:
        raise ValueError(f"the number {unique}, expected {first} or more, which first={first} says a scan begins with")
    return unique - first


def stamp(fields: Any) -> float:
    """Seconds since the epoch of EPICS's time structure; 0 where it is not set."""
    return 0.0 if fields is None else float(fields["secondsPastEpoch"]) + 1e-9 * float(fields["nanoseconds"])


def taken_at(value: Any) -> float:
    """When an NTNDArray was taken by its own clock, seconds since the epoch; 0 where it does not say."""
    return stamp(value.get("dataTimeStamp")) or stamp(value.get("timeStamp"))


class Scans:
    """Tells by numbers, time stamps and attributes when another scan begins."""

    def __init__(self, attribute: str = "") -> None:
        """attribute: with the scan's name; empty: there is none."""
        self.attribute = attribute
        self._name: str | None = None
        self._highest, self._when = -1, 0.0
        self._began = False

    def begun(self, attributes: Mapping[str, Any], number: int, when: float) -> list[Record]:
        """What begins with the array of this number and these attributes. when: its time stamp, seconds; 0: none."""
        name = attributes.get(self.attribute) if self.attribute else None
        begins = not self._began or self._again(number, when) or (name is not None and str(name) != self._name)
        if begins or number > self._highest:
            self._highest, self._when = number, when
        if not begins:
            return []
        self._began, self._name = True, None if name is None else str(name)
        # The first of a scan that we saw begin is its first; before that an update may have been missed.
        return [Began(self._name, None)]

    def _again(self, number: int, when: float) -> bool:
        """The numbers have begun again: this one is none of the same scan out of order, nor one that comes twice."""
        behind, later = self._highest - number, when - self._when
        stamped = when > 0 and self._when > 0 and later != 0
        if behind > _RESTART and (number <= 1 or not stamped):
            return True
        return stamped and behind >= 0 and later > (0.0 if behind > _REORDERED else _AGAIN_S)
