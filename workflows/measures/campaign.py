"""A run in processes of its own, followed by its log: started, lost, and recovered."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steering.runner import RunFolder, attach

WORKFLOW = Path(__file__).with_name("endless.py")
HANG_S = 90.0
"""A campaign that does not go on within so long hangs."""
LOOK_S = 0.05


class Died(Exception):
    """The campaign has ended, or hangs."""


class Campaign:
    """A run of `endless.py`, and its events as they are written."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self.path = path
        self._read = 0
        self._events: list[dict[str, Any]] = []
        self._process = self._started("run", "--out", str(path), str(WORKFLOW), *arguments)

    def recover(self, *arguments: str) -> None:
        """Have it go on after its processes are gone."""
        self._process = self._started("recover", str(self.path), "--", *arguments)

    def _started(self, *words: str) -> subprocess.Popen:
        with open(self.path.with_suffix(".log"), "ab") as log:
            command = [sys.executable, "-m", "steering.cli", *words]
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    @property
    def pid(self) -> int:
        """Process of the driver."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the driver is gone."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """Kill the driver, and all that it has started."""
        if not self.ended:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def since(self, begun: float) -> list[dict[str, Any]]:
        """Events later than `begun`; earlier ones are forgotten."""
        log = self.path / "events.jsonl"
        if log.exists():
            with log.open("rb") as lines:
                lines.seek(self._read)
                for line in lines:
                    if line.endswith(b"\n"):
                        self._read += len(line)
                        self._take(line)
        self._events = [event for event in self._events if event["time"] >= begun]
        return self._events

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # torn, when its writer was killed
        self._events.append(event)

    def wait(
        self, true: Callable[[list[dict[str, Any]]], bool], since: float, limit_s: float = HANG_S
    ) -> list[dict[str, Any]]:
        """Events later than `since`, once `true` holds of them. Raises Died."""
        until = time.monotonic() + limit_s
        while True:
            found = self.since(since)
            if true(found):
                return found
            if self.ended:
                raise Died(f"the driver has ended: {self.last_words()}")
            if time.monotonic() > until:
                raise Died(f"nothing of what was waited for within {limit_s:.0f} s")
            time.sleep(LOOK_S)

    def last_words(self) -> str:
        """What it said last."""
        return " / ".join(self.path.with_suffix(".log").read_text(errors="replace").splitlines()[-3:])[-600:]

    def stop(self, limit_s: float = 180.0) -> dict[str, Any]:
        """End it in order; its figures. Raises Died where it does not."""
        with attach(self.path) as run:
            run.command("stop")
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise Died("it did not end when it was stopped") from None
        found = RunFolder(self.path).summary()
        if found["status"] != "finished":
            raise Died(f"it ended as {found['status']}: {found.get('reason')}")
        return found
