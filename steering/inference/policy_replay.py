"""A policy goes on from a state that was saved before its last answers: they are asked for again, and enforced."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from steering.campaign import DecisionSuggested
from steering.policies import Policy
from steering.records import MEASURED, Decision
from steering.records.optional_parts import offers

Position = tuple[float, float]
Item = tuple[Position, str, float | None]
"""A position, the reason, and the dwell (s)."""
DeclinedPart = tuple[DecisionSuggested, str]
"""Of an earlier decision, what is not carried out, and the reason."""
OpenAccount = tuple[dict[Position, int], tuple[Item, ...], bool]


class Answered(Protocol):
    """What is known of an answer that was given."""

    @property
    def decision(self) -> DecisionSuggested:
        """The answer."""

    @property
    def asked(self) -> int:
        """Positions that were asked for."""

    @property
    def declined(self) -> Sequence[DeclinedPart]:
        """What the policy heard of earlier decisions just before it."""

    @property
    def ended(self) -> str:
        """Why its scan was ended before it, where the policy had suggested no stop; empty: it was not."""

    @property
    def ingested(self) -> Mapping[str, int]:
        """Frames of each scan that the policy had taken in before it."""


class PolicyReplay:
    """Asks a policy again for answers that were given already, and keeps count of where it now says otherwise.

    A policy that follows the data may answer otherwise, since the frames were predicted again. Positions that were
    decided and that it did not name this time are left out when it names them later; positions that it named and that
    were not decided are given first. So none is decided twice, and none is lost.
    """

    def __init__(self, answers: Sequence[Answered] = (), open: OpenAccount | None = None) -> None:
        """answers: oldest first. open: what was open when the policy was saved."""
        self._answers = deque(answers)
        owed, spare, ended = open or ({}, (), False)
        self._owed: Counter[Position] = Counter(owed)
        """Decided, and the policy does not know it."""
        self._spare: deque[Item] = deque(spare)
        """Named by the policy, and not decided."""
        self._ended = ended
        """Whether the policy has ended the scan with an answer that was another one before."""

    @property
    def open(self) -> OpenAccount:
        """Where what was decided is not what the policy thinks: to be saved with it."""
        return {where: n for where, n in self._owed.items() if n > 0}, tuple(self._spare), self._ended

    def frames_until(self, scan: str) -> int | None:
        """How many frames of a scan the policy had taken in before the next answer; None where there is none."""
        return self._answers[0].ingested.get(scan, 0) if self._answers else None

    def catch_up(self, policy: Policy, ingested: Mapping[str, int] | None) -> None:
        """Ask again for the answers that were given before the policy had more frames than these; None: for all."""
        while self._answers:
            answer = self._answers[0]
            if ingested is not None and any(ingested.get(scan, 0) < n for scan, n in answer.ingested.items()):
                return
            self._answers.popleft()
            decided = Counter(answer.decision.positions)
            self.decline(policy, answer.declined)
            self.end(policy, answer.ended)
            if not self._ended:
                self._compare(policy.suggest(answer.asked), decided)
            self._settle(decided)
            if answer.decision.stop:  # the scan is over: what was left open of it concerns nobody any more
                self._ended = False
                self._spare.clear()
                self._owed.clear()

    def decline(self, policy: Policy, declined: Sequence[DeclinedPart]) -> None:
        """Tell a policy that wants to know it what is not carried out. Of positions that it did not name this time it
        hears nothing, and they are still left out when it names them. So are those that were measured without it."""
        for part, reason in declined:
            if reason == MEASURED:
                self._settle(Counter(part.positions))
                continue
            if not offers(policy, "declined"):
                continue
            rows = [row for row, where in enumerate(part.positions) if not self._owed[where]]
            if rows or part.stop:
                positions = np.array([part.positions[row] for row in rows], np.float64).reshape(-1, 2)
                reasons = tuple(part.reasons[row] for row in rows) or part.reasons[:1]
                policy.declined(Decision(positions=positions, reasons=reasons, stop=part.stop), reason)

    def end(self, policy: Policy, reason: str) -> None:
        """Tell a policy that wants to know it why its scan was ended; no reason: it was not. What was open with it is
        closed: the next scan may come to the same positions."""
        if reason and offers(policy, "ended"):
            policy.ended(reason)
            self._owed.clear()
            self._spare.clear()
            self._ended = False

    def suggest(self, policy: Policy, n: int) -> Decision:
        """Up to n positions that were not decided yet."""
        if self._spare:
            return self._given(n)
        if self._ended:
            self._ended = False
            self._owed.clear()  # the next scan may come to the same positions
            return Decision(positions=np.zeros((0, 2)), reasons=("the policy ends the scan",), stop=True)
        while True:
            decision = policy.suggest(n)
            if self._owed.total():
                decision, left = self._without_owed(decision)
                if not left:
                    continue  # all of them were decided before
            if decision.stop:
                self._owed.clear()
            return decision

    def _compare(self, decision: Decision, decided: Counter[Position]) -> None:
        for number, where in enumerate(_positions(decision)):
            if decided[where]:
                decided[where] -= 1
            elif self._owed[where]:
                self._owed[where] -= 1
            else:
                dwell = None if decision.dwell is None else float(decision.dwell[number])
                self._spare.append((where, decision.reasons[number], dwell))
        self._ended = decision.stop

    def _settle(self, decided: Counter[Position]) -> None:
        """What is left of the positions that were decided: the policy named them before, or does not know of them."""
        spare = deque[Item]()
        for item in self._spare:
            if decided[item[0]]:
                decided[item[0]] -= 1
            else:
                spare.append(item)
        self._spare = spare
        self._owed += decided

    def _given(self, n: int) -> Decision:
        first = self._spare[0][2] is None
        given: list[Item] = []
        while self._spare and len(given) < n and (self._spare[0][2] is None) == first:
            given.append(self._spare.popleft())
        where, reasons, dwell = zip(*given, strict=True)
        return Decision(positions=np.array(where), reasons=reasons, dwell=None if first else np.array(dwell))

    def _without_owed(self, decision: Decision) -> tuple[Decision, bool]:
        """The decision without what was decided before, and whether anything is left of it."""
        keep = []
        for where in _positions(decision):
            keep.append(not self._owed[where])
            self._owed[where] -= not keep[-1]
        rows = np.flatnonzero(keep)
        if len(rows) == len(keep):
            return decision, True
        if not len(rows) and not decision.stop:
            return decision, False
        reasons = [decision.reasons[row] for row in rows] or ["the policy ends the scan"]
        dwell = None if decision.dwell is None else decision.dwell[rows]
        return Decision(
            positions=decision.positions[rows], reasons=tuple(reasons), dwell=dwell, stop=decision.stop
        ), True


def _positions(decision: Decision) -> list[Position]:
    return [(float(y), float(x)) for y, x in decision.positions]
