"""The status of a run in a few lines, from its folder alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from steering.campaign import DecisionProposed, decode
from steering.files import read_json
from steering.runner.again import checkpoint_age, continued_by
from steering.runner.alone import unsteered
from steering.runner.describe import limited_to, waiting
from steering.runner.devices import devices_in_words
from steering.runner.folder import RunFolder
from steering.runner.liveness import gone, standing
from steering.runner.noted import noted_stop
from steering.runner.stream_lines import ended_lines, stream_lines
from steering.view.display import drift_in_words
from steering.view.history import History, history


def status_lines(folder: RunFolder) -> list[str]:
    """What the run is doing or how it ended, one fact a line."""
    summary, events = standing(folder), folder.events()
    past, running = history(events), summary.get("status") == "running"
    rows = [
        ("samples", _samples(summary, past)),
        ("frames", _frames(summary, past)),
        ("source", silence(events) if running else ""),
        ("steering", _unsteered(folder, summary)),
        *(("stream", line) for line in _streams(summary, events)),
        ("model", _model(past)),
        ("trust", _trust(past, summary.get("status"))),
        ("saved", _saved(folder, summary)),
        ("device", _devices(events) if running else ""),
        ("waits", _waits(summary, events)),
        ("limits", _limits(events) if running else ""),
        ("stop", _stop(folder, summary)),
        ("jobs", "; ".join(waits_for(folder)) if running else ""),
        *(("failed", failed) for failed in _failed(events)),
        ("last", _last(past)),
        ("report", str(folder.path / "report.html") if (folder.path / "report.html").exists() else ""),
    ]
    return [f"{folder.name}: {_how(summary)}", *(f"  {label:<9}{text}" for label, text in rows if text)]


def lasted(summary: Mapping[str, Any]) -> float | None:
    """Seconds from start to end; None for a run that has not ended."""
    started, ended = summary.get("started"), summary.get("ended")
    if not started or not ended:
        return None
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def how(folder: RunFolder) -> str:
    """What the run does, or how it ended, in half a line."""
    return _how(standing(folder))


def _how(summary: Mapping[str, Any]) -> str:
    status, reason, whole = summary.get("status", "running"), summary.get("reason"), lasted(summary)
    if "lost" in summary:
        return str(summary["lost"])
    if whole is None:
        began = datetime.fromisoformat(summary["started"]).timestamp() if summary.get("started") else time.time()
        there = f" (on {summary['elsewhere']}: ask there)" if "elsewhere" in summary else ""
        return f"{status} for {duration(time.time() - began)}{there}"
    return f"{status} after {duration(whole)}{f': {reason}' if reason else ''}"


def _samples(summary: Mapping[str, Any], past: History) -> str:
    names = [str(name) for name in summary.get("scans") or past.scans]
    if not past.scans:
        return ", ".join(names)
    now = past.scans[-1]
    if summary.get("status") != "running" or now not in names:
        return ", ".join(names)
    place = f" (number {names.index(now) + 1} of {len(names)})" if len(names) > 1 else ""
    return f"{now}{place}"


def _frames(summary: Mapping[str, Any], past: History) -> str:
    acquired = summary.get("frames_acquired", past.acquired)
    if not acquired:
        return "none yet" if summary.get("status") == "running" else "none"
    predicted, dropped = summary.get("frames_predicted", past.predicted), summary.get("frames_dropped")
    return f"{acquired} acquired, {predicted} predicted{f', {dropped} dropped' if dropped is not None else ''}"


OF_SOURCE = ("ChunkArrived", "SourceSilent", "SourceReopened")
"""Events that say whether the source brings anything."""


def silence(events: Sequence[Mapping[str, Any]]) -> str:
    """Since when the source of a run that goes on is silent, and why it is being opened again; empty for one that
    brings frames. events: of the log, those of OF_SOURCE at least."""
    of_source = [e for e in events if e.get("event") in OF_SOURCE]
    if not of_source or of_source[-1]["event"] == "ChunkArrived":
        return ""
    since = [e["since"] for e in of_source[-2:] if e["event"] == "SourceSilent"] + [
        e["time"] for e in of_source if e["event"] == "ChunkArrived"
    ][-1:]
    began = datetime.fromtimestamp(since[0]).strftime("%H:%M:%S") if since else "its start"
    last = of_source[-1]
    why = f", opened again {last['attempt']} times: {last['reason']}" if "reason" in last else ""
    return f"silent since {began}{f' ({duration(time.time() - since[0])})' if since else ''}{why}"


def _unsteered(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    """Since when nobody decides where to measure, and what is measured all the same."""
    found = unsteered(folder.path) if summary.get("status") == "running" else None
    if found is None:
        return ""
    began = datetime.fromtimestamp(found["since"]).strftime("%H:%M:%S")
    return f"nobody since {began} ({duration(time.time() - found['since'])}): {found['measured']} of a safe raster"


def _streams(summary: Mapping[str, Any], events: list[dict[str, Any]]) -> list[str]:
    """What a live source's streams have brought, a line each."""
    if summary.get("streams"):
        return ended_lines(summary["streams"])
    reports = [e for e in events if e.get("event") == "StreamsReported"]
    if not reports:
        return []
    return stream_lines(reports[-1]["streams"], max(0.0, time.time() - reports[-1]["time"]))


