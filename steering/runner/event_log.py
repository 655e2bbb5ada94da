"""The log of events as the runner keeps it: written by a thread of its own, so that no event waits for a disk."""

from __future__ import annotations

import asyncio
import contextlib
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
_MOST_BYTES = 2**26
"""Lines that may wait for a slow disk: ten minutes of 1000 frames per second."""
_AGAIN_S = 1.0
"""Between two tries to write to a disk that takes nothing."""
_LAST_S = 30.0
"""How long the end of a run waits for a slow disk."""


class EventLog:
    """events.jsonl of a run, open while the run goes on. Other processes may append to the file too, see
    `RunFolder.append_event`.

    The log has no gap. Where the disk is full, read-only or gone, lines wait in memory, and are written once it takes
    them again; more of them than memory is set aside for are an error, and the next `append` raises it. Lines keep
    their order. A process that is killed takes at most a second of everyday events with it, and leaves at worst its
    last line torn, which readers leave out.
    """

    def __init__(self, folder: RunFolder) -> None:
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
        line = encoded(event)
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._bytes + len(line) > _MOST_BYTES:
                self._error = OSError(
                    f"{self._folder.path}: found a disk that takes no events, and {self._bytes} bytes of them waiting, "
                    f"expected at most {_MOST_BYTES}: choose a folder on a faster disk"
                )
                raise self._error
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="event log", daemon=True)
                self._thread.start()
            latest = time.monotonic() + (_EVERY_S if event.get("event") in EVERYDAY else 0.0)
            self._due = min(self._due, latest) if self._lines else latest
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
