"""The log of events as the runner keeps it: written by a thread of its own, so that no event waits for a disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

from steering.runner.folder import RunFolder, append_lines, encoded, explained

logger = logging.getLogger(__name__)

EVERYDAY = ("ChunkArrived", "PredictionReady")
"""Events that may wait for others to be written together with; all others (decisions, models, losses) are written at
once."""
_EVERY_S = 1.0
"""How long an everyday event waits, at most: what a killed process may take with it."""
MOST_BYTES = 2**26
"""Lines that may wait for a slow disk: ten minutes of 1000 frames per second."""
_AGAIN_S = 1.0
"""Between two tries to write to a disk that takes nothing."""
_LAST_S = 30.0
"""How long the end of a run waits for a slow disk."""
_BISECTED = 2**16
"""Bytes of the log that are read one after the other rather than searched."""


class EventLog:
    """events.jsonl of a run, open while the run goes on. Other processes may append to the file too, see
    `RunFolder.append_event`.

    The log has no gap. Where the disk is full, read-only or gone, lines wait in memory, and are written once it takes
    them again; more of them than memory is set aside for are an error, and the next `append` raises it. Lines keep
    their order. A process that is killed takes at most a second of everyday events with it, and leaves at worst its
    last line torn, which readers leave out.
    """

    def __init__(self, folder: RunFolder, *, number: int = 0) -> None:
        """number: of the last event that is in the file already."""
        self.number = number
        """Of the newest event, which stands in its line as `seq`: they count up from 1."""
        self._folder = folder
        self._lines: list[bytes] = []
        self._bytes = 0
        """Of all lines that wait, those being written included."""
        self._due = 0.0
        """When the lines that wait are to be written."""
        self.trouble: OSError | None = None
        """Why lines wait now; None where they do not."""
        self._error: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def append(self, event: Mapping[str, Any]) -> None:
        """Put a line into the queue; never waits for the disk.

        Raises OSError where more than 64 MiB wait.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            line = encoded({**event, "seq": self.number + 1})
            if self._bytes + len(line) > MOST_BYTES:
                self._error = OSError(
                    f"{self._folder.path}: found a disk that takes no events, and {self._bytes} bytes of them waiting, "
                    f"expected at most {MOST_BYTES}: choose a folder on a faster disk"
                )
                raise self._error
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="event log", daemon=True)
                self._thread.start()
            latest = time.monotonic() + (_EVERY_S if event.get("event") in EVERYDAY else 0.0)
            self._due = min(self._due, latest) if self._lines else latest
            self.number += 1
            self._lines.append(line)
            self._bytes += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all that was appended is in the file. Raises OSError where that fails, or takes half a minute."""
        with self._changed:
            self._due = 0.0
            self._changed.notify_all()
            written = self._changed.wait_for(lambda: not self._bytes or self._error is not None, _LAST_S)
            if self._error is not None:
                raise self._error
            if not written:
                raise OSError(
                    f"{self._folder.path}: found events that could not be written within {_LAST_S:.0f} s, expected a "
                    "disk that takes them: choose a folder on a faster disk"
                )

    def sync(self) -> None:
        """Wait until all that was appended is on the disk itself. Raises as `flush`."""
        self.flush()
        with open(self._folder.path / "events.jsonl", "rb") as log:
            os.fsync(log.fileno())

    async def __aenter__(self) -> EventLog:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Write what waits, and end. Raises as `flush`, unless an error is on its way already."""
        try:
            await asyncio.to_thread(self.flush)
        except Exception as late:
            if error is None:
                raise
            logger.warning("the last events of the run could not be written: %s", late)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _write(self) -> None:
        try:
            with contextlib.ExitStack() as held:
                log = None
                while (lines := self._taken()) is not None:
                    while True:
                        try:
                            with explained(self._folder.path):
                                log = log or held.enter_context(open_log(self._folder))
                                _append_whole(log, b"".join(lines))
                            break
                        except OSError as error:
                            log = None  # it is opened anew
                            with contextlib.suppress(OSError):
                                held.close()
                            self._wait_for_the_disk(error)
                    with self._changed:
                        self.trouble = None
                        self._bytes -= sum(map(len, lines))
                        self._changed.notify_all()
        except Exception as error:  # raised again by `append` and `flush`
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_the_disk(self, error: OSError) -> None:
        """Until it is worth another try. Raises the error once the log is closed."""
        with self._changed:
            if self.trouble is None:
                logger.warning("%s: events wait in memory until they can be written: %s", self._folder.path, error)
            self.trouble = error
            self._changed.wait_for(lambda: self._closed, _AGAIN_S)
            if self._closed:
                raise error

    def _taken(self) -> list[bytes] | None:
        """The lines that wait, once they are due; None at the end."""
        with self._changed:
            while not self._lines or time.monotonic() < self._due:
                if self._closed:
                    return None
                self._changed.wait(max(0.0, self._due - time.monotonic()) if self._lines else None)
            lines, self._lines = self._lines, []
            return lines


