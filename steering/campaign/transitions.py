"""Which version serves: candidates are weighed, and versions go into and out of service one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite, isnan, nan

from steering.campaign.actions import Action, OpenActions, Publish, Refuse, RollBack, TakeBack, Train
from steering.campaign.event import Answer
from steering.campaign.events import (
    CandidateReady,
    ModelPublished,
    RolledBack,
    VersionRefused,
)


@dataclass
class Transitions:
    """Publications, their withdrawal, and returns to an older version: at most one is under way.

    A return that is wished for meanwhile waits for its turn. While one is under way or waits, no training round is
    begun, and the candidate of a round that began before it is refused: it descends from what is being left.

    actions: those of the whole campaign. gain: see CampaignSettings.
    """

    actions: OpenActions
    gain: float
    version: int = 0
    """In service."""
    served: list[int] = field(default_factory=list)
    """Versions in the order in which they went into service; one that came back stands there again."""
    expected: float | None = None
    """Residual that the model in service should reach; None for the untrained network."""
    frames: int = 0
    """That the version in service has predicted since it went there."""
    _newest: int = 0
    _due: TakeBack | None = None
    _wished: RollBack | None = None
    _left_at: int = 0
    """Id of the newest action that brought an older version back."""
    _loss_marks: dict[str, float] = field(default_factory=dict)
    """Training loss that candidates of a scan must beat where there is no error to judge by."""

    @property
    def under_way(self) -> bool:
        """Whether a version is on its way into or out of service, or is wished to be."""
        return self._due is not None or self._wished is not None or self.actions.any(Publish, TakeBack, RollBack)

    @property
    def going_back(self) -> bool:
        """Whether an older version is on its way back into service, or is wished to be."""
        return self._wished is not None or self.actions.any(RollBack)

    def weigh(self, train: Train, event: CandidateReady) -> list[Action]:
        """Publish the candidate of a round that is over, or refuse it."""
        return [self.actions.give(self._verdict(train, event))]

    def _verdict(self, train: Train, event: CandidateReady) -> Action:
        if self.going_back or train.id < self._left_at:
            return Refuse("its round began before the ranks went back to an older version")
        publish = Publish(self._newest + 1, train.id)
        error, served = number(event.error), number(event.served_error)
        if isnan(error) and isnan(served):
            return self._weigh_by_loss(event.scan, number(event.loss), publish)
        if isnan(served) or error < (1 - self.gain) * served:
            return publish
        return Refuse(f"error {error:.4g}, the model in service has {served:.4g}")

    def _weigh_by_loss(self, scan: str, loss: float, publish: Publish) -> Action:
        mark = self._loss_marks.get(scan, inf)
        better = loss < (1 - self.gain) * mark
        if better:
            self._loss_marks[scan] = loss
        if better and isfinite(mark):
            return publish
        return Refuse(f"no labelled frame is held out to judge by; training loss {loss:.4g}, best before it {mark:.4g}")

    def go_back(self, version: int | None, reason: str, *, if_better: bool = False) -> None:
        """Wish for an older version, by default the one before; where there is none, or one is on its way, nothing."""
        target = self.before(version)
        if target is not None and not self.going_back:
            self._wished = RollBack(target, reason, if_better)

    def before(self, version: int | None) -> int | None:
        """The version to go back to: the one asked for, or the newest that served and is older than the one in service;
        None where there is none."""
        if version is None:
            return max((older for older in self.served if older < self.version), default=None)
        return version if version in self.served and version != self.version else None

    def objection(self, version: int | None) -> str | None:
        """Why that version cannot be put back into service, in words; None where it can."""
        if self.going_back:
            return "found an older version on its way back into service already, expected that to be over: try again"
        if self.before(version) is not None:
            return None
        known = sorted(set(self.served) - {self.version})
        wish = "no version before it" if version is None else f"a wish for version {version}"
        return f"found version {self.version} in service and {wish}, expected one of {known} to go back to"

    def take(self, event: Answer) -> None:
        """Take in what became of a transition."""
        match event:
            case ModelPublished():
                self._serve(event)
            case VersionRefused():
                self._due = TakeBack(event.version, self.version, event.reason)
            case RolledBack():
                self._serve(event)
                self._left_at = event.action or 0

    def next(self) -> list[Action]:
        """What is due now, if nothing is under way any more: the refused version goes before the wish for an older
        one."""
        if self.actions.any(Publish, TakeBack, RollBack):
            return []
        action: TakeBack | RollBack | None = self._due
        if action is not None:
            self._due = None
        else:
            action, self._wished = self._wished, None
        if action is None or (isinstance(action, RollBack) and action.version == self.version):
            return []
        return [self.actions.give(action)]

    def _serve(self, event: ModelPublished | RolledBack) -> None:
        self.version = event.version
        self.served.append(event.version)
        self._newest = max(self._newest, event.version)
        expected = number(event.validation_residual)
        self.expected = None if isnan(expected) else expected
        self.frames = 0


def number(value: float | None) -> float:
    """A number that is not known is NaN where it is computed and null in the log: both mean the same."""
    return nan if value is None else value
