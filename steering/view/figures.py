"""The key figures of a run's summary, in words and numbers that a person reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steering.view.status import duration, lasted

PARTS = ("acquire", "predict", "label", "load", "populate", "augment", "wait", "train", "publish")


def look(summary: Mapping[str, Any], path: str) -> Any:
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
    """(name, figure) of what every run tells; unknown ones are left out."""
    whole, remote = lasted(summary), summary.get("remote_representatives_share")
    p50, p99 = look(summary, "prediction_latency_ms.p50"), look(summary, "prediction_latency_ms.p99")
    rows = [
        ("strategy", summary.get("strategy")),
        ("training ranks", summary.get("ranks")),
        ("run time", None if whole is None else duration(whole)),
        ("frames acquired", summary.get("frames_acquired")),
        ("frames predicted", summary.get("frames_predicted")),
        ("frames dropped", summary.get("frames_dropped")),
        ("model versions published", summary.get("versions_published")),
        ("representatives from other ranks", None if remote is None else f"{remote:.0%}"),
        ("prediction latency, median", None if p50 is None else f"{p50:.3g} ms"),
        ("prediction latency, 99 %", None if p99 is None else f"{p99:.3g} ms"),
        ("phase correlation, refined", look(summary, "phase_correlation.refined")),
        ("phase correlation, network on held-out field", look(summary, "phase_correlation.held_out")),
    ]
    return [(name, number(value, ".3f")) for name, value in rows if value is not None]


def phase_errors(summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """By scan, in order: first, own_end, run_end in radians."""
    errors = summary.get("phase_error") or {}
    order = [scan for scan in summary.get("scans") or [] if scan in errors]
    order += [scan for scan in errors if scan not in order]
    return {scan: {key: look(errors[scan], key) for key in ("first", "own_end", "run_end")} for scan in order}


def wall_times(summary: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(part, seconds, in words), in the order of the frame's journey."""
    wall = summary.get("wall_s") or {}
    names = [*PARTS, *(name for name in wall if name not in PARTS)]
    known = [(name, wall.get(name)) for name in names]
    return [(name, float(seconds), f"{seconds:.3g} s") for name, seconds in known if seconds is not None]
