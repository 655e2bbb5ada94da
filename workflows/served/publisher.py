"""What every protocol's publisher does, and the loop that feeds it from the simulated beamline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from served.faults import Faults, Sent
from steering import Decision, SimulatedBeamline


class Publisher(Protocol):
    """Sends frames and positions over one protocol."""

    addresses: dict[str, str]
    """frames, positions, motion: as workflows/live_scan.py takes them; some have others beside."""

    armed: bool
    """The first scan begins before anything is asked for, as that of a detector does which is armed."""

    def begin(self, scan: str) -> None:
        """A scan begins."""

    def frame(self, number: int, counts: NDArray) -> None:
        """A frame (y, x)."""

    def position(self, number: int, position: NDArray[np.float64]) -> None:
        """Where a frame was measured (y, x), metres."""

    def missed(self) -> None:
        """A frame was measured, and is not sent now."""

    def end(self, frames: int, last: bool) -> None:
        """The scan is over; last: no other will come."""

    def steered_by(self, apply: Callable[[Decision], None]) -> None:
        """Hand the decisions that come over the protocol to `apply`, which raises ValueError for what it refuses."""

    def close(self) -> None:
        """Leave."""


def publish(beamline: SimulatedBeamline, publisher: Publisher, faults: Faults) -> dict[str, int]:
    """Measure what is asked for over the protocol, and send it, until the beamline's stages are over.

    Returns the frames measured and those that the faults dropped.
    """
    publisher.steered_by(beamline.apply)
    sending, measured = _Sending(publisher, faults), 0
    if publisher.armed:
        sending.scan(beamline.scans[0])
    for chunk in beamline.chunks():
        where = np.stack([chunk["position_y"].values, chunk["position_x"].values], axis=1)
        sending.scan(str(chunk.attrs["scan"]))
        for counts, position in zip(chunk["counts"].values, where, strict=True):
            sending.frame(counts, position)
        measured += len(where)
    sending.end(last=True)
    return {"frames": measured, "dropped": faults.dropped}


class _Sending:
    """Sends what is measured, with the faults."""

    def __init__(self, publisher: Publisher, faults: Faults) -> None:
        self._publisher, self._faults = publisher, faults
        self._scan: str | None = None
        self._number = 0
        self._held: list[Sent] = []
        """Whose positions are held back."""

    def scan(self, name: str) -> None:
        if name != self._scan:
            if self._scan is not None:
                self.end(last=False)
            self._scan, self._number = name, 0
            self._publisher.begin(name)

    def frame(self, counts: NDArray, position: NDArray[np.float64]) -> None:
        frame = Sent(self._number, self._faults.exposed(self._number, counts), position)
        if frame.number == self._faults.stall_at:
            time.sleep(self._faults.stall_s)
        self._held.append(frame)
        if not self._faults.silent(frame.number):
            self._send_positions()
        sent = self._faults.frames(frame)
        for one in sent:
            self._publisher.frame(one.number, one.counts)
        if not sent:
            self._publisher.missed()
        self._number += 1

    def end(self, last: bool) -> None:
        for one in self._faults.rest():
            self._publisher.frame(one.number, one.counts)
        self._send_positions()
        self._publisher.end(self._number, last)

    def _send_positions(self) -> None:
        for one in self._held:
            self._publisher.position(one.number, one.position)
        self._held.clear()