def _model(past: History) -> str:
    if not past.versions:
        return ""
    error = next((v.error for v in reversed(past.versions) if v.number == past.in_service), None)
    judged = f", validation error {error:.3f}" if error is not None else ""
    return f"version {past.in_service}{judged}, {sum(v.number > 0 for v in past.versions)} published"


def _trust(past: History, status: str | None) -> str:
    if not past.residuals:
        return ""
    expected = f", {past.in_service_expects:.3f} expected" if past.in_service_expects is not None else ""
    raised = bool(past.drifts) and past.drifts[-1].stop is None
    drift = drift_in_words({"drift": raised, "status": status}) or "no drift"
    return f"residual {past.residuals[-1][1]:.3f}{expected}, {drift}"


def _saved(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    """The newest checkpoint of a run that goes on, or could."""
    newest = checkpoint_age(folder) if summary.get("status") == "running" else None
    if newest is None:
        return ""
    number, age_s = newest
    hint = f"; continue with {continued_by(folder)}" if gone(folder) else ""
    return f"checkpoint {number}, {duration(age_s)} ago{hint}"


def _devices(events: list[dict[str, Any]]) -> str:
    """Where ranks and predictor compute."""
    found = [event for event in events if event.get("event") == "DevicesFound"]
    return devices_in_words(found[-1]["ranks"], found[-1]["predictor"]) if found else ""


def _waits(summary: Mapping[str, Any], events: list[dict[str, Any]]) -> str:
    """A decision that waits for approval, and whether the run is paused."""
    if summary.get("status") != "running":
        return ""
    words = [e["name"] for e in events if e.get("event") == "Command" and e["name"] in ("pause", "resume")]
    paused = "paused: continue with `steering resume`" if words[-1:] == ["pause"] else ""
    decisions = [e for e in events if e.get("event") in ("DecisionProposed", "DecisionSettled")]
    proposed = decode(decisions[-1]) if decisions else None
    if not isinstance(proposed, DecisionProposed):
        return paused
    what = waiting(proposed)
    waits = f"{what['proposal']}; approve or veto within {duration(what['left_s'])}, else {what['default']}"
    return f"{waits}; {paused}" if paused else waits


def _limits(events: list[dict[str, Any]]) -> str:
    """A person's limits that hold, beside the workflow's own."""
    given = [e for e in events if e.get("event") == "Command" and e["name"] == "limit"]
    held = limited_to(given[-1]) if given else ""
    return f"{held}, by {given[-1].get('by') or 'somebody'}; `steering limit` lifts them" if held else ""


def _stop(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    """A stop that no runner has taken yet."""
    stop = noted_stop(folder) if summary.get("status") == "running" else None
    return (
        "" if stop is None else f"noted by {stop.by}, {duration(time.time() - stop.time)} ago: the next runner takes it"
    )


def waits_for(folder: RunFolder) -> list[str]:
    """The batch jobs of a run whose workers have not come yet, with the batch system's state and its reason; where all
    are there, when the first of them ends."""
    try:
        jobs = read_json(folder.path / "jobs.json")
    except FileNotFoundError:
        return []
    waiting = [
        f"{job['kind']} waits: job {job['job']} {job['state'] or 'submitted'}"
        + (f" ({job['reason']})" if job["reason"] else "")
        for job in jobs["jobs"]
        if not job["worker"]
    ]
    ends = [job["ends"] for job in jobs["jobs"] if job["ends"]]
    there = [f"{len(jobs['jobs'])} run"] if not waiting else []
    first = [f"the first ends in {duration(min(ends) - time.time())}"] if ends and not waiting else []
    return [*waiting, *there, *first, *(f"given up: {why}" for why in jobs["given_up"])]


def _failed(events: list[dict[str, Any]]) -> list[str]:
    """Optional work that failed while the run went on."""
    return [f"{e.get('what')}: {e.get('error')}" for e in events if e.get("event") == "WorkFailed"]


def _last(past: History) -> str:
    if "time" not in past.last:
        return ""
    return f"{past.last.get('event')}, {duration(time.time() - past.last['time'])} ago"
