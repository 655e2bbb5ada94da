"""What a run is doing, in the terminal: a live display for a person, plain lines for a log."""

from __future__ import annotations

import io
import logging
import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live

from steering.view.display import Snapshot, clock, draw, drift_in_words, one_line, place, state_in_words, waits_in_words
from steering.view.unheard import give_up

logger = logging.getLogger(__name__)

PLAIN_EVERY_S = 5.0
KEPT = 720


class Progress:
    """Shows snapshots of a run: `show(snapshot)` a few times a second, `close()` at the end.

    In a terminal the display is redrawn in place; elsewhere a line is written every five seconds, and one for each
    event of note. Where nobody takes the output any more, nothing is shown, and the run goes on.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """stream: where to write; standard output by default."""
        self._stream = stream or sys.stdout or io.StringIO()  # standard output may have been closed from the start
        self._unheard = False
        self._console = Console(file=self._stream)
        self._live: Live | None = None
        self._fancy = self._stream.isatty() and not self._console.is_dumb_terminal
        self._residuals = Residuals()
        self._lines = _Lines()
        self._began = time.monotonic()

    def __call__(self, snapshot: Snapshot) -> None:
        """The same as `show`."""
        self.show(snapshot)

    def show(self, snapshot: Snapshot) -> None:
        """Show the state of the run."""
        if self._unheard:
            return
        try:
            self._show(snapshot)
        except OSError as error:
            self._unheard = True
            give_up(self._stream)
            self.close()
            logger.warning("nobody takes the output any more (%s): nothing more is shown, the run goes on", error)

    def _show(self, snapshot: Snapshot) -> None:
        elapsed = snapshot.get("elapsed_s")
        snapshot = {**snapshot, "elapsed_s": time.monotonic() - self._began if elapsed is None else elapsed}
        if not self._fancy:
            for line in self._lines.of(snapshot):
                self._stream.write(line + "\n")
            self._stream.flush()
            return
        self._residuals.add(snapshot)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(draw(snapshot, self._residuals.values), refresh=True)

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back. May be called twice; `steering.runner.run`
        calls it."""
        live, self._live = self._live, None
        if live is not None:
            try:
                live.stop()
            except OSError:
                give_up(self._stream)


class Residuals:
    """The residual over the run so far, thinned so that it never grows beyond KEPT values."""

    def __init__(self) -> None:
        self.values: list[tuple[float, bool]] = []
        self._every, self._skipped = 1, 0

    def add(self, snapshot: Snapshot) -> None:
        """Take in a snapshot's residual, 0..1, and whether drift is raised; nothing where it has no residual."""
        if snapshot.get("residual") is None:
            return
        self._skipped += 1
        if self._skipped < self._every:
            return
        self._skipped = 0
        self.values.append((float(snapshot["residual"]), bool(snapshot.get("drift"))))
        if len(self.values) > KEPT:
            pairs = zip(self.values[::2], self.values[1::2], strict=False)
            self.values = [((a + b) / 2, p or q) for (a, p), (b, q) in pairs]
            self._every *= 2


class _Lines:
    """Which lines a log gets: one every PLAIN_EVERY_S, and one for each event of note."""

    def __init__(self) -> None:
        self._next = 0.0
        self._last: dict[str, Any] = {}
        self._written: set[tuple[float, str]] = set()

    def of(self, snapshot: Snapshot) -> list[str]:
        """The lines that this snapshot adds to the log, each event once."""
        lines = []
        for when, text in self._notes(snapshot):
            if (when, text) not in self._written:
                self._written.add((when, text))
                lines.append(f"{clock(when)}  * {one_line(text)}")
        ended = snapshot.get("status") != self._last.get("status") and bool(self._last)
        if snapshot["elapsed_s"] >= self._next or ended:
            self._next = snapshot["elapsed_s"] + PLAIN_EVERY_S
            lines.append(_plain_line(snapshot))
        self._last = {key: snapshot[key] for key in ("status", "scan", "drift", "version") if key in snapshot}
        return lines

    def _notes(self, snapshot: Snapshot) -> list[tuple[float, str]]:
        """The run's own list of events where there is one; else what changed since the last snapshot."""
        if snapshot.get("events") is not None:
            return [(when, text) for when, text in snapshot["events"]]
        now, last = snapshot["elapsed_s"], self._last
        notes = []
        if snapshot.get("scan") is not None and snapshot["scan"] != last.get("scan"):
            notes.append((now, f"new sample: {snapshot['scan']}"))
        if bool(snapshot.get("drift")) != bool(last.get("drift")):
            notes.append((now, "drift: trust fell" if snapshot.get("drift") else "drift is over: trust is back"))
        if snapshot.get("version") is not None and last.get("version") not in (None, snapshot["version"]):
            notes.append((now, f"model version {snapshot['version']} is in service"))
        return notes


def _plain_line(snapshot: Snapshot) -> str:
    known = snapshot.get
    parts = [f"{clock(snapshot['elapsed_s'])}  {state_in_words(snapshot):<8}"]
    if waits := waits_in_words(snapshot):
        parts.append(waits)
    if known("scan") is not None:
        parts.append(f"{known('scan')}{place(snapshot, ' (', ')')}")
    if known("frames_acquired") is not None:
        expected = f"/{known('frames_expected')}" if known("frames_expected") else ""
        rate = f" at {known('frames_per_s'):.0f}/s" if known("frames_per_s") else ""
        parts.append(f"{known('frames_acquired')}{expected} frames{rate}")
    if known("frames_dropped"):
        parts.append(f"{known('frames_dropped')} dropped")
    if known("version") is not None:
        parts.append(f"version {known('version')}")
    if known("residual") is not None:
        expected = f", expected {known('residual_expected'):.3f}" if known("residual_expected") is not None else ""
        drift = drift_in_words(snapshot)
        parts.append(f"residual {known('residual'):.3f}{expected}{f', {drift}' if drift else ''}")
    if known("steps"):
        loss = f", loss {known('loss'):.3g}" if known("loss") is not None else ""
        parts.append(f"{known('steps')} steps{loss}")
    return "  ".join(parts)