def _append_whole(log: IO[bytes], lines: bytes) -> None:
    """Append these lines; where that fails, none of them."""
    size = log.seek(0, os.SEEK_END)
    try:
        append_lines(log, lines)
    except OSError:
        # On a disk that takes nothing more nobody else has appended meanwhile.
        with contextlib.suppress(OSError):
            log.truncate(size)
        raise


def open_log(folder: RunFolder) -> contextlib.AbstractContextManager[IO[bytes]]:
    """The file, to append to; nothing that is written stays in a buffer of this process."""
    return open(folder.path / "events.jsonl", "ab+", buffering=0)


def repaired(folder: RunFolder) -> bool:
    """Take away the torn line that a killed process has left at the end of the log; False where there is none. A line
    that lacks nothing but its end gets it."""
    try:
        with open(folder.path / "events.jsonl", "rb+") as log:
            end = log.seek(0, os.SEEK_END)
            start = _line_start(log, end)
            if start == end:
                return False
            log.seek(start)
            if _parsed(log.read()):
                log.write(b"\n")
            else:
                log.truncate(start)
            return True
    except FileNotFoundError:
        return False


def events_after(folder: RunFolder, number: int) -> tuple[list[dict[str, Any]], int]:
    """The events of the log after that one, and the number of the last one in the log.

    Numbers only grow along the file, so what comes before is not read. Lines that are damaged or carry no number are
    left out.
    """
    found: list[dict[str, Any]] = []
    last = 0
    try:
        with open(folder.path / "events.jsonl", "rb") as log:
            low, high = 0, log.seek(0, os.SEEK_END)
            while high - low > _BISECTED:
                middle = (low + high) // 2
                seq = _first_number(log, middle, high)
                low, high = (middle, high) if seq is not None and seq <= number else (low, middle)
            log.seek(_line_start(log, low))
            for line in log:
                event = _parsed(line)
                last = max(last, event.get("seq", 0))
                if event.get("seq", 0) > number:
                    found.append(event)
    except FileNotFoundError:
        pass
    return found, last


def _first_number(log: IO[bytes], start: int, end: int) -> int | None:
    """Of the first numbered event that begins after `start`; None where none does before `end`."""
    log.seek(start)
    log.readline()
    while log.tell() < end:
        seq = _parsed(log.readline()).get("seq")
        if seq is not None:
            return int(seq)
    return None


def _line_start(log: IO[bytes], end: int) -> int:
    """Where the line begins in which the byte before `end` stands, or `end` where that byte ends a line."""
    start = end
    while start > 0:
        step = max(0, start - _BISECTED)
        log.seek(step)
        cut = log.read(start - step).rfind(b"\n")
        if cut >= 0:
            return step + cut + 1
        start = step
    return 0


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # the latter: nested without end
        return {}
    return event if isinstance(event, dict) and isinstance(event.get("seq", 0), int) else {}
