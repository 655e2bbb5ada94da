"""What a run goes on from after the loss of all its processes: the newest checkpoint, and the log after it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.campaign import (
    RAISED,
    Action,
    AskPolicy,
    Campaign,
    CandidateReady,
    ChunkArrived,
    DecisionSuggested,
    Event,
    FellBack,
    FrameRefused,
    FrameSetAside,
    FramesLost,
    GroupChanged,
    PredictionReady,
    RolledBack,
    ScanRevisited,
    SourceEnded,
    Steer,
    StreamsReported,
    campaign_from,
    decode,
)
from steering.inference import PolicyAnswer, ResumeState, SavedPolicy, SavedPredictor
from steering.learning import RanksPart
from steering.models import ModelStore
from steering.records import Ids
from steering.records.plain import whole
from steering.runner.again import note_read
from steering.runner.checkpoint import FRAMES
from steering.runner.event_log import events_after, repaired
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.manifest import Manifest, checkpoints, newest_whole, read_part
from steering.runner.metrics import Metrics, advance
from steering.runner.predictor_proxy import read_told
from steering.runner.source_events import SourceResume


@dataclass(frozen=True, kw_only=True, eq=False)
class Recovery:
    """Where a run goes on."""

    manifest: Manifest
    campaign: Campaign
    metrics: Metrics
    source: SourceResume
    predictor: ResumeState
    ranks: RanksPart | None
    """Their part of the checkpoint; None: there is none."""
    rounds_lost: int
    """Training rounds that the ranks' part does not include."""
    rolled_back: bool
    """An older version came back into service after the ranks' part was written."""
    unlogged: tuple[Event, ...]
    """Events that the campaign has brought about and the log lacks."""
    last: int
    """Number of the last event in the log."""
    remarks: tuple[str, ...]

    @property
    def open(self) -> tuple[Action, ...]:
        """Actions that nobody is carrying out any more."""
        return self.campaign.actions.open


@dataclass
class _Tail:
    """What the log says after the checkpoint."""

    decisions: list[Steer | FellBack]
    asked: dict[int, AskPolicy]
    step: int
    """Of the ranks' part."""
    answers: list[PolicyAnswer] = field(default_factory=list)
    handed: dict[int, str] = field(default_factory=dict)
    predicted: defaultdict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    aside: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    lost: Ids = field(default_factory=Ids)
    raised: int = 0
    rounds: int = 0
    """Lost ones that the campaign does not know of yet."""
    rolled_back: bool = False
    ended: bool = False
    times: set[float] = field(default_factory=set)
    """Of events of the source."""

    def note(self, event: Event) -> None:
        if isinstance(event, FrameRefused | ScanRevisited | SourceEnded | FramesLost | FellBack | StreamsReported):
            self.times.add(event.time)
        match event:
            case FellBack():
                self.decisions.append(event)
            case ChunkArrived():
                self.handed |= dict.fromkeys(event.frame_ids, event.scan)
            case PredictionReady():
                self.predicted[event.scan].update(dict.fromkeys(event.frame_ids, event.version))
            case FrameSetAside():
                self.aside[event.scan].update(event.frame_ids)
            case FramesLost():
                self._lost(event)
            case CandidateReady() | GroupChanged() | RolledBack():
                self._of_models(event)
            case SourceEnded():
                self.ended = True
            case DecisionSuggested():
                self._answered(event)

    def _lost(self, event: FramesLost) -> None:
        """Nobody has these any more: it is as if they had not been predicted, and they are not asked for again."""
        self.lost.add(event.frame_ids)
        for i in event.frame_ids:
            self.predicted[event.scan].pop(i, None)

    def _of_models(self, event: CandidateReady | GroupChanged | RolledBack) -> None:
        match event:
            case CandidateReady():
                self.rounds += event.steps > self.step
            case GroupChanged() if event.rounds_lost:
                self.rounds = 0
            case RolledBack():
                self.rolled_back = True

    def given(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Steer):
                self.decisions.append(action)
            elif isinstance(action, AskPolicy):
                self.asked[action.id] = action

    def _answered(self, event: DecisionSuggested) -> None:
        asked = self.asked.get(event.action or 0)
        if asked is not None:
            declined = tuple((each.decision, each.reason) for each in asked.declined)
            self.answers.append(
                PolicyAnswer(
                    decision=event,
                    asked=asked.positions,
                    declined=declined,
                    ended=asked.ended,
                    ingested=dict(event.ingested),
                    action=asked.id,
                )
            )


