"""The figures of a run: while it goes on, and at its end."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from steering.campaign import Campaign, ChunkArrived, Event, FrameSetAside, PredictionReady, PredictorReplaced
from steering.inference import Score
from steering.learning import PARTS, Round
from steering.learning.strategies import STRATEGIES, Strategy
from steering.runner.crew import Crew
from steering.runner.experiment import Experiment
from steering.runner.failover import Failover
from steering.runner.outside import OutsideReport, outside_figures
from steering.runner.words import tell

_OF_PREDICTION = (
    "way",
    "ways",
    "frames_out_of_order",
    "frame_ids_missing",
)
"""What the summary tells of how frames were predicted."""


@dataclass
class Ledger:
    """What the runner notes while it conducts."""

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
    heard: Counter[str] = field(default_factory=Counter)
    """Those of them of which it was said what became of them."""
    predicted: int = 0
    """Frames."""
    aside: Counter[str] = field(default_factory=Counter)
    """Frames that were set aside, by reason."""
    replaced: int = 0
    """Times that a predictor was lost and another took its place."""
    labels: int = 0
    """Frames in the newest labels."""
    left_out: int = 0
    """Labels that were made and were too bad to teach, so far."""
    outside: list[OutsideReport] = field(default_factory=list)
    """Of every file of labels that came from outside."""
    refinements: list[float] = field(default_factory=list)
    """Seconds that each refinement of the live image took."""
    too_late: int = 0
    """Such files that nobody opened before the end."""
    reason: str = ""
    """The policy's, for its newest decision."""
    told: deque[Event] = field(default_factory=lambda: deque(maxlen=6))
    """The newest events of note."""
    own_end: dict[str, int] = field(default_factory=dict)
    """The version in service when each scan was left."""
    strata: dict[str, int] = field(default_factory=dict)
    """Key of each scan in the rehearsal buffers."""

    def note(self, event: Event) -> None:
        """Keep what the display and the summary tell of an event."""
        match event:
            case ChunkArrived():
                self.arrived[event.scan] += len(event.frame_ids)
            case PredictionReady():
                self.heard[event.scan] += len(event.frame_ids)
                self.predicted += len(event.frame_ids)
            case FrameSetAside():
                self.heard[event.scan] += len(event.frame_ids)
                self.aside[event.reason] += len(event.frame_ids)
            case PredictorReplaced():
                self.replaced += 1
        if tell(event) is not None:
            self.told.append(event)

    def unheard(self, scan: str) -> int:
        """Frames of a scan that arrived and are neither predicted nor set aside yet."""
        return max(0, self.arrived[scan] - self.heard[scan])


def snapshot(ledger: Ledger, source: dict[str, Any], predictor: dict[str, Any]) -> dict[str, Any]:
    """What a progress display shows: numbers, names and the newest events."""
    campaign = ledger.campaign
    rounds = ledger.rounds[-1] if ledger.rounds else []
    seconds = source["acquire_s"]
    return {
        "status": "finished" if campaign.finished else "running",
        "elapsed_s": time.time() - ledger.begun,
        "scan": campaign.scan,
        "scan_index": len(campaign.scans) - 1,
        "scans_total": len(ledger.experiment.scans) or None,
        "frames_acquired": source["frames_acquired"],
        "frames_expected": ledger.experiment.frames,
        "frames_predicted": ledger.predicted,
        "frames_dropped": source["frames_dropped"],
        "frames_per_s": source["frames_acquired"] / seconds if seconds > 0.5 else None,
        "version": predictor["version"],
        "versions_published": ledger.published,
        "residual": predictor["residual"],
        "residual_expected": campaign.expected,
        "drift": campaign.drift,
        "training": campaign.training,
        "steps": rounds[0].steps if rounds else 0,
        "loss": sum(r.loss for r in rounds) / len(rounds) if rounds else None,
        "labels": ledger.labels,
        "buffer_samples": sum(r.stored for r in rounds),
        "buffer_share": sum(r.stored for r in rounds) / max(1, sum(r.capacity for r in rounds)),
        "remote_share": remote_share(ledger),
        "reason": ledger.reason,
        "paused": campaign.gate.paused,
        "events": [(event.time - ledger.begun, told) for event in ledger.told for told in (tell(event),) if told],
    }


