"""Positions decided on that have brought no frame yet, with the decisions that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from steering.campaign.actions import Steer
from steering.campaign.limits import Positions
from steering.campaign.losses import FellBack

Asked = Steer | FellBack
"""What a source was asked for, or has measured by itself."""


@dataclass
class Unmeasured:
    """Positions bring their frames in the order in which they were asked for: a frame is that of the first one left.

    The end of a scan goes with the last positions before it: where all of these are measured, it is over.
    """

    newest: list[Asked] = field(default_factory=list)
    """Those of which something is left, in order."""
    done: int = 0
    """Positions of the first of them that need no frame any more."""

    @property
    def count(self) -> int:
        """Positions that are left."""
        return sum(len(positions_of(one)) for one in self.newest) - self.done

    def add(self, one: Asked) -> None:
        """Its positions are asked for, after all others."""
        self.newest.append(one)
        self.arrived(0)

    def arrived(self, frames: int) -> None:
        """So many positions have brought a frame, or will bring none; nobody knows which. More than are left are
        none of these."""
        self.done += frames
        while self.newest and self.done >= len(positions_of(self.newest[0])):
            self.done -= len(positions_of(self.newest.pop(0)))
        if not self.newest:
            self.done = 0

    def without(self, positions: Positions) -> None:
        """These need no frame any more; of one that was asked for twice it is the last time."""
        gone = Counter(positions)
        for number in reversed(range(len(self.newest))):
            where = positions_of(self.newest[number])
            first, keep = 0 if number else self.done, list[int]()
            for row in reversed(range(len(where))):
                if row >= first and gone[where[row]] > 0:
                    gone[where[row]] -= 1
                else:
                    keep.append(row)
            if len(keep) < len(where):
                self.newest[number] = _of_rows(self.newest[number], sorted(keep))
        self.arrived(gone.total())

    @property
    def left(self) -> tuple[Asked, ...]:
        """The decisions, as far as something of them is left."""
        if not self.done:
            return tuple(self.newest)
        first, *others = self.newest
        return (_of_rows(first, range(self.done, len(positions_of(first)))), *others)


def positions_of(one: Asked) -> Positions:
    """Where it measures."""
    return one.positions if isinstance(one, FellBack) else one.decision.positions


def _of_rows(one: Asked, rows: Sequence[int]) -> Asked:
    """What it asks for at some of its positions."""
    where = tuple(positions_of(one)[row] for row in rows)
    if isinstance(one, FellBack):
        return replace(one, positions=where)
    decision = one.decision
    reasons = tuple(decision.reasons[row] for row in rows) or decision.reasons[-1:]
    dwell = None if decision.dwell is None else tuple(decision.dwell[row] for row in rows)
    return replace(one, decision=replace(decision, positions=where, reasons=reasons, dwell=dwell))
