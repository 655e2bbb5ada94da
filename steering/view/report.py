"""The report of a run: one HTML file, pictures first, made from the run's folder alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import xarray as xr

from steering.campaign import encode
from steering.files import read_bytes
from steering.runner.describe import FREQUENT, in_words
from steering.runner.folder import RunFolder
from steering.runner.liveness import standing
from steering.runner.optional import failure
from steering.view.curves import buffer_picture, course_picture, versions_picture
from steering.view.forgetting import forgetting, matrix
from steering.view.history import Curve, History, curves, history
from steering.view.page import bars, page, picture, table, text
from steering.view.pictures import object_picture, positions_picture
from steering.view.status import duration, lasted
from steering.view.tables import (
    STEP_PARTS_MEAN,
    flat,
    key_figures,
    measured,
    number,
    phase_errors,
    step_times,
    wall_times,
)

logger = logging.getLogger(__name__)

LOG_LINES = 30
HIDDEN = ("event", "time", "traceback", "seq")
PICTURES_BYTES = 2_000_000
"""Of objects: with the other pictures and base64 the report stays below 5 MB."""


def write_report(folder: RunFolder) -> Path:
    """Write report.html into the folder and return its path: a function of what the folder holds.

    A run that failed, was interrupted or still runs gets a report of what there is, and the report says so. A part that
    cannot be made is named in its place; its traceback is logged, and added to the run's events once. Raises OSError
    where the report cannot be written.
    """
    summary, events = standing(folder), folder.events()
    past = history(events)
    parts = _Parts(folder, events)
    objects, lines = parts.objects()
    parts.add("The live object", _objects, objects, summary)
    parts.add("Error and trust, frame by frame", _course, lines, past)
    parts.add("Where it scanned", _positions, lines)
    parts.add("Key figures", _figures, summary)
    parts.add("Forgetting", _forgetting, summary)
    parts.add("Model versions", _versions, past, summary)
    parts.add("What is rehearsed", _buffer, summary)
    parts.add("Streams", _streams, summary, events)
    parts.add("Where the time went", _time, summary)
    parts.add("Measured", _measured, summary)
    parts.add("Pictures", _pictures, folder)
    parts.add("Last events", _log, folder.events(), summary)
    body = [_heading(folder.name, summary, past), _notice(summary, past), *parts.made]
    return folder.write_file("report.html", page(f"{folder.name} - steering", body))


class _Parts:
    """The parts of a report. One that fails costs the others nothing."""

    def __init__(self, folder: RunFolder, events: list[dict[str, Any]]) -> None:
        self.made: list[str] = []
        self._folder = folder
        self._known = {event.get("what") for event in events if event.get("event") == "WorkFailed"}

    def add(self, title: str, make: Callable[..., str], *given: Any) -> None:
        """Make a part of the report."""
        try:
            self.made.append(make(*given))
        except Exception as error:  # a report of a run that went wrong must not be lost to one picture
            self.made.append(self._missing(title, error))

    def objects(self) -> tuple[dict[str, xr.Dataset], list[Curve]]:
        """The objects by scan, and the curves of their frames; none where they cannot be read."""
        try:
            objects = self._folder.objects()
            return objects, curves(objects)
        except Exception as error:  # as above
            self.made.append(self._missing("Objects", error))
            return {}, []

    def _missing(self, title: str, error: Exception) -> str:
        what = f"making the part {title!r} of the report"
        logger.warning("%s failed; the report goes without it", what, exc_info=error)
        if what not in self._known:
            self._folder.append_event(encode(failure(what, error)))
        why = text(f"{type(error).__name__}: {error}")
        return (
            f'<section><h2>{text(title)}</h2><div class="notice failed" role="status">'
            f"<strong>This part could not be made.</strong><p>{why}</p></div></section>"
        )


def _heading(name: str, summary: Mapping[str, Any], past: History) -> str:
    status, whole = _status(summary), lasted(summary)
    scans = summary.get("scans") or past.scans
    models = summary.get("versions_published", len(past.versions))
    facts = [
        _plural(len(scans), "sample") if scans else "",
        _plural(summary.get("frames_acquired", past.acquired), "frame"),
        _plural(models, "published model") if models else "",
        duration(whole) if whole is not None else "",
        datetime.fromisoformat(summary["started"]).strftime("%Y-%m-%d %H:%M") if "started" in summary else "",
    ]
    line = " &middot; ".join(text(fact) for fact in facts if fact)
    badge = f'<span class="badge {text(status)}">{text(status)}</span>'
    return f'<header><h1>{text(name)} {badge}</h1><p class="soft">{line}</p></header>'


def _status(summary: Mapping[str, Any]) -> str:
    return "failed" if "lost" in summary else str(summary.get("status", "running"))


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _notice(summary: Mapping[str, Any], past: History) -> str:
    status, reason = _status(summary), str(summary.get("reason") or "")
    said = {
        "failed": "This run failed.",
        "interrupted": "This run was interrupted before its end.",
        "running": "This run has not ended yet.",
    }.get(status)
    if said is None:
        return ""
    if "lost" in summary:
        reason = f"It {summary['lost']}."
    rest = "What there is so far is below." if status == "running" else "What it had done by then is below."
    rest = rest if past.acquired else "No frame had been measured."
    return (
        f'<div class="notice {text(status)}" role="status"><strong>{said}</strong>'
        f"<p>{text(reason)}{'<br>' if reason else ''}{rest}</p></div>"
    )


def _objects(objects: Mapping[str, xr.Dataset], summary: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    shown, left = 0, PICTURES_BYTES
    for scan, image in reversed(list(objects.items())):
        drawn = object_picture(image) if left > 0 else None
        if drawn is None:
            continue
        shown, left = shown + 1, left - len(drawn)
        beside = [word for key, word in (("phase_refined", "refined"), ("truth_phase", "the truth")) if key in image]
        alt = f"Live object of {scan}: amplitude above, phase below; network{''.join(f', {w}' for w in beside)}"
        error = phase_errors(summary).get(scan, {}).get("run_end")
        said = f" Phase error at the end of the run: {number(error, '.3f')} rad." if error is not None else ""
        heading = f"<h3>{text(scan)}</h3>" if len(objects) > 1 else ""
        caption = f"Amplitude above, phase below, one colour scale each.{said}"
        pieces.insert(0, heading + picture(drawn, alt, caption))
    if not pieces:
        return ""
    if left <= 0 and shown < len(objects):
        pieces.insert(0, f"<p>The last {shown} of {len(objects)} scans; all are in object.zarr.</p>")
    about = (
        "The patches that the network predicts, stitched together; beside them the refined object, and the true object "
        "where it is known. Shift, global phase, ramp and the factor of an unknown flux, which ptychography cannot "
        "determine, are removed."
    )
    return f'<section><h2>The live object</h2><p class="soft">{about}</p>{"".join(pieces)}</section>'


def _course(lines: list[Curve], past: History) -> str:
    png = course_picture(lines, past)
    if png is None:
        return ""
    caption = (
        "A dot is a frame, as the version in service predicted it; a line is the running median, for the error over "
        "frames that were never trained on. Vertical lines: a new sample. Triangles: a new version in service. "
        "Shaded: drift."
    )
    alt = "Error and far-field residual over frames in order of acquisition, with sample changes and model versions"
    return f"<section><h2>Error and trust, frame by frame</h2>{picture(png, alt, caption)}</section>"


def _positions(lines: list[Curve]) -> str:
    png = positions_picture(lines)
    caption = "Each point is a frame; the thin line follows the order in which they were measured."
    drawn = picture(png, "Positions measured in each scan, coloured by residual", caption)
    return f"<section><h2>Measured positions</h2>{drawn}</section>" if drawn else ""


def _figures(summary: Mapping[str, Any]) -> str:
    errors = phase_errors(summary)
    rows = [[scan, *(number(value, ".3f") for value in values.values())] for scan, values in errors.items()]
    by_scan = table(["phase error (rad)", "first frame", "end of its scan", "end of run"], rows)
    if by_scan:
        note = (
            "Of the network alone, on frames never trained on: by the version in service at the first frame of the "
            "scan and at its last one, and by the final version."
        )
        by_scan = f'<div>{by_scan}<p class="soft">{note}</p></div>'
    return (
        '<section><h2>Key figures</h2><div class="columns">'
        f"<div>{table([], [list(row) for row in key_figures(summary)])}</div>{by_scan}</div></section>"
    )


def _forgetting(summary: Mapping[str, Any]) -> str:
    found = forgetting(summary)
    if found is None or len(found.versions) < 2:
        return ""
    about = (
        "Validation error by version of the network: against the labels of some frames never trained on. "
        "Outlined: the version in service at the end of the scan. A row that darkens to the right of it is a scan that "
        "was forgotten."
    )
    return f'<section><h2>Forgetting</h2><p class="soft">{about}</p>{matrix(found)}</section>'


def _streams(summary: Mapping[str, Any], events: list[dict[str, Any]]) -> str:
    reports = [event["streams"] for event in events if event.get("event") == "StreamsReported"]
    streams = summary.get("streams") or (reports[-1] if reports else {})
    rows = {name: flat(figures) for name, figures in streams.items()}
    head = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    cells = [[name, *(number(figures.get(key)) for key in head)] for name, figures in rows.items()]
    return f"<section><h2>Streams</h2>{table(['', *head], cells)}</section>" if cells else ""


def _versions(past: History, summary: Mapping[str, Any]) -> str:
    if "started" not in summary:
        return ""
    png = versions_picture(past, datetime.fromisoformat(summary["started"]).timestamp())
    drawn = picture(png, "Validation error of each published model version over time")
    return f"<section><h2>Model versions</h2>{drawn}</section>" if drawn else ""


def _buffer(summary: Mapping[str, Any]) -> str:
    png = buffer_picture(summary.get("rehearsal_buffer") or {})
    caption = (
        "Left: samples in the buffers of all ranks after each training round. Right: their age at the end, as the "
        "number of samples offered to a rank since they were stored; a dot is the median, the bar goes from 10 to 90 %."
    )
    drawn = picture(png, "Composition of the rehearsal buffers by sample, over time and by age", caption)
    return f"<section><h2>Rehearsal buffer</h2>{drawn}</section>" if drawn else ""


def _measured(summary: Mapping[str, Any]) -> str:
    """Folded away for a campaign, whose figures are above; of a benchmark they are what it has found."""
    pieces, before = [], ""
    for name, head, rows in measured(summary):
        heading = "" if name == before else f"<h3>{text(name.replace('_', ' '))}</h3>"
        pieces.append(heading + table(head, rows))
        before = name
    if not pieces:
        return ""
    shown = "".join(pieces)
    if "frames_acquired" in summary:
        shown = (
            f"<details><summary>Counters of predictor, labels, checkpoints and what else ran</summary>{shown}</details>"
        )
    return f"<section><h2>Further figures</h2>{shown}</section>"


def _pictures(folder: RunFolder) -> str:
    drawn = []
    for path in sorted(folder.path.glob("*.png")):
        try:
            image = read_bytes(path)
        except (OSError, ValueError) as error:
            logger.warning("%s is left out of the report: %s", path.name, error)
            continue
        name = path.stem.replace("_", " ")
        drawn.append(picture(image, name, name.capitalize()))
    return f"<section><h2>Pictures</h2>{''.join(drawn)}</section>" if drawn else ""


def _time(summary: Mapping[str, Any]) -> str:
    values, step = wall_times(summary), step_times(summary)
    if not values:
        return ""
    about = "Seconds spent in each part. Parts run at the same time, so the sum is not the run's time."
    of_step = (
        f'<h3>A training step, on average of ranks and steps</h3><p class="soft">{STEP_PARTS_MEAN}</p>{bars(step)}'
        if step
        else ""
    )
    return f'<section><h2>Where the time went</h2><p class="soft">{about}</p>{bars(values)}{of_step}</section>'


def _log(events: list[dict[str, Any]], summary: Mapping[str, Any]) -> str:
    if not events:
        return ""
    start = datetime.fromisoformat(summary["started"]).timestamp() if "started" in summary else events[0].get("time", 0)
    lines = [line for event in events if event.get("event") not in FREQUENT and (line := _line(event, start))]
    if not lines:
        return ""
    newest = "\n".join(lines[-LOG_LINES:])
    traces = {str(event.get("event")): str(event["traceback"]) for event in events if event.get("traceback")}
    trace = traces.get("RunEnded") or next(iter(traces.values()), "")
    detail = f"<details><summary>Traceback</summary><pre>{text(trace)}</pre></details>" if trace else ""
    return f"<section><h2>Last events</h2><pre>{text(newest)}</pre>{detail}</section>"


def _line(event: Mapping[str, Any], start: float) -> str:
    """In words where there are some: on the live page it reads the same. Empty for what is not notable."""
    try:
        words = in_words(event)
    except (KeyError, TypeError, ValueError):  # of another version, say
        words = None
    if words is None:
        hidden = ("event", "time", "traceback", "seq")
        fields = ", ".join(
            f"{key} {_short(value)}" for key, value in event.items() if key not in hidden and value != ""
        )
        words = f"{event.get('event', '?')}: {fields}"
    return f"{event.get('time', start) - start:8.1f} s  {words}" if words else ""


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"{len(value)} values"
    return number(value) if isinstance(value, int | float | None) else str(value)
