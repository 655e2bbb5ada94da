"""What is asked of a beamline, and what has become of it: orders, refusals, silence. Pure: times are arguments."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

from steering.sources.beam import Beam
from steering.sources.expectation import Expectation, too_silent
from steering.sources.join import NO_LOSS, UNREADABLE
from steering.sources.motion import Order
from steering.sources.plan import Plan
from steering.sources.streams import StreamCounters


class Asked:
    """Orders on their way to the motion, and which of their positions are still expected as frames."""

    def __init__(self, plan: Plan, frames: StreamCounters, now: float) -> None:
        """frames: the figures of their stream, as they change."""
        names = [companion.name for companion, _ in plan.companions]
        steered = plan.motion is not None
        monitor = names[1] if len(names) > 1 else None
        self.beam = Beam(plan.beam, positions=names[0], monitor=monitor, steered=steered)
        self.expectation = Expectation(steered=steered, give_up_s=plan.give_up_s, now=now)
        self.orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        """For the motion; None: there are no more."""
        self._frames, self._end_s = frames, plan.end_s
        self._refusal = ""

    def put(self, orders: Sequence[Order], now: float) -> None:
        """Ask for these."""
        for order in orders:
            self.expectation.ask(len(order.positions), now, self._known())
            self.orders.put(order)

    def answered(self, positions: int, refused: int, why: str, now: float) -> None:
        """An order of so many positions was carried out, but for so many at its end. why: empty where none was."""
        self._refusal = why or self._refusal
        self.expectation.answered(positions, refused, now)

    def outstanding(self) -> int:
        """Positions of which neither a frame nor its loss is known."""
        return self.expectation.outstanding(self._known())

    def silence(self, now: float) -> str:
        """What ends the run because no frame came for too long, in words; empty where nothing does."""
        silent = self.expectation.silence(now, self._known())
        if self._end_s is None or silent <= self._end_s:
            return ""
        dropped = self._frames.dropped
        unreadable = max((why for why in dropped if why.startswith(UNREADABLE)), key=dropped.__getitem__, default="")
        return too_silent(silent, self._frames.last_number, self._refusal, unreadable)

    def said(self, now: float, *, over: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """For a display: what is known of the frames' stream, and of the run. over: nothing is measured any more."""
        of_frames = {"outstanding": self.outstanding()}
        if self.beam.again or self.beam.missed:
            of_frames |= {"measured_again": self.beam.again, "to_measure_again": self.beam.missed}
        return of_frames, {
            "given_up": self.expectation.given_up,
            "refused": self.expectation.lost(now),
            "refusal": self._refusal,
            # Those that are missed still are measured again, unless all is over.
            "unmeasured": self.beam.given_up + self.beam.missed * over,
        }

    def _known(self) -> int:
        """Frames that came, each once, or are lost."""
        frames = self._frames
        again = sum(n for why, n in frames.dropped.items() if why in NO_LOSS or why.startswith(UNREADABLE))
        return frames.received - again + frames.lost
