"""The state machine of a campaign: events in, actions out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, isnan, nan
from typing import Any

from steering.campaign.actions import Action, Finish, Label, Publish, Refuse, RollBack, Steer, Train
from steering.campaign.drift import DriftTest
from steering.campaign.events import (
    CandidateReady,
    CandidateRefused,
    ChunkArrived,
    Command,
    DecisionLimited,
    DecisionProposed,
    DecisionSettled,
    DecisionSuggested,
    DriftLowered,
    DriftRaised,
    Event,
    FrameRefused,
    LabelsReady,
    ModelPublished,
    PredictionReady,
    RankLost,
    RollBackRefused,
    RolledBack,
    SourceEnded,
    Tick,
    decode,
)
from steering.campaign.gate import Answer, Gate, checked
from steering.campaign.limits import Guard, Limits

RAISED = (DriftRaised, DriftLowered, DecisionLimited, DecisionProposed, DecisionSettled)
"""Events that the campaign itself brings about."""


@dataclass(frozen=True, kw_only=True)
class CampaignSettings:
    """The campaign's settings."""

    lookahead: int = 50
    """Positions the source should always have in hand: a second's worth keeps it from waiting."""
    frames_to_label: int = 40
    """Frames of a scan before the first labels are made: fewer do not overlap enough to be refined."""
    label_every: int = 120
    """New frames after which labels are made again."""
    steps: int = 40
    """Optimiser steps of a training round: a published model is at most that old."""
    rounds_after_end: int = 2
    """Rounds of training after the last frame."""
    labels_after_end: int = 1
    """Times that labels are made after the last frame, while the rounds of training go on."""
    gain: float = 0.01
    """A candidate is published when its error is lower by this share than that of the model in service.

    Where no labelled frame is held out there is no error to go by, and the training loss stands in: the first round of
    a scan sets the mark and is refused, a later one is published when its loss is lower by this share than the mark,
    and then sets it anew.
    """
    limits: Limits = field(default_factory=Limits)
    """What no decision may exceed, whatever the policy suggests."""
    approval_s: float = 0.0
    """Seconds that each decision waits for a person's `steering approve` or `steering veto`; 0: nobody is asked."""
    unanswered: Answer = "approve"
    """What holds after that time without an answer: `approve` or `veto`."""
    drift_window: int = 16
    """Newest frames over which trust is judged."""
    drift_false_alarm: float = 1e-4
    """Chance, for each frame, of an alarm though nothing has changed, at most: one in 100 scans of 100 frames."""
    rollback_frames: int = 64
    """Where trust falls within so many frames of a swap, the version before is tried on the newest held-out frames, and
    put back if it does better; 0: never."""

    def __post_init__(self) -> None:
        counts = (self.lookahead, self.frames_to_label, self.label_every, self.steps, self.drift_window)
        if min(counts) < 1 or min(self.rounds_after_end, self.labels_after_end) < 0:
            raise ValueError(f"found {self}, expected counts of 1 or more, and what comes after the end 0 or more")
        checked(self.approval_s, self.unanswered)
        if not (0 <= self.gain < 1 and 0 < self.drift_false_alarm < 0.05 and self.rollback_frames >= 0):
            raise ValueError(
                f"found {self}, expected gain in 0..1, drift_false_alarm above 0 and below 0.05, rollback_frames of 0 "
                "or more"
            )


