"""What live streams send, found by listening to them for a moment."""

from __future__ import annotations

import glob
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steering.sources.streams import Began, Frame, Record, Samples, Stream, Unreadable
from steering.sources.swmr import SwmrFrames, SwmrPositions


@dataclass
class Seen:
    """What one stream sent while it was listened to."""

    what: str = ""
    """Shape and dtype, or the first sample."""
    count: int = 0
    """Frames, or samples."""
    first: int | None = None
    """Number of the first."""
    began: float = 0.0
    ended: float = 0.0
    armed: bool = False
    """A scan was announced."""
    scans: list[str] = field(default_factory=list)
    header: Mapping[str, Any] = field(default_factory=dict)
    trouble: str = ""
    """The newest message that could not be read, or why the stream could not be followed."""

    def line(self) -> str:
        """All that in a line."""
        if not self.count:
            what = f" ({', '.join(self._said())})" if self._said() else ""
            came = f"armed{what}, nothing more came" if self.armed else "nothing came"
            return f"{came}{f': {self.trouble}' if self.trouble else ''}"
        taken = self.ended - self.began
        rate = f"{(self.count - 1) / taken:.1f}/s" if self.count > 1 and taken > 0 else "one only"
        parts = [self.what, rate, f"first number {self.first}"]
        parts += self._said()
        parts += [f"trouble: {self.trouble}"] if self.trouble else []
        return ", ".join(parts)

    def _said(self) -> list[str]:
        """What was announced."""
        scans = [f"scan {', '.join(self.scans)}"] if self.scans else []
        return scans + [f"{name} {_value(value)}" for name, value in self.header.items() if value is not True]

    def note(self, record: Record) -> None:
        """Take in a record."""
        now = time.monotonic()
        match record:
            case Frame():
                y, x = record.counts.shape
                self._more(1, record.number, now, f"{y} x {x} {record.counts.dtype}")
                try:
                    np.asarray(record.counts)
                except ValueError as error:
                    self.trouble = str(error)
            case Samples():
                row = ", ".join(f"{value:.6g}" for value in record.rows[0])
                self._more(len(record.rows), record.first, now, f"({row}) at first")
            case Began():
                self.scans += [record.name] if record.name is not None else []
                self.header, self.armed = dict(record.header), True
            case Unreadable():
                self.trouble = record.reason

    def _more(self, count: int, number: int, now: float, what: str) -> None:
        if not self.count:
            self.what, self.first, self.began = what, number, now
        self.count += count
        self.ended = now


def listen(streams: Mapping[str, Stream], seconds: float) -> dict[str, Seen]:
    """What each stream sends in so many seconds, by its name; what comes with frames counts as its own stream.

    What a detector pushes to one client only, as stream2 does, is taken from it: nobody else gets these frames.
    """
    found = {name: Seen() for name in streams}
    stopped = threading.Event()

    def follow(name: str, stream: Stream) -> None:
        try:
            for record in stream.records(stopped):
                if record is not None:
                    found[name].note(record)
                if isinstance(record, Frame):
                    for beside in record.own.keys() & found.keys():
                        found[beside].note(Samples(record.number, record.own[beside][None]))
        except Exception as error:  # it is printed beside the other streams
            found[name].trouble = str(error)

    threads = [threading.Thread(target=follow, args=each, daemon=True) for each in streams.items()]
    for thread in threads:
        thread.start()
    stopped.wait(seconds)
    stopped.set()
    for thread in threads:
        thread.join(5.0)
    for name, stream in streams.items():
        found[name].trouble = found[name].trouble or _no_file(stream)
    return found


def _no_file(stream: Stream) -> str:
    """That a file which is followed is not there; empty where it is, or there is none to be followed."""
    if not isinstance(stream, SwmrFrames | SwmrPositions) or glob.glob(stream.where.file):
        return ""
    return f"found no file {stream.where.file}, expected one that is being written: check the path, or begin to write"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{v:.6g}" for v in value) + ")"
    return f"{value:.6g}" if isinstance(value, float) else str(getattr(value, "shape", value))
