"""The figures of a source's streams in words, and when they are worth an event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steering.campaign import StreamsReported

Figures = Mapping[str, Mapping[str, Any]]
"""By stream: received, joined, waiting, dropped (by reason), lost, silent_s and others, see LiveSource.streams."""

SILENT_S, FIRST_S = 2.0, 10.0
"""From then on a stream is called silent that has sent something, and one that has sent nothing yet."""
EVERY_S = 10.0
"""Between two events while nothing is out of the ordinary."""


def stream_lines(streams: Figures, older_s: float = 0.0) -> list[str]:
    """A line for each stream: `positions: silent for 4 s, 212 frames wait`. older_s: age of the figures."""
    return [f"{name}: {_line(name, figures, streams, older_s)}" for name, figures in streams.items()]


def ended_lines(streams: Figures) -> list[str]:
    """The same of streams that have ended, and are silent for that."""
    return stream_lines({name: {**figures, "silent_s": 0.0} for name, figures in streams.items()})


def troubled(streams: Figures) -> tuple[str, ...]:
    """The streams that are silent while frames wait, or are expected."""
    frames = streams.get("frames", {})
    expected = frames.get("waiting") or frames.get("outstanding")
    return tuple(name for name in streams if expected and _is_silent(streams[name], 0.0))


def report(now: float, streams: Figures, last: StreamsReported | None) -> StreamsReported | None:
    """The event that the figures of now are worth; None where the last one says as much."""
    if not streams:
        return None
    if last is not None and troubled(streams) == troubled(last.streams):
        same = {k: v["received"] for k, v in streams.items()} == {k: v["received"] for k, v in last.streams.items()}
        if same or now - last.time < EVERY_S:
            return None
    return StreamsReported(time=now, streams=streams)


def _line(name: str, figures: Mapping[str, Any], streams: Figures, older_s: float) -> str:
    if figures["silent_s"] is None:
        parts = ["nothing came yet"]
    elif _is_silent(figures, older_s):
        parts = [f"silent for {figures['silent_s'] + older_s:.0f} s"]
    else:
        parts = [f"{figures['received']:,} received"]
    waiting = streams.get("frames", figures)["waiting"]
    if waiting and (name == "frames" or _is_silent(figures, older_s) or figures["silent_s"] is None):
        parts.append(f"{waiting:,} frames wait")
    if figures["lost"]:
        parts.append(f"{figures['lost']:,} lost")
    parts += [f"{count:,} dropped ({reason})" for reason, count in figures["dropped"].items()]
    if figures.get("to_measure_again"):
        parts.append(f"{figures['to_measure_again']:,} to be measured again")
    if figures["interpolated"]:
        parts.append(f"{figures['interpolated']:,} interpolated")
    return ", ".join(parts)


def _is_silent(figures: Mapping[str, Any], older_s: float) -> bool:
    if figures["silent_s"] is None:
        return bool(figures.get("listens_s", 0.0) + older_s > FIRST_S)
    return bool(figures["silent_s"] + older_s > SILENT_S)
