"""Positions, or a monitor, that scalar PVs of EPICS hold, as motors' readbacks do: the value at the time of each frame.

A PV is sent where it changes, and holds until it changes again: the value of a frame is the newest whose time stamp is
not after the frame's own (dataTimeStamp, else timeStamp). The clocks of the servers must agree; what has no time stamp
is not used: the moment at which something came says nothing of another clock. Nothing is interpolated between two
updates: a stage that stands still is read exactly, one that moves as coarsely as its PV is sent; there a table or
attributes are better.

An update may come later than the frame: a frame waits for `late_s`, unless all PVs have been heard of since. A value
with the alarm severity INVALID is none: the frame is set aside. What a scalar PV holds when it is connected is used,
unlike an array, or a table: it holds from its time stamp on until the next update.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.sources.pva import HELD, PvaFrames, refuse_other_than_arrays
from steering.sources.pva_client import Update, Updates, context
from steering.sources.pva_scans import Scans, stamp, taken_at
from steering.sources.streams import Record, Samples, Unreadable

_POLL_S = 0.01
_KEPT = 4096
"""Values of a PV that are remembered."""
_INVALID = 3
"""Severity of an alarm: the value says nothing."""


@dataclass(frozen=True, kw_only=True)
class PvaReadings:
    """Scalar PVs, read at the times of frames."""

    pvs: tuple[str, ...]
    """Of positions y first."""
    scale: tuple[float, ...]
    server: str = ""
    """HOST:PORT; empty: that of the frames."""
    frames: PvaFrames | None = None
    """Whose numbers and times are listened to."""
    late_s: float = 0.1
    """Seconds by which an update may come later than its frame."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """A sample for each frame."""
        if self.frames is None:
            raise ValueError(f"found no frames beside {', '.join(self.pvs)}, expected some of pva, for their times")
        scans, held = Scans(self.frames.scan), Held(len(self.pvs))
        waiting: deque[tuple[int, float, float]] = deque()
        with context(self.server or self.frames.server) as client, context(self.frames.server) as other:
            readings = [Updates(client, pv, 1024) for pv in self.pvs]
            # Without the arrays themselves.
            fields = "uniqueId,dataTimeStamp,timeStamp,dimension" + (",attribute" if self.frames.scan else "")
            arrays = Updates(other, self.frames.pv, self.frames.queue, fields)
            while not stopped.is_set():
                array = arrays.next(_POLL_S)
                for column, updates in enumerate(readings):
                    while (reading := updates.next(0.0)) is not None:
                        try:
                            held.take(column, *scalar(reading.value.todict()))
                        except ValueError as error:
                            yield Unreadable(f"an update of {self.pvs[column]}: {error}")
                if array is not None:
                    yield from self._noted(self.frames, array, scans, waiting)
                yield from self._read(held, waiting)
                if arrays.listens and all(updates.listens for updates in readings):
                    yield None

    def _noted(
        self, frames: PvaFrames, array: Update, scans: Scans, waiting: deque[tuple[int, float, float]]
    ) -> Iterator[Record]:
        value = array.value
        refuse_other_than_arrays(frames.pv, value)
        if not value["dimension"]:
            return  # what an idle PV holds
        if array.held:
            yield Unreadable(HELD)
            return
        attributes = value["attribute"] if scans.attribute else ()
        number, when = int(value["uniqueId"]), taken_at(value)
        yield from scans.begun({each["name"]: each["value"] for each in attributes}, number, when)
        if when and number >= frames.first:
            waiting.append((number - frames.first, when, time.monotonic()))
        elif not when:
            yield Unreadable("an array without a time stamp, which scalar PVs are read by")

    def _read(self, held: Held, waiting: deque[tuple[int, float, float]]) -> Iterator[Samples]:
        """Those of the frames in front that need not wait any more."""
        while waiting and (held.later(waiting[0][1]) or time.monotonic() - waiting[0][2] > self.late_s):
            number, when, _ = waiting.popleft()
            row = held.at(when)
            if row is not None:
                yield Samples(number, row[None] * np.asarray(self.scale))


class Held:
    """Values that hold until the next ones, by their times. Pure."""

    def __init__(self, columns: int) -> None:
        self._times: list[list[float]] = [[] for _ in range(columns)]
        self._values: list[list[float]] = [[] for _ in range(columns)]

    def take(self, column: int, when: float, value: float) -> None:
        """The value of a column from a time on, in any order."""
        times, values = self._times[column], self._values[column]
        place = bisect.bisect_right(times, when)
        times.insert(place, when)
        values.insert(place, value)
        if len(times) > _KEPT:
            del times[0], values[0]

    def later(self, when: float) -> bool:
        """Whether each column has a value from a later time: none of before is to come then, in order."""
        return all(times and times[-1] > when for times in self._times)

    def at(self, when: float) -> NDArray[np.float64] | None:
        """(column,) what held at a time; None where a column had no value yet."""
        places = [bisect.bisect_right(times, when) - 1 for times in self._times]
        if min(places) < 0:
            return None
        return np.array([values[place] for values, place in zip(self._values, places, strict=True)])


def scalar(fields: Mapping[str, Any]) -> tuple[float, float]:
    """Time and value of an NTScalar's update, NaN where its alarm says that it is none. Raises ValueError, and nothing
    else, for what is no number with a time stamp."""
    try:
        when, value = stamp(fields.get("timeStamp")), float(fields["value"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"no number: {type(error).__name__} {str(error)[:100]}") from error
    if not 0 < when < np.inf:
        raise ValueError("no time stamp, which it is read by")
    alarm = fields.get("alarm")
    invalid = isinstance(alarm, Mapping) and alarm.get("severity") == _INVALID
    return when, np.nan if invalid else value
