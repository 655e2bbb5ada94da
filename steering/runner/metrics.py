"""The figures of a run: while it goes on, and at its end."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from steering.campaign import (
    Action,
    Campaign,
    ChunkArrived,
    Command,
    Event,
    Fingerprint,
    FrameSetAside,
    GroupChanged,
    PredictionReady,
    PredictorReplaced,
    ScanRefined,
    encode,
)
from steering.inference import Score
from steering.labels.external import ExternalReport, external_figures
from steering.labels.make import LabelReport
from steering.learning import PARTS, Round
from steering.learning.strategies import STRATEGIES, Strategy
from steering.runner.describe import describe
from steering.runner.experiment import Experiment
from steering.runner.predictor_proxy import PredictorProxy

_OF_PREDICTION = (
    "backend",
    "backends",
    "frames_out_of_order",
    "frame_ids_missing",
)
"""What the summary tells of how frames were predicted."""


@dataclass
class Metrics:
    """What the runner counts while a run goes on."""

    experiment: Experiment
    campaign: Campaign
    begun: float = field(default_factory=time.time)
    rounds: list[list[Round]] = field(default_factory=list)
    """Of every training round, what each rank said."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By part: label, publish, and those of a training step (mean over ranks)."""
    published: int = 0
    refused: int = 0
    """Versions that the predictor has tried and not put into service."""
    arrived: Counter[str] = field(default_factory=Counter)
    """Frames on their way to the predictor, or there, by scan."""
    reported: Counter[str] = field(default_factory=Counter)
    """Those of them that were reported as predicted or as set aside."""
    predicted: int = 0
    """Frames."""
    aside: Counter[str] = field(default_factory=Counter)
    """Frames that were set aside, by reason."""
    ranks_lost: int = 0
    replaced: int = 0
    """Times that a predictor was lost and another took its place."""
    labels: int = 0
    """Frames in the newest labels."""
    left_out: int = 0
    """Labels that were made and were too bad to train on, so far."""
    outside: list[ExternalReport] = field(default_factory=list)
    """Of every file of labels that came from outside."""
    refinements: list[float] = field(default_factory=list)
    """Seconds that each refinement of the live image took."""
    finals: dict[str, ScanRefined] = field(default_factory=dict)
    """What the last refinement of each scan came to."""
    stopped: bool = False
    """A person has stopped the run."""
    too_late: int = 0
    """Such files that nobody opened before the end."""
    reason: str = ""
    """The policy's, for its newest decision."""
    noted: deque[Event] = field(default_factory=lambda: deque(maxlen=6))
    """The newest notable events."""
    own_end: dict[str, int] = field(default_factory=dict)
    """The version in service when each scan was left."""
    strata: dict[str, int] = field(default_factory=dict)
    """Key of each scan in the rehearsal buffers."""
    actions: Counter[str] = field(default_factory=Counter)
    """That the campaign asked for, by kind."""
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    def note(self, event: Event) -> None:
        """Take in an event: what the display and the summary show of it."""
        match event:
            case ChunkArrived():
                self.arrived[event.scan] += len(event.frame_ids)
            case PredictionReady():
                self.reported[event.scan] += len(event.frame_ids)
                self.predicted += len(event.frame_ids)
            case FrameSetAside():
                self.reported[event.scan] += len(event.frame_ids)
                self.aside[event.reason] += len(event.frame_ids)
            case PredictorReplaced():
                self.replaced += 1
            case ScanRefined():
                self.finals[event.scan] = event
            case Command(name="stop"):
                self.stopped = True
            case GroupChanged():
                self.ranks_lost += len(event.lost)
        if describe(event) is not None:
            self.noted.append(event)

    def trained(self, rounds: list[Round]) -> None:
        """Take in the ranks' reports of a training round."""
        self.rounds.append(rounds)
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
        """Frames of a scan that arrived and were reported neither as predicted nor as set aside yet."""
        return max(0, self.arrived[scan] - self.reported[scan])


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
        "residual": predictor["residual"],
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
        "events": [(event.time - metrics.begun, text) for event in metrics.noted if (text := describe(event))],
    }


def remote_share(metrics: Metrics) -> float | None:
    """Of the representatives used, how many came from another rank; None before the first."""
    every = [r for ranks in metrics.rounds for r in ranks]
    used = sum(r.representatives for r in every)
    return sum(r.remote for r in every) / used if used else None


def composition(metrics: Metrics) -> dict[str, Any]:
    """What the buffers of all ranks hold, by scan: after each training round, and how old it is at the end."""
    rounds = metrics.rounds[:: max(1, len(metrics.rounds) // 60)] + metrics.rounds[-1:]

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


async def summary(metrics: Metrics, source: dict[str, Any], ranks: int, proxy: PredictorProxy) -> dict[str, Any]:
    """The figures of summary.json, errors by the versions that matter included.

    source: its figures. ranks: how many there are at the end.
    """
    predictor = await proxy.ask("figures")
    errors, correlations = await _agreement(metrics, proxy)
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
        "prediction_latency_ms": predictor["latency_ms"],
        "prediction": {
            **{name: predictor[name] for name in _OF_PREDICTION},
            "versions_refused": metrics.refused,
            "frames_set_aside": dict(metrics.aside),
            "predictors_lost": metrics.replaced,
        },
        "ranks_lost": metrics.ranks_lost,
        "actions": {"given": dict(metrics.actions), "sha256": metrics.fingerprint.hexdigest()},
        "frames_no_evidence": dict(metrics.campaign.unjudged),
        "phase_error": errors,
        # Of one scan; of several it would not be clear which.
        "phase_correlation": correlations if len(metrics.campaign.scans) == 1 else {},
        "wall_s": {
            "acquire": source["acquire_s"],
            "predict": predictor["predict_s"],
            **{part: metrics.seconds[part] for part in ("label", *PARTS, "publish")},
        },
        "live_image": {"refinements": len(metrics.refinements), "refine_s": sum(metrics.refinements)},
        "final_refinement": {
            scan: {key: value for key, value in encode(event).items() if key not in ("event", "time", "scan")}
            for scan, event in metrics.finals.items()
        },
        "labels": {
            "left_out": metrics.left_out,
            "from_outside": external_figures(metrics.outside, metrics.too_late),
        },
        "total_s": time.time() - metrics.begun,
    }


async def _agreement(metrics: Metrics, proxy: PredictorProxy) -> tuple[dict[str, Any], dict[str, float | None]]:
    """By scan, phase errors of the versions that matter; and how well the images of the last scan correlate with the
    truth. Both only where it is known."""
    errors: dict[str, dict[str, Any]] = {}
    correlations: dict[str, float | None] = {}
    for scan in metrics.campaign.scans:
        first, last = await proxy.ask("versions_of", scan)
        own_end = metrics.own_end.get(scan, last)
        versions = tuple({first, own_end, metrics.campaign.version})
        scores: dict[int, Score] = await proxy.ask("evaluate", scan, versions)
        if not scores:
            continue
        stages = {"first": first, "own_end": own_end, "run_end": metrics.campaign.version}
        errors[scan] = {stage: _finite(scores[version].phase_error) for stage, version in stages.items()}
        errors[scan]["versions"] = stages
        correlations["held_out"] = _finite(scores[metrics.campaign.version].phase_correlation)
        refined = await proxy.ask("evaluate_refined", scan)
        if refined is not None:
            correlations["refined"] = _finite(refined.phase_correlation)
    return errors, correlations


def _name(strategy: Strategy) -> str:
    known = (name for name, kind in STRATEGIES.items() if kind is type(strategy))
    return next(known, type(strategy).__name__.lower())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
