"""The state machine of a campaign: events in, actions out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from steering.campaign.actions import (
    Action,
    Finish,
    Label,
    OpenActions,
    Refuse,
    Steer,
    Train,
)
from steering.campaign.drift import DriftTest
from steering.campaign.event import Answer, Event
from steering.campaign.events import (
    AnswerIgnored,
    CandidateReady,
    ChunkArrived,
    Command,
    DecisionLimited,
    DecisionProposed,
    DecisionSettled,
    DecisionSuggested,
    DriftLowered,
    DriftRaised,
    FrameRefused,
    LabelsReady,
    ModelPublished,
    PredictionReady,
    ScanNotLabelled,
    SourceEnded,
    Tick,
    TrainingSkipped,
    decode,
)
from steering.campaign.gate import Gate
from steering.campaign.limits import Guard
from steering.campaign.losses import FellBack, GroupChanged, PredictorReplaced
from steering.campaign.run_events import CampaignBegan
from steering.campaign.settings import CampaignSettings
from steering.campaign.transitions import Transitions
from steering.campaign.unlabelled import Unlabelled

RAISED = (
    DriftRaised,
    DriftLowered,
    DecisionLimited,
    DecisionProposed,
    DecisionSettled,
    AnswerIgnored,
    ScanNotLabelled,
)
"""Events that the campaign itself brings about."""

MOST_LOSSES = 3
"""So often in a row the predictor may be lost without a predicted frame in between, and the group of ranks fail
without a training round in between: more is not chance."""


@dataclass
class Campaign:
    """Decides from events alone; the same events in the same order give the same actions.

    `handle` returns the actions that an event calls for. Events that the campaign itself brings about (see RAISED)
    wait in `raised` until the runner logs them; they call for no action.

    frame_time: seconds of a position whose decision names no dwell, for the safe limits.

    Every action to label, to train, to change the version in service and to ask the policy is answered by one event
    before the next of its kind is given, or is void when the group of ranks changes. The policy is not asked while
    paused, nor after a stop before everything of the scan is measured or refused. After Finish nothing more is asked
    for.
    """

    settings: CampaignSettings = field(default_factory=CampaignSettings)
    frame_time: float = 0.0
    scan: str | None = None
    scans: list[str] = field(default_factory=list)
    frames: int = 0
    generation: int = 0
    """Of the group of ranks."""
    interruptions: int = 0
    """Groups of the same ranks in a row, without a training round between them."""
    predictor_losses: int = 0
    """In a row, without a predicted frame between them."""
    drift: bool = False
    finished: bool = False
    stopped: bool = False
    """By a person."""
    raised: list[Event] = field(default_factory=list)
    actions: OpenActions = field(default_factory=OpenActions)
    unlabelled: Unlabelled = field(default_factory=Unlabelled)
    _alarmed: bool = False
    """Drift was raised, and no labels were asked for since."""
    _relabel: bool = False
    """The group of ranks changed, and no labels were asked for since."""
    _trust: DriftTest = field(init=False)
    _ended: bool = False
    _counted: set[type[Action]] = field(default_factory=set)
    """Of Label and Train, which was given as one of those after the end."""
    _rounds_left: int = 0
    _labels_left: int = 0
    _of_scan: int = 0
    _unlabelled: int = 0
    _labelled: str | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        guard = Guard(settings.limits, self.frame_time)
        self.gate = Gate(
            guard,
            self.actions,
            settings.lookahead,
            self.scans,
            settings.approval_s,
            settings.unanswered,
            raised=self.raised,
        )
        self.models = Transitions(self.actions, settings.gain)
        self._trust = DriftTest(settings.drift_window, settings.drift_false_alarm)

    @property
    def began(self) -> CampaignBegan:
        """The first event of this campaign's log."""
        return CampaignBegan(time=0.0, settings=asdict(self.settings), frame_time=self.frame_time)

    @property
    def version(self) -> int:
        """In service."""
        return self.models.version

    @property
    def served(self) -> list[int]:
        """Versions in the order in which they went into service; one that came back stands there again."""
        return self.models.served

    @property
    def expected(self) -> float | None:
        """Residual that the model in service should reach; None for the untrained network."""
        return self.models.expected

    @property
    def labelling(self) -> bool:
        """Whether labels are being made."""
        return self.actions.any(Label)

    @property
    def training(self) -> bool:
        """Whether a round is under way, or its candidate is on its way to be published or refused."""
        return self.actions.any(Train, Refuse) or self.models.under_way

    @property
    def trust(self) -> dict[str, float]:
        """Of the newest frames, by residual and by offset: see `Window.level`."""
        return self._trust.levels

    @property
    def outstanding(self) -> int:
        """Positions decided on that have brought no frame yet."""
        return self.gate.outstanding

    @property
    def hopeless(self) -> str | None:
        """Why the run cannot go on, in words; None where it can."""
        if self.predictor_losses > MOST_LOSSES:
            return (
                f"found the predictor lost {self.predictor_losses} times in a row at the same place, expected one that "
                "lives: look at the log of the worker with the role inference, and at its memory"
            )
        if self.interruptions > MOST_LOSSES:
            return (
                f"found {self.interruptions} training rounds in a row that failed though no rank was lost, expected "
                "ranks that reach one another within the deadline: look at the logs of the workers with the role "
                "trainer, or raise TrainerSettings.deadline"
            )
        return None

    @property
    def unjudged(self) -> dict[str, int]:
        """Frames that were no evidence for or against the model, counted by the reason."""
        return self._trust.unjudged

    def handle(self, event: Event) -> list[Action]:
        """The actions that follow from an event, in the order in which to start them."""
        if self.finished:
            return []
        actions = self._answer(event) if isinstance(event, Answer) else self._take(event)
        if actions is None:
            ignored = event.action if isinstance(event, Answer) else None
            self.raised.append(AnswerIgnored(time=event.time, kind=type(event).__name__, action=ignored))
            return []
        actions += self._next()
        if self.finished:
            self.raised += self.unlabelled.end(event.time, self.settings.frames_to_label)
        return actions

    def _answer(self, event: Answer) -> list[Action] | None:
        """What an answer calls for by itself; None for one that fits no open action."""
        action = self.actions.answered(event)
        # The version that a campaign starts from is nobody's answer.
        first = isinstance(event, ModelPublished) and event.action is None
        if action is None and not first:
            return None
        match event:
            case DecisionSuggested():
                return self.gate.take(event)
            case Tick():
                return self.gate.tick(event.time)
            case CandidateReady() if isinstance(action, Train):
                self.interruptions = 0
                return self.models.weigh(action, event)
            case TrainingSkipped():
                self._skipped(event)
            case LabelsReady():
                if event.count:
                    self.unlabelled.labelled(event.scan)
                    self._labelled = event.scan if event.scan == self.scan else self._labelled
            case _:
                self.models.take(event)
        return []

    def _skipped(self, event: TrainingSkipped) -> None:
        """No round is begun until there are new labels."""
        if self._labelled == event.scan:
            self._labelled, self._relabel = None, True
        self._rounds_left += Train in self._counted

    def _take(self, event: Event) -> list[Action]:
        """What any other event calls for by itself."""
        match event:
            case PredictionReady():
                self._judge(event)
            case Command():
                return self._obey(event)
            case ChunkArrived():
                self._chunk(event)
            case FrameRefused():
                self.gate.refused(event)
            case FellBack():
                self.gate.fell_back(event)
            case GroupChanged():
                self._change_group(event)
            case PredictorReplaced():
                self.predictor_losses += 1
            case SourceEnded():
                self._end(self.settings.rounds_after_end, self.settings.labels_after_end)
        return []

    def _chunk(self, event: ChunkArrived) -> None:
        n = len(event.frame_ids)
        if event.scan != self.scan:
            if not self.labelling:  # else what comes of that is waited for
                self.raised += self.unlabelled.end(event.time, self.settings.frames_to_label)
            self.scan = event.scan
            self.unlabelled.begin(event.scan)
            if event.scan not in self.scans:
                self.scans.append(event.scan)
            self._of_scan = 0
            self._unlabelled = 0
        self.frames += n
        self._of_scan += n
        self._unlabelled += n
        self.unlabelled.came(event.scan, n)
        self.gate.came(n, event.asked)

    def _judge(self, event: PredictionReady) -> None:
        self.predictor_losses = 0
        models = self.models
        if event.version == models.version:
            models.frames += len(event.frame_ids)
        for verdict in self._trust.take(event, expected=models.expected):
            self.drift = isinstance(verdict, DriftRaised)
            # Labels are due at once, and where they are under way, again after them.
            self._alarmed = self.drift
            self.raised.append(verdict)
            # Also where frames of the version before, which come a little later, have tipped it: what must do better
            # on frames that it is tried on does no harm.
            if self.drift and models.frames <= self.settings.rollback_frames:
                why = f"trust fell {models.frames} frames after version {models.version} went into service"
                models.go_back(None, why, if_better=True)

    def _change_group(self, event: GroupChanged) -> None:
        """What the ranks of the group before were doing is void, and due again; their newest labels went with those
        that are lost."""
        self.generation = event.generation
        self.interruptions += not (event.lost or event.joined)
        if self.actions.void(Train) and Train in self._counted:
            self._rounds_left += 1
        if self.actions.void(Label) and Label in self._counted:
            self._labels_left += 1
        if self.settings.rounds_after_end and not self.stopped:  # else none are to follow
            again = self._rounds_left + event.rounds_lost
            # Before the end those of the greatest loss: what was lost longer ago has been learnt since.
            self._rounds_left = again if self._ended else max(self._rounds_left, event.rounds_lost)
        self._relabel = True

    def objection(self, command: Command) -> str | None:
        """Why a command cannot be obeyed now, in words for the person who gave it; None where it can."""
        if self.finished or (self._ended and command.name not in ("rollback", "stop")):
            return f"found a run whose measurement has ended, expected one that measures: cannot {command.name} it"
        return self.models.objection(command.version) if command.name == "rollback" else self.gate.objection(command)

    def _obey(self, event: Command) -> list[Action]:
        if self.objection(event) is not None:
            return []
        if event.name == "rollback":
            self.models.go_back(event.version, "asked by a person")
            return []
        if event.name != "stop":
            return self.gate.obey(event)
        self.stopped = True
        stop = DecisionSuggested(time=event.time, positions=(), reasons=("stopped by a person",), stop=True)
        self._rounds_left = self._labels_left = 0
        self._counted.clear()
        return [self.actions.give(Steer(stop, None))] if self._end(0, 0) else []

    def _end(self, rounds: int, labels: int) -> bool:
        """No further position is asked for; False where that is so already."""
        if self._ended:
            return False
        self._ended, self._labels_left = True, labels
        self._rounds_left += rounds  # to those that were lost before
        self.gate.close()
        return True

    def _next(self) -> list[Action]:
        """What is due now that the state has changed."""
        actions = [*self.gate.ask(), *self.models.next()]
        if self.scan is not None and self._label_is_due():
            self._alarmed = self._relabel = False
            self._unlabelled = 0
            self._labels_left = max(0, self._labels_left - self._count(Label))
            actions.append(self.actions.give(Label(self.scan, self.generation)))
        if self.scan is not None and self._training_is_due():
            self._rounds_left -= self._count(Train)
            actions.append(self.actions.give(Train(self.scan, self.settings.steps, self.generation)))
        if self._ended and not (self.labelling or self.training or actions):
            self.finished = True
            actions.append(self.actions.give(Finish("the source has ended and what it gave is learnt")))
        return actions

    def _count(self, kind: type[Action]) -> int:
        """1 for an action that is given as one of those after the end, else 0."""
        if self._ended:
            self._counted.add(kind)
        return int(self._ended)

    def _label_is_due(self) -> bool:
        if self.labelling or self._of_scan < self.settings.frames_to_label:
            return False
        if self._ended:
            return self._labels_left > 0 or (self._relabel and self._rounds_left > 0)
        at_once = (self._alarmed or self._labelled != self.scan) and self._unlabelled > 0
        return at_once or self._relabel or self._unlabelled >= self.settings.label_every

    def _training_is_due(self) -> bool:
        if self.training or self._labelled != self.scan:
            return False
        return self._rounds_left > 0 if self._ended else True


def replay(
    lines: Iterable[Mapping[str, Any]], settings: CampaignSettings | None = None, *, frame_time: float = 0.0
) -> tuple[Campaign, list[Action]]:
    """Feed a log to a fresh campaign: the state it ends in, and every action it asked for on the way.

    settings, frame_time: where the log does not say them, or what else would have been done with other ones.
    """
    campaign: Campaign | None = None
    actions: list[Action] = []
    for line in lines:
        event = decode(line)
        if isinstance(event, CampaignBegan):
            if settings is None:
                settings, frame_time = CampaignSettings.read(event.settings), event.frame_time
        elif event is not None and not isinstance(event, RAISED):
            campaign = campaign or Campaign(settings or CampaignSettings(), frame_time)
            actions += campaign.handle(event)
    return campaign or Campaign(settings or CampaignSettings(), frame_time), actions
