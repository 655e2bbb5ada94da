"""What a policy has answered, so that it can go on elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from steering.campaign import DecisionSuggested, Event
from steering.inference.policy_replay import DeclinedPart


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyAnswer:
    """An answer of the policy, and at times the policy as it was after it.

    Whoever has kept them (`following`) can let the policy go on elsewhere: from its saved state, with what it was asked
    since then. What was answered is not decided again, and an answer that never arrived was not given.
    """

    decision: DecisionSuggested
    asked: int
    """Positions that were asked for."""
    declined: tuple[DeclinedPart, ...] = ()
    """What the policy heard of its earlier decisions just before."""
    ended: str = ""
    """And why its scan was ended, where it had suggested no stop."""
    ingested: Mapping[str, int]
    """How many frames of each scan the policy had taken in, the first to arrive."""
    policy: bytes | None = None
    """The saved state: pickled, without the live images. None: it was not saved with this answer, see `PolicyHost`."""
    bound: bool = False
    """This policy cannot be pickled."""
    since: tuple[PolicyAnswer, ...] = ()
    """With a state from `following`: the answers after the one that it was saved with."""
    saved_ingested: Mapping[str, int] = field(default_factory=dict)
    """And what the policy had taken in when it was saved."""
    action: int = 0
    """Id of the action that asked."""

    def following(self, last: PolicyAnswer | None) -> PolicyAnswer:
        """This answer with the newest saved state, and with every answer since then: all that `PolicyHost` goes on
        from. last: the answer before, as this method returned it."""
        if self.policy is not None:
            return replace(self, saved_ingested=self.ingested)
        if last is None or self.bound:
            return self
        since = (*last.since, self)
        return replace(self, policy=last.policy, bound=last.bound, since=since, saved_ingested=last.saved_ingested)


class Answers:
    """The answers of the scan that goes on: those after the newest that ended one."""

    def __init__(self, known: Iterable[PolicyAnswer] = ()) -> None:
        self.kept: list[PolicyAnswer] = list(known)
        """Oldest first."""

    def note(self, answer: PolicyAnswer) -> None:
        """Take in the newest answer."""
        if self.kept and self.kept[-1].decision.stop:
            self.kept.clear()
        self.kept.append(replace(answer, policy=None, since=()))

    def to(self, action: int) -> PolicyAnswer | None:
        """What was answered to an action already, where that is the newest answer; None where it is another."""
        newest = self.kept[-1] if self.kept else None
        return newest if newest is not None and action and newest.action == action else None


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """Work that nobody waits for has raised: whoever reads the events does so in its place."""

    error: Exception
