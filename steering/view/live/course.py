"""The course of a run for the page, event by event: what is drawn over time, and what was notable."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.runner.describe import in_words
from steering.view.status import OF_SOURCE

MOST_POINTS = 2000
"""Of a curve. Beyond that every second one goes."""
_TOGETHER = 10
"""Frames whose errors are one point."""
_MOST_MARKS = 500
_LOG = 60
"""Newest notable events that are listed."""


class Series:
    """Columns of equal length that grow. Where they are thinned, `revision` counts up."""

    def __init__(self, *names: str, most: int = MOST_POINTS) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in names}
        self.revision = 0
        self._most = most

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def append(self, *values: Any) -> None:
        """Add a row."""
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)
        if len(self) > self._most:
            for column in self.columns.values():
                del column[1:-1:2]
            self.revision += 1

    def change_last(self, **values: Any) -> None:
        """Set values in the last row."""
        for name, value in values.items():
            self.columns[name][-1] = value
        self.revision += 1

    def since(self, revision: int, count: int) -> dict[str, Any] | None:
        """What whoever has `count` rows of that revision lacks: all rows of another revision. None: nothing."""
        first = count if revision == self.revision else 0
        if first == len(self) and revision == self.revision:
            return None
        columns = {name: column[first:] for name, column in self.columns.items()}
        return {"first": first, "columns": columns}


class Course:
    """Takes in the events of a run, as its log has them. Times are seconds since `start`."""

    def __init__(self, start: float) -> None:
        """start: of the run, seconds since the epoch."""
        self._start = start
        self.series = {
            "residual": Series("time", "residual"),
            "expected": Series("time", "residual"),
            "error": Series("time", "error"),
            "versions": Series("time", "version", "error", most=_MOST_MARKS),
            "rollbacks": Series("time", "version", most=_MOST_MARKS),
            "labels": Series("time", "count", most=_MOST_MARKS),
            "drift": Series("start", "stop", most=_MOST_MARKS),
            "scans": Series("time", "scan", most=_MOST_MARKS),
        }
        self.log: deque[tuple[float, str]] = deque(maxlen=_LOG)
        """(seconds, words), oldest first."""
        self.of_source: list[Mapping[str, Any]] = []
        """The newest frames' event, and what was said of their source after it."""
        self.time = 0.0
        """Of the newest event."""

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take in lines of the log, in their order. Lines that cannot be read are left out."""
        for event in events:
            time = event.get("time")
            if not isinstance(time, int | float):
                continue
            kind = str(event.get("event"))
            self.time = max(self.time, time - self._start)
            try:
                self._draw(kind, event, time - self._start)
                words = in_words(event)
            except (KeyError, TypeError, ValueError):  # of another version, say
                continue
            if kind in OF_SOURCE:
                self.of_source = [event] if kind == "ChunkArrived" else [*self.of_source, event]
            if words:
                self.log.append((time - self._start, words))

    def add_errors(self, times: NDArray[np.float64], errors: NDArray[np.float64]) -> None:
        """Add errors of frames (n,) in radians, NaN where unknown, with the times (n,) since the epoch at which these
        were acquired: as the medians of ten after the other."""
        good = np.flatnonzero(np.isfinite(times) & np.isfinite(errors))
        order = good[np.argsort(times[good], kind="stable")]
        for group in np.array_split(order, -(-len(order) // _TOGETHER)) if len(order) else ():
            at, error = float(times[group].mean()), float(np.median(errors[group]))
            self.series["error"].append(round(at - self._start, 2), round(error, 4))

    def _draw(self, kind: str, event: Mapping[str, Any], at: float) -> None:
        at = round(at, 2)
        series = self.series
        expected = {"ModelPublished": "validation_residual", "RolledBack": "validation_residual"}
        if kind == "PredictionReady" and event["residual"] is not None:
            series["residual"].append(at, round(event["residual"], 4))
        elif kind == "ChunkArrived" and event["scan"] not in series["scans"].columns["scan"]:
            series["scans"].append(at, event["scan"])
        elif kind == "ModelPublished":
            series["versions"].append(at, event["version"], event.get("validation_error"))
        elif kind == "RolledBack":
            series["rollbacks"].append(at, event["version"])
        elif kind == "LabelsReady" and event["count"]:
            series["labels"].append(at, event["count"])
        elif kind == "DriftRaised":
            series["drift"].append(at, None)
        elif kind == "DriftLowered" and len(series["drift"]):
            series["drift"].change_last(stop=at)
        if (level := event.get(expected.get(kind, ""))) is not None:
            series["expected"].append(at, round(level, 4))