@dataclass
class Campaign:
    """Decides from events alone; the same events in the same order give the same actions.

    `handle` returns the actions that an event calls for. Events that the campaign itself brings about (see RAISED)
    wait in `raised` until the runner takes them into the log; they call for no action.

    frame_time: seconds of a position whose decision names no dwell, for the safe limits.

    Every action to label, to train (and then to publish or refuse) and to ask the policy is answered by one event
    before the next of its kind is given. The policy is not asked while paused, nor after a stop before everything of
    the scan is measured or refused. After Finish nothing more is asked for.
    """

    settings: CampaignSettings = field(default_factory=CampaignSettings)
    frame_time: float = 0.0
    scan: str | None = None
    scans: list[str] = field(default_factory=list)
    frames: int = 0
    version: int = 0
    drift: bool = False
    labelling: bool = False
    training: bool = False
    finished: bool = False
    raised: list[Event] = field(default_factory=list)
    expected: float | None = None
    """Residual that the model in service should reach; None for the untrained network."""
    served: list[int] = field(default_factory=list)
    """Versions in the order in which they went into service; one that came back stands there again."""
    _newest: int = 0
    _since_swap: int = 0
    """Frames that the version in service has predicted since it went there."""
    _going_back: bool = False
    """An older version is on its way back into service; no round is begun or published meanwhile."""
    _outdated: bool = False
    """The round under way began before the ranks went back to an older version."""
    _alarmed: bool = False
    """Drift was raised, and no labels were asked for since."""
    _trust: DriftTest = field(init=False)
    _ended: bool = False
    _weighed: bool = False
    """The round under way is over, and its candidate on the way to be published or refused."""
    _rounds_left: int = 0
    _labels_left: int = 0
    _of_scan: int = 0
    _unlabelled: int = 0
    _labelled: str | None = None
    _loss_marks: dict[str, float] = field(default_factory=dict)
    """Training loss that candidates of a scan must beat where there is no error to judge by."""

    def __post_init__(self) -> None:
        settings = self.settings
        guard = Guard(settings.limits, self.frame_time)
        self.gate = Gate(guard, settings.lookahead, settings.approval_s, settings.unanswered, raised=self.raised)
        self._trust = DriftTest(settings.drift_window, settings.drift_false_alarm)

    @property
    def outstanding(self) -> int:
        """Positions decided on that have brought no frame yet."""
        return self.gate.outstanding

    @property
    def unjudged(self) -> dict[str, int]:
        """Frames that were no evidence for or against the model, counted by the reason."""
        return self._trust.unjudged

    def handle(self, event: Event) -> list[Action]:
        """The actions that follow from an event, in the order in which to start them."""
        if self.finished:
            return []
        match event:
            case DecisionSuggested():
                actions = self.gate.take(event)
            case Tick():
                actions = self.gate.tick(event.time)
            case CandidateReady():
                actions = self._weigh(event)
            case PredictionReady():
                actions = self._judge(event)
            case Command():
                actions = self._obey(event)
            case _:
                self._note(event)
                actions = []
        return [*actions, *self._next()]

    def _note(self, event: Event) -> None:
        """Take in what calls for no action by itself."""
        match event:
            case ChunkArrived():
                self._chunk(event)
            case FrameRefused():
                self.gate.arrived(event.count)
            case LabelsReady():
                self.labelling = False
                if event.scan == self.scan and event.count:
                    self._labelled = event.scan
            case ModelPublished() | RolledBack():
                self._serve(event)
            case RollBackRefused():
                self._going_back = False
            case CandidateRefused():
                self.training = self._weighed = False
            case RankLost():
                # A candidate that is weighed already will still be published or refused.
                self.training = self._weighed
            case SourceEnded():
                self._end(self.settings.rounds_after_end, self.settings.labels_after_end)

    def _chunk(self, event: ChunkArrived) -> None:
        n = len(event.frame_ids)
        if event.scan != self.scan:
            self.scan = event.scan
            if event.scan not in self.scans:
                self.scans.append(event.scan)
            self._of_scan = 0
            self._unlabelled = 0
        self.frames += n
        self._of_scan += n
        self._unlabelled += n
        self.gate.arrived(n)

    def _judge(self, event: PredictionReady) -> list[Action]:
        if event.version == self.version:
            self._since_swap += len(event.frame_ids)
        actions: list[Action] = []
        for verdict in self._trust.take(event, expected=self.expected):
            self.drift = isinstance(verdict, DriftRaised)
            # Labels are due at once, and where they are under way, again after them.
            self._alarmed = self.drift
            self.raised.append(verdict)
            if self.drift and self._since_swap <= self.settings.rollback_frames:
                why = f"trust fell {self._since_swap} frames after version {self.version} went into service"
                actions += self._roll_back(None, why, if_better=True)
        return actions

    def _weigh(self, event: CandidateReady) -> list[Action]:
        if self._weighed or not self.training:
            return []  # of a round that a lost rank has ended
        self._weighed = True
        if self._outdated or self._going_back:
            self._outdated = False
            return [Refuse("its round began before the ranks went back to an older version")]
        error, served = _number(event.error), _number(event.served_error)
        if isnan(error) and isnan(served):
            return [self._weigh_by_loss(event.scan, _number(event.loss))]
        if isnan(served) or error < (1 - self.settings.gain) * served:
            return [Publish(self._newest + 1)]
        return [Refuse(f"error {error:.4g}, the model in service has {served:.4g}")]

    def _weigh_by_loss(self, scan: str, loss: float) -> Action:
        mark = self._loss_marks.get(scan, inf)
        better = loss < (1 - self.settings.gain) * mark
        if better:
            self._loss_marks[scan] = loss
        if better and isfinite(mark):
            return Publish(self._newest + 1)
        return Refuse(f"no labelled frame is held out to judge by; training loss {loss:.4g}, best before it {mark:.4g}")

    def _serve(self, event: ModelPublished | RolledBack) -> None:
        self.version = event.version
        self.served.append(event.version)
        self._newest = max(self._newest, event.version)
        expected = _number(event.validation_residual)
        self.expected = None if isnan(expected) else expected
        self._since_swap = 0
        if isinstance(event, RolledBack):
            self._going_back, self._outdated = False, self.training and not self._weighed
        else:
            self.training = self.training and not self._weighed
            self._weighed = False

    def objection(self, command: Command) -> str | None:
        """Why a command cannot be obeyed now, in words for the person who gave it; None where it can."""
        if self.finished or (self._ended and command.name not in ("rollback", "stop")):
            return f"found a run whose measurement has ended, expected one that measures: cannot {command.name} it"
        if command.name in ("approve", "veto") and self.gate.proposed is None:
            return f"found no decision that waits for an answer, expected one to {command.name}"
        return self._objection_to(command.version) if command.name == "rollback" else None

    def _objection_to(self, version: int | None) -> str | None:
        """Why that version cannot be put back into service."""
        if self._going_back:
            return "found an older version on its way back into service already, expected that to be over: try again"
        if self._before(version) is not None:
            return None
        known = sorted(set(self.served) - {self.version})
        wish = "no version before it" if version is None else f"a wish for version {version}"
        return f"found version {self.version} in service and {wish}, expected one of {known} to go back to"

    def _obey(self, event: Command) -> list[Action]:
        if self.objection(event) is not None:
            return []
        if event.name == "rollback":
            return self._roll_back(event.version, "asked by a person")
        if event.name != "stop":
            return self.gate.obey(event)
        stop = DecisionSuggested(time=event.time, positions=(), reasons=("stopped by a person",), stop=True)
        self._rounds_left = self._labels_left = 0
        return [Steer(stop)] if self._end(0, 0) else []

    def _roll_back(self, version: int | None, reason: str, *, if_better: bool = False) -> list[Action]:
        target = self._before(version)
        if target is None or self._going_back:
            return []
        self._going_back = True
        return [RollBack(target, reason, if_better)]

    def _before(self, version: int | None) -> int | None:
        """The version to go back to: the one asked for, or the newest that served and is older than the one in service;
        None where there is none."""
        if version is None:
            return max((number for number in self.served if number < self.version), default=None)
        return version if version in self.served and version != self.version else None

    def _end(self, rounds: int, labels: int) -> bool:
        """No further position is asked for; False where that is so already."""
        if self._ended:
            return False
        self._ended, self._rounds_left, self._labels_left = True, rounds, labels
        self.gate.close()
        return True

    def _next(self) -> list[Action]:
        """What is due now that the state has changed."""
        actions = self.gate.ask()
        if self.scan is not None and self._label_is_due():
            self.labelling, self._alarmed = True, False
            self._unlabelled = 0
            if self._ended:
                self._labels_left -= 1
            actions.append(Label(self.scan))
        if self.scan is not None and self._training_is_due():
            self.training = True
            if self._ended:
                self._rounds_left -= 1
            actions.append(Train(self.scan, self.settings.steps))
        if self._ended and not (self.labelling or self.training or self._going_back or actions):
            self.finished = True
            actions.append(Finish("the source has ended and what it gave is learnt"))
        return actions

    def _label_is_due(self) -> bool:
        if self.labelling or self._of_scan < self.settings.frames_to_label:
            return False
        if self._ended:
            return self._labels_left > 0
        at_once = (self._alarmed or self._labelled != self.scan) and self._unlabelled > 0
        return at_once or self._unlabelled >= self.settings.label_every

    def _training_is_due(self) -> bool:
        if self.training or self._going_back or self._labelled != self.scan:
            return False
        return self._rounds_left > 0 if self._ended else True


def _number(value: float | None) -> float:
    """A number that is not known is NaN where it is computed and null in the log: both mean the same."""
    return nan if value is None else value


def replay(
    lines: Iterable[Mapping[str, Any]], settings: CampaignSettings | None = None, *, frame_time: float = 0.0
) -> tuple[Campaign, list[Action]]:
    """Feed a log to a fresh campaign: the state it ends in, and every action it asked for on the way."""
    campaign = Campaign(settings=settings or CampaignSettings(), frame_time=frame_time)
    actions: list[Action] = []
    for line in lines:
        event = decode(line)
        if event is not None and not isinstance(event, RAISED):
            actions += campaign.handle(event)
    return campaign, actions