def recover(folder: RunFolder, experiment: Experiment) -> Recovery:
    """Read checkpoint and log, after the log's torn end is repaired. Once all is read the folder says that the run goes
    on; it is not changed otherwise.

    Raises NoCheckpoint where there is none, ValueError for one of another format or that does not hold together.
    """
    manifest, remarks = newest_whole(folder)
    root = checkpoints(folder)
    part = {name: read_part(root, manifest, name) for name in manifest.parts}
    repaired(folder)
    lines, last = events_after(folder, manifest.event)
    campaign = campaign_from(part["campaign"])
    if campaign.settings != experiment.safe_campaign:
        remarks.append("the workflow now has other settings of the campaign: it goes on by those that it began with")
    metrics = Metrics(experiment, campaign)
    metrics.restore(part["metrics"])
    unsent = whole(part["runner"]["unsent"], (Steer, DecisionSuggested))
    ranks = None if part["ranks"] is None else RanksPart.from_json(part["ranks"])
    asked = {a.id: a for a in campaign.actions.open if isinstance(a, AskPolicy)}
    tail = _Tail(unsent, asked, 0 if ranks is None else ranks.step)
    for line in lines:
        event = decode(line)
        if isinstance(event, RAISED):
            tail.raised += 1
            metrics.note(event)
        elif event is not None:
            metrics.note(event)
            tail.note(event)
            tail.given(advance(campaign, metrics, event))
    unlogged = tuple(campaign.raised[tail.raised :])
    campaign.raised.clear()
    source = _source(part, tail, campaign, metrics, root)
    if source.asked and not source.placed:
        left = f"{campaign.outstanding} positions had brought no frame"
        remarks.append(f"{left}: where the source was lost too, it is asked once more when the beamline is quiet")
    found = Recovery(
        manifest=manifest,
        campaign=campaign,
        metrics=metrics,
        source=source,
        predictor=_predictor(part, tail, campaign, root),
        ranks=ranks,
        rounds_lost=tail.rounds,
        rolled_back=tail.rolled_back,
        unlogged=unlogged,
        last=max(last, manifest.event),
        remarks=tuple(remarks),
    )
    note_read(folder)
    return found


def _source(part: dict[str, Any], tail: _Tail, campaign: Campaign, metrics: Metrics, root: Path) -> SourceResume:
    return SourceResume(
        position=part["source"],
        decisions=tuple(tail.decisions),
        handed=tail.handed,
        there=_there(part, tail),
        over=tuple(part["runner"]["over"]),
        asked=() if campaign.gate.closed else campaign.gate.unmeasured.left,
        frames=metrics.arrived.total(),
        ended=tail.ended or bool(part["runner"]["source_ended"]),
        logged=frozenset(tail.times),
        spooled=root / "spool",
    )


def _there(part: dict[str, Any], tail: _Tail) -> Ids:
    """Frames that nobody needs again: the predictor has them, or has set them aside, or they are known as lost."""
    found = Ids.of(each for scan in part["predictor"]["scans"] for each in scan["ids"])
    for before in read_told(part["runner"]["aside"]).values():
        found.update(before)
    for ids in tail.aside.values():
        found.add(ids)
    found.update(tail.lost)
    return found


def _predictor(part: dict[str, Any], tail: _Tail, campaign: Campaign, root: Path) -> ResumeState:
    saved = SavedPredictor(
        folder=root / FRAMES,
        part=part["predictor"],
        policy=SavedPolicy.read(part["predictor"]["policy"], tail.answers),
    )
    return ResumeState(
        version=campaign.version,
        predicted=dict(tail.predicted),
        aside=dict(tail.aside),
        over=tuple(part["runner"]["over"]),
        saved=saved,
        answered=saved.policy.answered,
        reported=read_told(part["runner"]["reported"]),
        aside_before=read_told(part["runner"]["aside"]),
    )


def clean_store(store: ModelStore, campaign: Campaign, known: Sequence[int]) -> None:
    """Have the store hold what the campaign knows of: the version in service as the newest, and none that was written
    when nobody was left to put it into service. known: versions that are on their way into service."""
    most = max([*campaign.served, *known, 0])
    for number in store.numbers():
        if number > most:
            store.withdraw(number, campaign.version)
    store.point_to(campaign.version)