def remote_share(ledger: Ledger) -> float | None:
    """Of the representatives used, how many came from another rank; None before the first."""
    every = [r for ranks in ledger.rounds for r in ranks]
    used = sum(r.representatives for r in every)
    return sum(r.remote for r in every) / used if used else None


def composition(ledger: Ledger) -> dict[str, Any]:
    """What the buffers of all ranks hold, by scan: after each training round, and how old it is at the end."""
    rounds = ledger.rounds[:: max(1, len(ledger.rounds) // 60)] + ledger.rounds[-1:]

    def held(ranks: list[Round], scan: str) -> list[dict[str, float]]:
        return [r.composition[ledger.strata[scan]] for r in ranks if ledger.strata[scan] in r.composition]

    if not any(r.composition for ranks in rounds for r in ranks):
        return {}
    return {
        "steps": [ranks[0].steps for ranks in rounds],
        "stored": {
            scan: [sum(int(h["count"]) for h in held(ranks, scan)) for ranks in rounds] for scan in ledger.strata
        },
        "age": {
            scan: {age: sum(h[age] for h in last) / len(last) for age in ("age_p10", "age_p50", "age_p90")}
            for scan in ledger.strata
            if (last := held(rounds[-1], scan))
        },
    }


async def summary(ledger: Ledger, crew: Crew, failover: Failover) -> dict[str, Any]:
    """The figures of summary.json, errors by the versions that matter included."""
    source, predictor = await crew.source.figures(), await failover.ask("figures")
    errors: dict[str, dict[str, Any]] = {}
    correlations: dict[str, float | None] = {}
    for scan in ledger.campaign.scans:
        first, last = await failover.ask("versions_of", scan)
        own_end = ledger.own_end.get(scan, last)
        versions = tuple({first, own_end, ledger.campaign.version})
        scores: dict[int, Score] = await failover.ask("evaluate", scan, versions)
        if not scores:
            continue
        stages = {"first": first, "own_end": own_end, "run_end": ledger.campaign.version}
        errors[scan] = {stage: _finite(scores[version].phase_error) for stage, version in stages.items()}
        errors[scan]["versions"] = stages
        correlations["held_out"] = _finite(scores[ledger.campaign.version].phase_correlation)
        refined = await failover.ask("evaluate_refined", scan)
        if refined is not None:
            correlations["refined"] = _finite(refined.phase_correlation)
    return {
        "strategy": _name(ledger.experiment.strategy),
        "ranks": len(crew.ranks),
        "scans": list(ledger.campaign.scans),
        "frames_acquired": source["frames_acquired"],
        "frames_predicted": ledger.predicted,
        "frames_dropped": source["frames_dropped"],
        "frames_unheard": sum(ledger.unheard(scan) for scan in ledger.arrived),
        "versions_published": ledger.published,
        "remote_representatives_share": remote_share(ledger),
        "rehearsal_buffer": composition(ledger),
        "prediction_latency_ms": predictor["latency_ms"],
        "prediction": {
            **{name: predictor[name] for name in _OF_PREDICTION},
            "versions_refused": ledger.refused,
            "frames_set_aside": dict(ledger.aside),
            "predictors_lost": ledger.replaced,
        },
        "frames_no_evidence": dict(ledger.campaign.unjudged),
        "phase_error": errors,
        # Of one scan; of several it would have to be told which.
        "phase_correlation": correlations if len(ledger.campaign.scans) == 1 else {},
        "wall_s": {
            "acquire": source["acquire_s"],
            "predict": predictor["predict_s"],
            **{part: ledger.seconds[part] for part in ("label", *PARTS, "publish")},
        },
        "live_image": {"refinements": len(ledger.refinements), "refine_s": sum(ledger.refinements)},
        "labels": {
            "left_out": ledger.left_out,
            "from_outside": outside_figures(ledger.outside, ledger.too_late),
        },
        "total_s": time.time() - ledger.begun,
    }


def _name(strategy: Strategy) -> str:
    known = (name for name, kind in STRATEGIES.items() if kind is type(strategy))
    return next(known, type(strategy).__name__.lower())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
