"""Notable events in words, for the display, for the status and for the person who gives a command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import isfinite
from typing import Any

from steering.campaign import (
    Campaign,
    Command,
    DecisionLimited,
    DecisionProposed,
    DecisionSettled,
    DriftLowered,
    DriftRaised,
    Event,
    ExternalLabelsRead,
    FellBack,
    FrameSetAside,
    FramesLost,
    GroupChanged,
    LabelsReady,
    ModelPublished,
    PredictorReplaced,
    RollBackRefused,
    RolledBack,
    RunRecovered,
    RunStarted,
    ScanNotLabelled,
    ScanRefined,
    ScanRevisited,
    SourceReopened,
    SourceSilent,
    StreamsReported,
    TrainingSkipped,
    VersionRefused,
    WorkerLost,
    WorkFailed,
    decode,
)
from steering.records import scan_name
from steering.runner.stream_lines import stream_lines, troubled

FREQUENT = ("ChunkArrived", "PredictionReady", "DecisionSuggested")
"""Events of every moment, which have no line of their own."""


def in_words(line: Mapping[str, Any]) -> str | None:
    """A line of a run's log in words; empty where it is not notable, None for one that is not the campaign's.

    Raises KeyError, TypeError or ValueError for a line that cannot be read, of another version say.
    """
    kind = str(line.get("event"))
    if kind == "RunEnded":
        return f"the run {line.get('status')}{': ' if line.get('reason') else ''}{line.get('reason', '')}"
    if kind == "Command":
        return _command(line)
    if kind in FREQUENT:
        return ""
    known = decode(line)
    return None if known is None else describe(known) or ""


def _command(line: Mapping[str, Any]) -> str:
    version = f" to version {line['version']}" if line.get("version") is not None else ""
    said = f": {limited_to(line) or 'lifted'}" if line["name"] == "limit" else ""
    return f"{line['name']}{version}{said}, by {line.get('by') or 'somebody'}"


def limited_to(line: Mapping[str, Any]) -> str:
    """The limits that a command in the log sets, in words; empty where it lifts them."""
    limits = []
    if line.get("area") is not None:
        limits.append("y {:.4g} to {:.4g}, x {:.4g} to {:.4g}".format(*line["area"]))
    if line.get("shortest_dwell") is not None:
        limits.append(f"a dwell of {line['shortest_dwell']:g} s or more")
    return ", ".join(limits)


def answer(order: Command, campaign: Campaign) -> str:
    """What a command that the campaign is about to take will do: its name, and a sentence."""
    gate = campaign.gate
    match order.name:
        case "pause":
            said = "what is decided is still measured, nothing more is decided until `steering resume`"
            said = "it is paused already" if gate.paused else said
        case "resume":
            said = "the policy decides again where to measure" if gate.paused else "the run was not paused, it goes on"
        case "stop":
            said = "nothing more is decided; what was measured is kept, and the report is written"
        case "rollback":
            version = campaign.models.before(order.version)
            said = f"version {version} comes back into service in place of {campaign.version}, training goes on from it"
        case "limit":
            limits = limited_to(vars(order))
            said = f"{limits}, beside the workflow's own limits, until `steering limit` is given without options"
            said = said if limits else "a person's limits are lifted, the workflow's own hold"
        case _:
            said = "" if gate.proposed is None else proposal(gate.proposed)
    return f"{order.name}: {said}"


def describe(event: Event) -> str | None:
    """A notable event in one line; None for the others."""
    return _of_models(event) or _of_ranks(event) or _of_labels(event) or _of_decisions(event) or _of_the_run(event)


def _of_the_run(event: Event) -> str | None:
    match event:
        case WorkFailed():
            return f"{event.what} failed, and the run goes on without it: {event.error}"
        case RunStarted():
            samples = [f"with the samples of {', '.join(event.origins)}"] if event.origins else []
            return ", ".join([f"begins {event.model}", *samples, *event.without])
        case RunRecovered():
            return f"the run was recovered from checkpoint {event.number}" + "".join(f"; {r}" for r in event.remarks)
        case WorkerLost() if event.silent:
            return f"worker {event.worker} was silent for too long and is treated as lost"
        case SourceSilent():
            return "the source is silent although positions are due"
        case SourceReopened():
            return f"the source was opened again: {event.reason}"
        case FramesLost():
            return f"{len(event.frame_ids)} frames of {event.scan} lost: {event.reason}"
        case ScanRevisited():
            return _of_a_visit(event)
        case StreamsReported() if silent := troubled(event.streams):
            return "; ".join(line for line in stream_lines(event.streams) if line.split(":")[0] in silent)
    return None


def _of_a_visit(event: ScanRevisited) -> str:
    if event.visit == scan_name(event.scan):
        return f"the scan {event.scan!r} is called {event.visit}: names have 1 to 100 bytes, no slash, no leading dot"
    return f"back at {event.scan}: its new frames are the scan {event.visit}"


def _of_models(event: Event) -> str | None:
    match event:
        case DriftRaised():
            return f"trust in model {event.version} fell to {event.trust:.2f} by the {event.by}, {event.worse} far off"
        case DriftLowered():
            return f"trust is back: {event.trust:.2f} with model {event.version}"
        case ModelPublished() if event.version:
            return f"model {event.version} published, {_judged(event.validation_error, event.validation_frames)}"
        case RolledBack():
            return f"back to model {event.version}: {event.reason}"
        case RollBackRefused():
            return f"model {event.version} did no better: {event.reason}"
        case VersionRefused():
            return f"model {event.version} refused by the predictor: {event.reason}"
        case FellBack():
            return f"no word of a runner for {event.time - event.since:.0f} s: {len(event.positions)} of a safe raster"
        case PredictorReplaced():
            return (
                f"the predictor was lost; another goes on after {event.seconds:.0f} s, {event.frames} frames sent again"
            )
    return None


def _of_ranks(event: Event) -> str | None:
    match event:
        case GroupChanged() if event.retired and event.retired == event.lost:
            which = ", ".join(map(str, event.retired))
            return f"rank{'s' if len(event.retired) > 1 else ''} {which} handed over to the others; {event.ranks} go on"
        case GroupChanged() if event.lost:
            which = ", ".join(map(str, event.lost))
            stored = f", with {event.samples_lost} stored samples" if event.samples_lost else ""
            stored += f", {event.samples_back} came back from the checkpoint" if event.samples_back else ""
            return f"rank{'s' if len(event.lost) > 1 else ''} {which} lost{stored}; {event.ranks} go on"
        case GroupChanged() if event.joined:
            lost = event.rounds_lost
            again = f"; {lost} round{'s' if lost > 1 else ''} of training came after the checkpoint" if lost else ""
            return f"rank{'s' if len(event.joined) > 1 else ''} {', '.join(map(str, event.joined))} joined; " + (
                f"{event.ranks} ranks train from now on{again}"
            )
        case GroupChanged():
            return f"{event.ranks} ranks train from now on"
    return None


def _judged(error: float | None, frames: int | None) -> str:
    if error is None or not isfinite(error):
        return "validation error unknown: no held-out frame was labelled"
    counted = "" if frames is None else f", {frames} validation frame{'' if frames == 1 else 's'}"
    return f"validation error {error:.4f}{counted}"


def _of_labels(event: Event) -> str | None:
    match event:
        case TrainingSkipped():
            return f"no training round: {event.reason}"
        case LabelsReady() if event.count:
            return f"{event.count} frames of {event.scan} labelled in {event.seconds:.1f} s"
        case LabelsReady() if event.reason:
            return f"nothing of {event.scan} to train on yet: {event.reason}"
        case ScanNotLabelled():
            return f"{event.scan} was never labelled, nothing of it was learnt: {event.reason}"
        case ScanRefined() if event.reason:
            return f"{event.scan} is saved as the live image had it: {event.reason}"
        case ScanRefined():
            how = "to convergence" if event.converged else "without convergence"
            return f"{event.scan} refined {how}: {event.passes} passes over {event.frames} frames"
        case FrameSetAside():
            return f"{len(event.frame_ids)} frames of {event.scan} set aside: {event.reason}"
        case ExternalLabelsRead():
            late = "" if event.late_s is None else f", {event.late_s:.0f} s late"
            return f"{event.count} labels from outside{late}; {event.refused} refused"
    return None


def _of_decisions(event: Event) -> str | None:
    match event:
        case DecisionLimited():
            return f"{event.count} positions refused: {event.reason}"
        case DecisionProposed():
            return f"waits for approval (steering approve): {proposal(event)}"
        case DecisionSettled():
            return f"decision {'approved' if event.approved else 'vetoed'}: {event.by}"
    return None


def proposal(event: DecisionProposed) -> str:
    """What a decision that waits for approval would do, and why."""
    if not event.positions:
        return f"the end of the scan: {event.reason}"
    return f"{event.positions} positions{' and the end of the scan' if event.stop else ''}: {event.reason}"


def waiting(proposed: DecisionProposed) -> dict[str, Any]:
    """What waits for approval: the proposal in words, the seconds left to answer, and what holds without an answer."""
    left = max(0.0, proposed.until - time.time())
    return {"proposal": proposal(proposed), "left_s": left, "default": proposed.default}
