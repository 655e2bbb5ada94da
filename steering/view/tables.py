"""The key figures of a run's summary, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steering.view.status import duration, lasted

PARTS = ("acquire", "predict", "label", "load", "populate", "augment", "wait", "train", "publish")


def value_at(summary: Mapping[str, Any], path: str) -> Any:
    """The value at `a.b.c`, None where it is missing."""
    value: Any = summary
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: Any, form: str = ",.4g") -> str:
    """A figure as text; a dash where it is unknown."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"  # noqa: RUF001
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:{form}}"


def key_figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, figure) of every run; those that are not known are left out."""
    whole, remote = lasted(summary), summary.get("remote_representatives_share")
    p50, p99 = value_at(summary, "prediction_latency_ms.p50"), value_at(summary, "prediction_latency_ms.p99")
    rows = [
        ("strategy", summary.get("strategy")),
        ("training ranks", summary.get("ranks")),
        ("run time", None if whole is None else duration(whole)),
        ("frames acquired", summary.get("frames_acquired")),
        ("frames predicted", summary.get("frames_predicted")),
        ("frames dropped", summary.get("frames_dropped")),
        ("model versions published", summary.get("versions_published")),
        ("scans never labelled, nothing of them learnt", len(value_at(summary, "labels.not_labelled") or ()) or None),
        ("representatives from other ranks", None if remote is None else f"{remote:.0%}"),
        ("prediction latency, median", None if p50 is None else f"{p50:.3g} ms"),
        ("prediction latency, 99 %", None if p99 is None else f"{p99:.3g} ms"),
        ("phase correlation, refined", value_at(summary, "phase_correlation.refined")),
        ("phase correlation, network on held-out field", value_at(summary, "phase_correlation.held_out")),
    ]
    return [(name, number(value, ".3f")) for name, value in rows if value is not None]


def phase_errors(summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """By scan, in order: first, own_end, run_end in radians."""
    errors = summary.get("phase_error") or {}
    order = [scan for scan in summary.get("scans") or [] if scan in errors]
    order += [scan for scan in errors if scan not in order]
    return {scan: {key: value_at(errors[scan], key) for key in ("first", "own_end", "run_end")} for scan in order}


def wall_times(summary: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(part, seconds, in words), in the order in which a frame and its label pass them."""
    wall = summary.get("wall_s") or {}
    names = [*PARTS, *(name for name in wall if name not in PARTS)]
    known = [(name, wall.get(name)) for name in names]
    return [(name, float(seconds), f"{seconds:.3g} s") for name, seconds in known if seconds is not None]


STEP_PARTS = ("load", "populate", "augment", "wait", "train")
STEP_PARTS_MEAN = (
    "load: new samples into the minibatch; populate: candidates into the buffer; augment: draws, and the start of the "
    "exchange between ranks; wait: for representatives that had not arrived; train: forward, backward, optimiser."
)


def step_times(summary: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(part, milliseconds, in words) of a training step, as the mean over ranks and steps; none where none was made."""
    wall, steps = summary.get("wall_s") or {}, value_at(summary, "rehearsal_buffer.steps") or [0]
    if not steps[-1] or any(part not in wall for part in STEP_PARTS):
        return []
    times = [(part, 1e3 * wall[part] / steps[-1]) for part in STEP_PARTS]
    return [(part, ms, f"{ms:.3g} ms") for part, ms in times]


ELSEWHERE = (
    "phase_error",
    "phase_correlation",
    "prediction_latency_ms",
    "wall_s",
    "rehearsal_buffer",
    "forgetting",
    "streams",
)


def measured(summary: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables (name, head, rows) of all further nested figures of a summary.

    A mapping of mappings becomes a table with a row for each of them.
    """
    tables: list[tuple[str, list[str], list[list[str]]]] = []
    for name, value in summary.items():
        if isinstance(value, Mapping) and name not in ELSEWHERE:
            tables += _nested(name, value)
    return tables


def _nested(name: str, value: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    deeper = {
        key: inner
        for key, inner in value.items()
        if isinstance(inner, Mapping) and inner and all(isinstance(each, Mapping) for each in inner.values())
    }
    rest = {key: inner for key, inner in value.items() if key not in deeper}
    subjects = {key: flat(inner) for key, inner in rest.items() if isinstance(inner, Mapping) and inner}
    single = {key: inner for key, inner in flat(rest).items() if key.split(".")[0] not in subjects}
    columns = list(dict.fromkeys(key for figures in subjects.values() for key in figures))
    tables: list[tuple[str, list[str], list[list[str]]]] = []
    if single:
        tables.append((name, [], [[key, number(figure)] for key, figure in single.items()]))
    if subjects:
        rows = [[key, *(number(figures.get(column)) for column in columns)] for key, figures in subjects.items()]
        tables.append((name, ["", *columns], rows))
    for key, inner in deeper.items():
        tables += _nested(f"{name}, {key}", inner)
    return tables


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Figures by their dotted names; lists and other values that are no figures are left out."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= flat(inner, f"{prefix}{key}.")
        elif inner is None or isinstance(inner, int | float | str):
            found[f"{prefix}{key}"] = inner
    return found
