"""Between the policy and the source: how many positions to ask for, the safe limits, and a person's approval."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

from steering.campaign.actions import Action, AskPolicy, Declined, OpenActions, Remind, Steer
from steering.campaign.event import Event
from steering.campaign.events import (
    Command,
    DecisionLimited,
    DecisionProposed,
    DecisionSettled,
    DecisionSuggested,
    FrameRefused,
)
from steering.campaign.limits import Guard, Limits, Positions
from steering.campaign.losses import FellBack
from steering.campaign.unmeasured import Unmeasured
from steering.records import MEASURED, Field

Word = Literal["approve", "veto"]
_FRUITLESS = 1000
"""Decisions in a row of which the limits leave nothing, after which a scan is stopped: the policy has lost its way."""


@dataclass
class Gate:
    """Every decision passes through here once before it goes to the source. The part of a decision that is not carried
    out is reported to the policy with the next question.

    actions: those of the whole campaign. approval_s: seconds that a proposed decision waits for a person; 0: none is
    asked for. unanswered: what holds then.
    """

    guard: Guard
    actions: OpenActions
    lookahead: int
    scans: list[str]
    """The scans of the campaign so far, in their order; somebody else adds to it."""
    approval_s: float = 0.0
    unanswered: Word = "approve"
    unmeasured: Unmeasured = field(default_factory=Unmeasured)
    paused: bool = False
    closed: bool = False
    proposed: DecisionProposed | None = None
    """What waits for a person's word."""
    raised: list[Event] = field(default_factory=list)
    """Events to be logged; they call for no action."""
    _held: tuple[DecisionSuggested, int, bool] | None = None
    """And the scan that it was made for, and whether its stop was added here."""
    _first: int = 0
    """The scan after the last one that was stopped: no decision is for an earlier one."""
    _declined: list[Declined] = field(default_factory=list)
    _stopped: bool = False
    _ended: str = ""
    """Why a scan was ended, of which the policy is still to hear."""
    _fruitless: int = 0

    @property
    def outstanding(self) -> int:
        """Positions decided on that have brought no frame yet."""
        return self.unmeasured.count

    @property
    def waiting(self) -> Positions:
        """The positions of the decision that waits for a person's word."""
        return () if self._held is None else self._held[0].positions

    def ask(self) -> list[Action]:
        """Ask the policy, where the source has too little in hand. After a stop, the next scan is asked for once
        everything of this one is measured or refused."""
        room = 1 if self._stopped else self.lookahead
        waits = self.paused or self.closed or self.proposed is not None or self.actions.any(AskPolicy)
        if waits or self.outstanding >= room:
            return []
        declined, ended = tuple(self._declined), self._ended
        self._declined.clear()
        self._ended = ""
        return [self.actions.give(AskPolicy(self.lookahead, declined, ended))]

    def take(self, suggested: DecisionSuggested) -> list[Action]:
        """The policy's answer: what the limits leave of it is carried out, or proposed to a person."""
        if self.closed:
            return []
        if self._stopped:
            self._stopped = False
            self.guard.begin()
        allowed = self._limited(suggested, suggested.time)
        if not allowed.positions and not allowed.stop:
            self._fruitless += 1
            if self._fruitless < _FRUITLESS:
                return []
            why = f"the limits left nothing of {_FRUITLESS} decisions in a row"
            allowed = replace(allowed, reasons=(why,), stop=True)
        self._fruitless = 0
        made = allowed, self._scan_of(suggested), allowed.stop and not suggested.stop
        if not self.approval_s:
            return self._carry_out(*made)
        until = suggested.time + self.approval_s
        self._held = made
        self.proposed = DecisionProposed(
            time=suggested.time,
            positions=len(allowed.positions),
            reason=allowed.reasons[0],
            stop=allowed.stop,
            until=until,
            default=self.unanswered,
        )
        self.raised.append(self.proposed)
        return [self.actions.give(Remind(until))]

    def obey(self, command: Command) -> list[Action]:
        """A person's pause, resume, approve, veto or limit."""
        match command.name:
            case "pause":
                self.paused = True
            case "resume":
                self.paused = False
                return self.tick(command.time)
            case "approve" | "veto":
                return self._settle(command.name == "approve", "a person", command.time)
            case "limit":
                area = None if command.area is None else Field(*command.area)
                self.guard.asked = Limits(area=area, shortest_dwell=command.shortest_dwell)
        return []

    def objection(self, command: Command) -> str | None:
        """Why a command cannot be obeyed now; None where it can."""
        if command.name in ("approve", "veto") and self.proposed is None:
            return f"found no decision that waits for an answer, expected one to {command.name}"
        if command.name == "limit":
            try:
                area = None if command.area is None else Field(*command.area)
                self.guard.limits.narrowed(area, Limits(shortest_dwell=command.shortest_dwell).shortest_dwell)
            except (ValueError, TypeError) as error:
                return str(error)
        return None

    def tick(self, time: float) -> list[Action]:
        """A proposal that nobody answered in time is settled; not while paused: then nobody wants the stage to move."""
        if self.proposed is None or self.paused or time < self.proposed.until:
            return []
        return self._settle(self.unanswered == "approve", "nobody answered", time)

    def arrived(self, frames: int) -> None:
        """Positions have brought frames, or will bring none."""
        self.unmeasured.arrived(frames)

    def came(self, frames: int, asked: Positions) -> None:
        """Positions have brought frames, some of them these; of the others nobody says which."""
        self.unmeasured.without(asked)
        self.arrived(frames - len(asked))

    def refused(self, event: FrameRefused) -> None:
        """The source will not measure some positions."""
        self.unmeasured.without(event.positions)
        self.arrived(event.count - len(event.positions))
        if event.positions:
            decision = DecisionSuggested(time=event.time, positions=event.positions, reasons=())
            self.decline(decision, event.positions, event.reason)

    def reserve(self, raster: Positions) -> Positions:
        """Which of these positions may be measured though nobody decides any more: none where a person has a say, or
        the scan is over."""
        if self.paused or self.closed or self.approval_s or self._stopped:
            return ()
        trial = DecisionSuggested(time=0.0, positions=raster, reasons=("safe raster",) * len(raster))
        return self.guard.limited(trial)[0].positions

    def fell_back(self, event: FellBack) -> None:
        """The source has measured a part of the reserve by itself."""
        measured = DecisionSuggested(time=event.time, positions=event.positions, reasons=())
        self.guard.allow(measured)
        self.unmeasured.add(event)
        self.decline(measured, event.positions, MEASURED)

    def decline(
        self,
        decision: DecisionSuggested,
        positions: Positions,
        reason: str,
        *,
        stop: bool = False,
    ) -> None:
        """Keep for the policy what of a decision is not carried out: these positions, and whether its stop."""
        reasons = (reason,) * max(len(positions), int(stop))
        part = replace(decision, positions=positions, reasons=reasons, dwell=None, stop=stop)
        self._declined.append(Declined(part, reason))

    def close(self) -> None:
        """No further position is asked for or carried out."""
        self.closed, self.proposed, self._held = True, None, None

    def _settle(self, approved: bool, by: str, time: float) -> list[Action]:
        held, self._held, self.proposed = self._held, None, None
        if held is None:
            return []
        self.raised.append(DecisionSettled(time=time, approved=approved, by=by))
        decision, scan, added = held
        if approved:
            allowed = self._limited(decision, time)  # limits may have been set since it was proposed
            return self._carry_out(allowed, scan, added) if allowed.positions or allowed.stop else []
        self.decline(decision, decision.positions, f"vetoed: {by}", stop=decision.stop and not added)
        return []

    def _limited(self, decision: DecisionSuggested, time: float) -> DecisionSuggested:
        """What the limits leave of a decision; the rest is logged, and kept for the policy."""
        allowed, refused = self.guard.limited(decision)
        for reason, positions in refused.items():
            self.raised.append(DecisionLimited(time=time, count=len(positions), reason=reason))
            self.decline(decision, positions, reason)
        return allowed

    def _scan_of(self, decision: DecisionSuggested) -> int:
        """Number of the scan that a decision was made for. The source may have gone on to another one by itself, which
        the policy learns from its first frame."""
        if decision.scan is None:
            return self._first
        known = self.scans.index(decision.scan) if decision.scan in self.scans else len(self.scans)
        return max(self._first, known)

    def _carry_out(self, decision: DecisionSuggested, scan: int, added: bool) -> list[Action]:
        self.guard.allow(decision)
        self._stopped = decision.stop
        if decision.stop:
            self._first = scan + 1
        if added:
            self._ended = self.guard.full or decision.reasons[0]
        steer = self.actions.give(Steer(decision, scan))
        self.unmeasured.add(steer)
        return [steer]


def checked(approval_s: float, unanswered: str) -> None:
    """Refuse settings that make no sense."""
    if not 0 <= approval_s < inf or unanswered not in ("approve", "veto"):
        raise ValueError(
            f"found approval_s={approval_s}, unanswered={unanswered!r}; expected 0 or more seconds, and approve or veto"
        )
