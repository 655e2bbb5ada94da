"""The smallest beamline with streams: what its motion is asked for comes back as frames, in the receiving process."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from steering.sources.streams import POSITIONS, Began, Ended, Frame

WINDOW = 16
_asked: queue.SimpleQueue = queue.SimpleQueue()
"""Of this process."""


@dataclass(frozen=True, kw_only=True)
class LoopFrames:
    """A frame for each position that was asked for, which comes with it, until so many are measured, or a stop."""

    frames: int
    broken_at: int = -1
    """Number at which it fails."""
    connects_s: float = 0.0
    """What was asked for before is lost."""

    def records(self, stopped):
        stopped.wait(self.connects_s)
        with suppress(queue.Empty):
            while self.connects_s:
                _asked.get_nowait()
        yield Began("scan")
        number = 0
        while not stopped.is_set() and number < self.frames:
            try:
                position = _asked.get(timeout=0.02)
            except queue.Empty:
                yield None
                continue
            if position is None:
                break
            if number == self.broken_at:
                raise OSError("found the cable pulled out, expected it plugged in")
            counts = np.random.default_rng(number).poisson(5, (WINDOW, WINDOW)).astype(np.uint16)
            yield Frame(number, counts, time.time(), {POSITIONS: position})
            number += 1
        yield Ended(number, last=True)
        while not stopped.wait(0.05):
            yield None


@dataclass(frozen=True, kw_only=True)
class LoopMotion:
    """Where positions are asked for; it refuses those beyond `reach`."""

    reach: float = np.inf
    close_s = 1.0

    def connected(self, stopped: threading.Event):
        return self

    def measure(self, positions, dwell, stop):
        if len(positions) and np.abs(positions).max() > self.reach:
            raise ValueError(f"found a position beyond {self.reach:g}, expected it within the stage's limits")
        for position in positions:
            _asked.put(position)
        if stop:
            _asked.put(None)

    def close(self):
        pass


@dataclass(frozen=True, kw_only=True)
class Silent:
    """A stream in which nothing comes."""

    def records(self, stopped):
        while not stopped.wait(0.05):
            yield None


@dataclass(frozen=True, kw_only=True)
class Told:
    """A stream of given records; before the last one it rests."""

    records_: tuple
    rest_s: float = 0.0

    def records(self, stopped):
        yield from self.records_[:-1]
        stopped.wait(self.rest_s)
        yield self.records_[-1]
        yield from Silent().records(stopped)
