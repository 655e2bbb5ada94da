"""What the source does while it hears nothing of its runner: it measures on by a safe raster, within stated bounds."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steering.campaign import ChunkArrived, Event, FellBack
from steering.files import read_json
from steering.records.whole_file import write_whole
from steering.runner.source_events import SourceResume, Standing, Undelivered

NOTE = "unsteered.json"
"""In the run's folder while nobody steers: since when, and how many positions of the raster were measured."""
_BLOCK = 16
"""Positions that are given to the source at a time."""
_GAP_S = 3.0
_MARKS = 8
"""Checkpoints back to which is known what was reported after them."""
_MOST_REPORTED = 100_000
"""Events of these; without checkpoints there is no end."""

Positions = tuple[tuple[float, float], ...]


class Alone:
    """Judges whether a source is alone, and what it may measure then. Pure: times are arguments.

    The reserve comes from the runner beforehand: positions that the campaign's limits allow, row by row.
    """

    def __init__(self, unsteered_s: float | None) -> None:
        """unsteered_s: of silence after which the source goes on by itself; None: never."""
        self.unsteered_s = unsteered_s
        self.since: float | None = None
        """When the runner was heard last, in seconds since 1970, while it is not."""
        self.measured = 0
        """Positions of the raster since then."""
        self._heard: float | None = None
        self._looked: float | None = None
        self._reserve: deque[tuple[float, float]] = deque()
        self._due = 0

    def heard(self, now: float, reserve: Positions) -> bool:
        """The runner lives. reserve: what may be measured without it from now on. Returns whether the source was
        alone."""
        was = self.since is not None
        self._heard, self.since, self.measured = now, None, 0
        self._reserve = deque(reserve)
        return was

    def steered(self, positions: int) -> None:
        """The source has so many more positions to measure."""
        self._due += positions

    def arrived(self, frames: int) -> None:
        """So many of them have brought a frame, or will bring none."""
        self._due = max(0, self._due - frames)

    def look(self, now: float) -> bool:
        """Whether the source is alone. To be asked about every second: longer gaps, in which this process or its
        machine stood still, are no silence of the runner."""
        if self._looked is not None and self._heard is not None and now - self._looked > _GAP_S:
            self._heard += now - max(self._looked, self._heard)
        self._looked = now
        if self.unsteered_s is not None and self._heard is not None and now - self._heard > self.unsteered_s:
            self.since = self.since or self._heard
        return self.since is not None

    def block(self) -> Positions:
        """What to measure next without a runner: nothing while there is something to do, or nothing is left."""
        if self.since is None or self._due:
            return ()
        found = tuple(self._reserve.popleft() for _ in range(min(_BLOCK, len(self._reserve))))
        self.measured += len(found)
        return found


class Reported:
    """What was reported to the runner, back to some checkpoints ago: it is reported to the next one again where the log
    lacks it."""

    def __init__(self) -> None:
        self.count = 0
        self.forgotten = 0
        """Number of the newest event that is not known any more."""
        self._events: deque[tuple[int, Event]] = deque()
        self._marks: deque[int] = deque()

    def note(self, event: Event) -> None:
        """An event is being reported."""
        self.count += 1
        if not isinstance(event, Standing | Undelivered):
            self._events.append((self.count, event))
            if len(self._events) > _MOST_REPORTED:
                self.forgotten, _ = self._events.popleft()

    def mark(self) -> int:
        """A checkpoint includes what was reported until now."""
        self._marks.append(self.count)
        if len(self._marks) > _MARKS:
            oldest = self._marks.popleft()
            while self._events and self._events[0][0] <= oldest:
                self.forgotten, _ = self._events.popleft()
        return self.count

    def again(self, mark: int, resume: SourceResume, waiting: Iterable[Event | Exception]) -> list[Event | Exception]:
        """What was reported after this mark and is not in the log, and what waits to be reported."""
        found: list[Event | Exception] = []
        for number, event in self._events:
            if number <= mark:
                continue
            if isinstance(event, ChunkArrived):
                ids = tuple(i for i in event.frame_ids if i not in resume.handed)
                if ids:
                    found.append(ChunkArrived(time=event.time, scan=event.scan, frame_ids=ids))
            elif event.time not in resume.logged:
                found.append(event)
        return [*found, *(event for event in waiting if not isinstance(event, Undelivered))]


def say(folder: Path, alone: Alone) -> None:
    """Say in the run's folder that nobody steers, or take that back. Raises OSError."""
    path = folder / NOTE
    if alone.since is None:
        path.unlink(missing_ok=True)
        return
    write_whole(path, json.dumps({"since": alone.since, "measured": alone.measured, "time": time.time()}).encode())


def unsteered(folder: Path) -> dict[str, Any] | None:
    """What `say` has left; None where the run is steered."""
    try:
        found = read_json(folder / NOTE)
        return {"since": float(found["since"]), "measured": int(found["measured"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fell_back(positions: Positions, alone: Alone) -> FellBack:
    """The event that tells of a block."""
    return FellBack(time=time.time(), positions=positions, since=alone.since or 0.0)
