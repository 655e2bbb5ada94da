"""The figures of a run: while it goes on, and at its end."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from steering.campaign import (
    EVENTS,
    Action,
    Campaign,
    CheckpointWritten,
    ChunkArrived,
    Event,
    Fingerprint,
    FrameSetAside,
    FramesLost,
    GroupChanged,
    ModelPublished,
    PredictionReady,
    PredictorReplaced,
    RollBackRefused,
    RunRecovered,
    ScanRefined,
    ScansJudged,
    VersionRefused,
    WorkerLost,
    encode,
)
from steering.labels.external import ExternalReport, external_figures
from steering.labels.make import LabelReport
from steering.learning import PARTS, Round
from steering.learning.strategies import STRATEGIES, Strategy
from steering.records import Ids
from steering.records.plain import plain, whole
from steering.runner.describe import describe, waiting
from steering.runner.experiment import Experiment

_OF_PREDICTION = ("backend", "backends", "frames_out_of_order", "frame_ids_missing", "events_waited")
"""What the summary tells of how frames were predicted."""
_NOT_STATE = ("experiment", "campaign", "fingerprint")
_ROUNDS = 60
"""Rounds that are kept for the composition of the buffer over the run."""
_LISTED = 1000
"""Ids of lost frames that the summary names."""
MOST_JUDGED = 256
"""Versions of which the errors on each scan are kept."""
MOST_ROUNDS = 256
"""Training rounds that the figures of a run are made from: a run of days has a hundred thousand."""


@dataclass
class Metrics:
    """What the runner counts while a run goes on."""

    experiment: Experiment
    campaign: Campaign
    begun: float = field(default_factory=time.time)
    rounds: list[list[Round]] = field(default_factory=list)
    """Of training rounds, what each rank said: the first, the newest, and of those between at most MOST_ROUNDS, evenly
    thinned as they become more."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By part: label, publish, and those of a training step (mean over ranks)."""
    published: int = 0
    refused: int = 0
    """Versions that the predictor has tried and not put into service."""
    arrived: Counter[str] = field(default_factory=Counter)
    """Frames on their way to the predictor, or there, by scan."""
    waiting: dict[str, set[int]] = field(default_factory=dict)
    """Ids of those that were reported neither as predicted, nor as set aside, nor as lost yet, by scan."""
    early: dict[str, set[int]] = field(default_factory=dict)
    """Ids of frames that were reported before it was told that they have arrived, by scan: predictor and source are
    heard one beside the other."""
    predicted: int = 0
    """Frames."""
    residual: float | None = None
    """Median of the newest chunk that was predicted."""
    aside: Counter[str] = field(default_factory=Counter)
    """Frames that were set aside, by reason."""
    ranks_lost: int = 0
    ranks_joined: int = 0
    earlier: tuple[float, float] | None = None
    """Errors on held-out frames of the runs that this one was started from: as it began, and now."""
    samples_lost: int = 0
    """Stored samples that went with lost ranks."""
    silent: int = 0
    """Workers that were treated as lost because they were silent."""
    replaced: int = 0
    """Times that a predictor was lost and another took its place."""
    labels: int = 0
    """Frames in the newest labels."""
    left_out: int = 0
    """Labels that were made and were too bad to train on, so far."""
    outside: list[ExternalReport] = field(default_factory=list)
    """Of every file of labels that came from outside."""
    refinements: int = 0
    """Of the live image."""
    refine_s: float = 0.0
    """Seconds that they took."""
    finals: dict[str, ScanRefined] = field(default_factory=dict)
    """What the last refinement of each scan came to."""
    too_late: int = 0
    """Such files that nobody opened before the end."""
    reason: str = ""
    """The policy's, for its newest decision."""
    noted: deque[Event] = field(default_factory=lambda: deque(maxlen=6))
    """The newest notable events."""
    own_end: dict[str, int] = field(default_factory=dict)
    """The version in service at the newest frame of each scan."""
    judged: dict[int, dict[str, float]] = field(default_factory=dict)
    """By version, its errors by scan: the newest, and of those before at most MOST_JUDGED, thinned as they become more;
    those that were in service at the last frame of a scan stay."""
    strata: dict[str, int] = field(default_factory=dict)
    """Key of each scan in the rehearsal buffers."""
    actions: Counter[str] = field(default_factory=Counter)
    """That the campaign asked for, by kind."""
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    representatives: int = 0
    """Used in training so far."""
    remote: int = 0
    """Of them, how many came from another rank."""
    checkpoints: int = 0
    """Number of the newest."""
    checkpoint_bytes: int = 0
    """Written for the newest."""
    checkpoint_s: float = 0.0
    """Seconds during which checkpoints were being written, beside everything else."""
    recoveries: int = 0
    """Times that the run was recovered after the loss of everything."""
    lost: Counter[str] = field(default_factory=Counter)
    """Frames that had arrived and are gone for good, by scan."""
    lost_ids: list[int] = field(default_factory=list)
    """Their ids, the first thousand."""
    gone: dict[str, Ids] = field(default_factory=dict)
    """Their ids, by scan: each counts once, also where a second recovery tells of it anew."""

    def state(self) -> dict[str, Any]:
        """All that was counted, in JSON's types; of the rounds some, spread over the run."""
        kept = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _NOT_STATE}
        kept["rounds"] = [*self.rounds[:: max(1, len(self.rounds) // _ROUNDS)], *self.rounds[-1:]]
        return {**{name: plain(value) for name, value in kept.items()}, "fingerprint": self.fingerprint.hexdigest()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned elsewhere. Raises ValueError for anything else."""
        kinds = (Round, ScanRefined, ExternalReport, Ids, *EVENTS)
        try:
            for each in fields(self):
                if each.name not in _NOT_STATE:
                    setattr(self, each.name, whole(state[each.name], kinds))
            self.seconds = defaultdict(float, self.seconds)
            self.fingerprint = Fingerprint(str(state["fingerprint"]))
        except KeyError as error:
            raise ValueError(f"found figures of a run without {error}, expected them whole") from error

    def note(self, event: Event) -> None:
        """Take in an event: what the display and the summary show of it."""
        match event:
            case ChunkArrived():
                self._arrive(event)
            case PredictionReady():
                self._report(event)
                self.predicted += len(event.frame_ids)
                self.own_end[event.scan] = event.version
                self.residual = self.residual if event.residual is None else event.residual
            case FrameSetAside():
                self._report(event)
                self.aside[event.reason] += len(event.frame_ids)
            case ScanRefined():
                self.finals[event.scan] = event
            case ModelPublished():
                self.published += event.action is not None
            case VersionRefused() | RollBackRefused():
                self.refused += 1
            case ScansJudged():
                self._note_errors(event)
        self._note_loss(event)
        if describe(event) is not None:
            self.noted.append(event)

    def _arrive(self, event: ChunkArrived) -> None:
        self.arrived[event.scan] += len(event.frame_ids)
        early = self.early.setdefault(event.scan, set())
        self.waiting.setdefault(event.scan, set()).update(i for i in event.frame_ids if i not in early)
        early.difference_update(event.frame_ids)

    def _report(self, event: PredictionReady | FrameSetAside) -> None:
        waiting = self.waiting.setdefault(event.scan, set())
        self.early.setdefault(event.scan, set()).update(i for i in event.frame_ids if i not in waiting)
        waiting.difference_update(event.frame_ids)

    def _lose(self, event: FramesLost) -> None:
        gone = self.gone.setdefault(event.scan, Ids())
        new = [i for i in event.frame_ids if i not in gone]
        gone.add(new)
        self.lost[event.scan] += len(new)
        self.lost_ids = [*self.lost_ids, *new][:_LISTED]
        self.waiting.setdefault(event.scan, set()).difference_update(new)

    def _note_errors(self, event: ScansJudged) -> None:
        self.judged[event.version] = {scan: round(error, 4) for scan, error in event.errors.items()}
        if len(self.judged) > MOST_JUDGED:
            for version in set(sorted(self.judged)[1:-1:2]) - set(self.own_end.values()):
                del self.judged[version]

    def _note_loss(self, event: Event) -> None:
        match event:
            case PredictorReplaced():
                self.replaced += 1
            case GroupChanged():
                self.ranks_lost += len(event.lost) - len(event.retired)
                self.ranks_joined += len(event.joined)
                self.samples_lost += event.samples_lost
            case WorkerLost(silent=True):
                self.silent += 1
            case FramesLost():
                self._lose(event)
            case RunRecovered():
                self.recoveries += 1
            case CheckpointWritten():
                self.checkpoints, self.checkpoint_bytes = event.number, event.bytes
                self.checkpoint_s += event.seconds

    def trained(self, rounds: list[Round]) -> None:
        """Take in the ranks' reports of a training round."""
        self.rounds.append(rounds)
        if len(self.rounds) > MOST_ROUNDS:
            del self.rounds[1:-1:2]
        if (errors := rounds[0].earlier_errors) is not None:
            # A rank that takes the place of a lost one, or goes on after everything was, begins with what serves now.
            self.earlier = ((self.earlier or errors)[0], errors[1])
        self.representatives += sum(r.representatives for r in rounds)
        self.remote += sum(r.remote for r in rounds)
        for part in PARTS:
            self.seconds[part] += sum(r.seconds[part] for r in rounds) / len(rounds)

    def labelled(self, report: LabelReport) -> None:
        """Take in the report of label making."""
        self.seconds["label"] += report.seconds
        self.labels = report.count
        self.left_out += report.left_out

    def asked(self, actions: list[Action]) -> None:
        """Count the campaign's actions by kind, and add them to the digest of all actions."""
        for action in actions:
            self.actions[type(action).__name__] += 1
            self.fingerprint.update(action)

    def unreported(self, scan: str) -> int:
        """Frames of a scan that arrived and were reported neither as predicted, nor as set aside, nor as lost yet."""
        return len(self.waiting.get(scan, ()))


def snapshot(metrics: Metrics, source: dict[str, Any], predictor: dict[str, Any]) -> dict[str, Any]:
    """What a progress display shows: numbers, names and the newest events."""
    campaign = metrics.campaign
    rounds = metrics.rounds[-1] if metrics.rounds else []
    seconds = source["acquire_s"]
    over = campaign.finished and all(scan in metrics.finals for scan in campaign.scans)
    return {
        "status": "finished" if over else "running",
        "elapsed_s": time.time() - metrics.begun,
        "scan": campaign.scan,
        "scan_index": len(campaign.scans) - 1,
        "scans_total": len(metrics.experiment.scans or ()) or None,
        "frames_acquired": source["frames_acquired"],
        "frames_expected": metrics.experiment.frames,
        "frames_predicted": metrics.predicted,
        "frames_dropped": source["frames_dropped"],
        "streams": source["streams"],
        "frames_per_s": source["frames_acquired"] / seconds if seconds > 0.5 else None,
        "version": predictor["version"],
        "versions_published": metrics.published,
        "residual": metrics.residual,
        "residual_expected": campaign.expected,
        "drift": campaign.drift,
        "training": campaign.training,
        "steps": rounds[0].steps if rounds else 0,
        "loss": sum(r.loss for r in rounds) / len(rounds) if rounds else None,
        "labels": metrics.labels,
        "buffer_samples": sum(r.stored for r in rounds),
        "buffer_share": sum(r.stored for r in rounds) / max(1, sum(r.capacity for r in rounds)),
        "remote_share": remote_share(metrics),
        "reason": metrics.reason,
        "paused": campaign.gate.paused,
        "waits": None if campaign.gate.proposed is None else waiting(campaign.gate.proposed),
        "latency_ms": predictor["latency_ms"],
        "predict_s": predictor["predict_s"],
        "events": [(event.time - metrics.begun, text) for event in metrics.noted if (text := describe(event))],
    }


def remote_share(metrics: Metrics) -> float | None:
    """Of the representatives used, how many came from another rank; None before the first."""
    return metrics.remote / metrics.representatives if metrics.representatives else None


def composition(metrics: Metrics) -> dict[str, Any]:
    """What the buffers of all ranks hold, by scan: after each training round, and how old it is at the end."""
    rounds = metrics.rounds[:: max(1, len(metrics.rounds) // _ROUNDS)] + metrics.rounds[-1:]

    def held(ranks: list[Round], scan: str) -> list[dict[str, float]]:
        return [r.composition[metrics.strata[scan]] for r in ranks if metrics.strata[scan] in r.composition]

    if not any(r.composition for ranks in rounds for r in ranks):
        return {}
    return {
        "steps": [ranks[0].steps for ranks in rounds],
        "stored": {
            scan: [sum(int(h["count"]) for h in held(ranks, scan)) for ranks in rounds] for scan in metrics.strata
        },
        "age": {
            scan: {age: sum(h[age] for h in last) / len(last) for age in ("age_p10", "age_p50", "age_p90")}
            for scan in metrics.strata
            if (last := held(rounds[-1], scan))
        },
    }


def summary(metrics: Metrics, source: dict[str, Any], ranks: int, predictor: dict[str, Any]) -> dict[str, Any]:
    """The figures of summary.json that are counted while the run goes on.

    source, predictor: their figures. ranks: how many there are at the end.
    """
    return {
        "strategy": _name(metrics.experiment.strategy),
        "ranks": ranks,
        "scans": list(metrics.campaign.scans),
        "frames_acquired": source["frames_acquired"],
        "frames_predicted": metrics.predicted,
        "frames_dropped": source["frames_dropped"],
        "streams": source["streams"],
        "frames_unheard": sum(metrics.unreported(scan) for scan in metrics.arrived),
        "versions_published": metrics.published,
        "remote_representatives_share": remote_share(metrics),
        "rehearsal_buffer": composition(metrics),
        "earlier_errors": metrics.earlier,
        "prediction_latency_ms": predictor["latency_ms"],
        "prediction": {
            **{name: predictor[name] for name in _OF_PREDICTION},
            "versions_refused": metrics.refused,
            "frames_set_aside": dict(metrics.aside),
            "predictors_lost": metrics.replaced,
        },
        "ranks_lost": metrics.ranks_lost,
        "ranks_joined": metrics.ranks_joined,
        "samples_lost": metrics.samples_lost,
        "workers_silent": metrics.silent,
        "labels_dropped": sum(r.dropped for r in metrics.rounds[-1]) if metrics.rounds else 0,
        "actions": {"given": dict(metrics.actions), "sha256": metrics.fingerprint.hexdigest()},
        "frames_no_evidence": dict(metrics.campaign.unjudged),
        "wall_s": {
            "acquire": source["acquire_s"],
            "predict": predictor["predict_s"],
            **{part: metrics.seconds[part] for part in ("label", *PARTS, "publish")},
        },
        "live_image": {"refinements": metrics.refinements, "refine_s": metrics.refine_s},
        "final_refinement": {
            scan: {key: value for key, value in encode(event).items() if key not in ("event", "time", "scan")}
            for scan, event in metrics.finals.items()
        },
        "labels": {
            "left_out": metrics.left_out,
            "not_labelled": metrics.campaign.unlabelled.figures,
            "from_outside": external_figures(metrics.outside, metrics.too_late),
        },
        **_kept(metrics),
        "total_s": time.time() - metrics.begun,
    }


def _kept(metrics: Metrics) -> dict[str, Any]:
    """What checkpoints cost, and what was lost in spite of them."""
    return {
        "checkpoint": {
            "number": metrics.checkpoints,
            "bytes": metrics.checkpoint_bytes,
            "share": metrics.checkpoint_s / max(1e-9, time.time() - metrics.begun),
        },
        "recover": {
            "recoveries": metrics.recoveries,
            "frames_lost": dict(metrics.lost),
            "frame_ids_lost": metrics.lost_ids,
        },
    }


def _name(strategy: Strategy) -> str:
    known = (name for name, kind in STRATEGIES.items() if kind is type(strategy))
    return next(known, type(strategy).__name__.lower())


def advance(campaign: Campaign, metrics: Metrics, event: Event) -> list[Action]:
    """Let campaign and figures take an event in; the actions that follow. For a run that goes on, and for its log."""
    actions = campaign.handle(event)
    metrics.asked(actions)
    return actions
