"""What the campaign asks the runner to do, and which of its actions are not answered yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

from steering.campaign.event import Answer
from steering.campaign.events import (
    CandidateReady,
    CandidateRefused,
    DecisionSuggested,
    LabelsReady,
    ModelPublished,
    RollBackRefused,
    RolledBack,
    Tick,
    TrainingSkipped,
    VersionRefused,
)


@dataclass(frozen=True)
class Action:
    """Something to do. The event that answers it carries its id."""

    id: int = field(default=0, kw_only=True)
    """Given by the campaign when it asks, each once."""


@dataclass(frozen=True)
class Label(Action):
    """Make labels by refinement from the newest frames of a scan, and hand them to the ranks of a generation."""

    scan: str
    generation: int = 0


@dataclass(frozen=True)
class Train(Action):
    """Let every rank of a generation take that many optimiser steps, all together."""

    scan: str
    steps: int
    generation: int = 0


@dataclass(frozen=True)
class Publish(Action):
    """Publish the candidate of a training round (the id of its action), which the ranks hold, as this version."""

    version: int
    candidate: int = 0


@dataclass(frozen=True)
class TakeBack(Action):
    """A published version never went into service: remove it, and have the ranks judge by the one that serves."""

    version: int
    serving: int
    reason: str


@dataclass(frozen=True)
class Refuse(Action):
    """Leave the model in service where it is."""

    reason: str


@dataclass(frozen=True)
class RollBack(Action):
    """Put an older version into service again. if_better: only where it does better on the newest held-out frames."""

    version: int
    reason: str
    if_better: bool = False


@dataclass(frozen=True)
class Declined:
    """What of a decision was not carried out, and why: the policy hears of it before it is asked again."""

    decision: DecisionSuggested
    """The positions that are not measured, with stop=True where it was the stop that was not carried out."""
    reason: str


@dataclass(frozen=True)
class AskPolicy(Action):
    """Tell the policy what was declined of its decisions, and ask it for up to that many positions."""

    positions: int
    declined: tuple[Declined, ...] = ()
    ended: str = ""
    """Why the scan of the policy's newest decision was ended with it, though the policy had suggested no stop."""


@dataclass(frozen=True)
class Steer(Action):
    """Tell the source where to measure next. Decisions reach it in the order of these actions."""

    decision: DecisionSuggested
    scan: int | None
    """Number of the scan that it was made for, see `Decision`; None: the one that is measured now."""


@dataclass(frozen=True)
class Remind(Action):
    """Send a tick at that time, seconds since the epoch."""

    at: float


@dataclass(frozen=True)
class Finish(Action):
    """Everything is done: evaluate, write, close."""

    reason: str


_UNANSWERED = (Steer, Finish)
ANSWERS: Mapping[type[Answer], tuple[type[Action], ...]] = {
    DecisionSuggested: (AskPolicy,),
    Tick: (Remind,),
    LabelsReady: (Label,),
    CandidateReady: (Train,),
    TrainingSkipped: (Train,),
    ModelPublished: (Publish,),
    VersionRefused: (Publish,),
    CandidateRefused: (Refuse, TakeBack, Publish),
    RolledBack: (RollBack,),
    RollBackRefused: (RollBack,),
}
"""Which actions each kind of answer may answer."""
Some = TypeVar("Some", bound=Action)


@dataclass
class OpenActions:
    """Numbers actions, and remembers those that are to be answered."""

    given: int = 0
    """Id of the last one."""
    _open: dict[int, Action] = field(default_factory=dict)

    @property
    def open(self) -> tuple[Action, ...]:
        """Those that are to be answered, the oldest first."""
        return tuple(self._open.values())

    def give(self, action: Some) -> Some:
        """The action with an id of its own, from now on open."""
        self.given += 1
        numbered = replace(action, id=self.given)
        if not isinstance(action, _UNANSWERED):
            self._open[self.given] = numbered
        return numbered

    def answered(self, event: Answer) -> Action | None:
        """Close the action that an event answers; None where it answers no open one, see `ANSWERS`."""
        action = self._open.get(-1 if event.action is None else event.action)
        if action is None or not isinstance(action, ANSWERS.get(type(event), ())):
            return None
        return self._open.pop(action.id)

    def any(self, *kinds: type[Action]) -> bool:
        """Whether an action of one of these kinds is open."""
        return any(isinstance(action, kinds) for action in self._open.values())

    def void(self, kind: type[Action]) -> bool:
        """Close the actions of a kind without an answer; False where none was open."""
        found = [number for number, action in self._open.items() if isinstance(action, kind)]
        for number in found:
            del self._open[number]
        return bool(found)


class Fingerprint:
    """A chain of SHA-256 over actions in their order: two runs that asked for the same have the same."""

    def __init__(self, digest: str = "") -> None:
        """digest: of the actions before, as `hexdigest` returned it."""
        self._digest = digest

    def update(self, action: Action) -> None:
        """Take in the next action."""
        said = json.dumps([self._digest, type(action).__name__, asdict(action)])
        self._digest = hashlib.sha256(said.encode()).hexdigest()

    def hexdigest(self) -> str:
        """Of all actions so far."""
        return self._digest


def fingerprint(actions: Iterable[Action]) -> str:
    """The digest of actions, as above."""
    digest = Fingerprint()
    for action in actions:
        digest.update(action)
    return digest.hexdigest()
