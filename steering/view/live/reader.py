"""The one reader of a run in this process: it looks twice a second while somebody watches, and puts what has changed
into one message for all."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from steering.campaign import Limits
from steering.inference import ImageChange
from steering.runner.attach import UNREACHED, Attached, attach, noted
from steering.runner.folder import RunFolder
from steering.runner.liveness import gone, standing
from steering.runner.page_state import PageUpdate
from steering.view.live.course import Course
from steering.view.live.folder_image import image_of
from steering.view.live.message import message
from steering.view.live.tail import Tail
from steering.view.live.warnings import warnings
from steering.view.status import how, silence, waits_for

logger = logging.getLogger(__name__)

EVERY_S = 0.5
"""Between two looks."""
_AGAIN_S = 2.0
"""Between two tries to reach a run that cannot be reached."""
_FOLDER_S = 2.0
"""Between two looks at what is in the folder beside the log."""

Send = Callable[[bytes], None]


class Reader:
    """Follows a run, running or ended, for any number of viewers; without one it rests.

    A thread of its own reads, so that nobody waits for a run that does not answer.
    """

    def __init__(self, folder: RunFolder, every_s: float = EVERY_S, *, insecure: bool = False) -> None:
        """every_s: between two looks. insecure: as for `attach`."""
        self.folder = folder
        self._insecure = insecure
        self._every = every_s
        self._run: Attached | None = None
        self._reaching = threading.Lock()
        self._course = Course(folder.started)
        self._tail = Tail(folder)
        self._state: dict[str, Any] = {}
        self._folder_facts: dict[str, Any] = {}
        self._ended: ImageChange | None = None
        self._known: tuple[str, int, int] | None = None
        self._judged: dict[str, int] = {}
        """By scan: frames of which the errors are in the course."""
        self._sent_facts: dict[str, Any] = {}
        self._sent_rows: dict[str, tuple[int, int]] = {}
        self._answered = self._tried = self._looked = 0.0
        self._viewers: set[Send] = set()
        self._new: set[Send] = set()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, name="page", daemon=True)

    def start(self) -> None:
        """Begin to follow the run."""
        self._thread.start()

    def close(self) -> None:
        """Let go of the run, which goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=_AGAIN_S)

    def watch(self, send: Send) -> None:
        """Have everything sent at once, and then what changes. send: called in the reader's thread; must not wait.
        Called again: everything is sent again."""
        with self._changed:
            self._viewers.discard(send)
            self._new.add(send)
            self._changed.notify_all()

    def leave(self, send: Send) -> None:
        """Send nothing more."""
        with self._changed:
            self._viewers.discard(send)
            self._new.discard(send)

    def command(self, name: str, version: int | None, by: str, limits: Limits | None = None) -> str:
        """Give the run a command. Returns what will be done; raises ValueError where it cannot be done now,
        RuntimeError where the run has ended or cannot be reached; then a stop is noted, see `attach.stop`. Waits for
        the runner's answer."""
        try:
            run = self._attached()
        except UNREACHED:
            if name != "stop" or self._over():
                raise
            return noted(self.folder, by)
        return run.command(name, version, by=by, limits=limits)

    def metrics(self) -> bytes:
        """The newest figures of the run in Prometheus' text format. Raises as `Attached.metrics`, and RuntimeError
        where the run has ended or cannot be reached."""
        if self._over():
            raise RuntimeError(f"{self.folder.name}: found a run that has ended, expected one that goes on")
        run = self._attached()
        try:
            return run.metrics()
        except UNREACHED:
            self._let_go(run)
            raise

    # In the reader's own thread.

    def _follow(self) -> None:
        while True:
            with self._changed:
                while not (self._viewers or self._new or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
            begun = time.monotonic()
            try:
                self._look()
            except Exception:  # one look must not end the page
                logger.warning("a look at %s failed", self.folder.path, exc_info=True)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or self._new, max(0.0, begun + self._every - time.monotonic())
                )
        if self._run is not None:
            self._run.close()

    def _look(self) -> None:
        with self._changed:
            viewers, new = set(self._viewers), set(self._new)
            self._new.clear()
            self._viewers |= new
        image = self._update(None if new and not viewers else self._known)
        facts = self._facts()
        changed = {name: value for name, value in facts.items() if self._sent_facts.get(name, self) != value}
        rows = {name: series.since(*self._sent_rows.get(name, (-1, 0))) for name, series in self._course.series.items()}
        rows = {name: part for name, part in rows.items() if part is not None}
        self._sent_facts = facts
        self._sent_rows = {name: (series.revision, len(series)) for name, series in self._course.series.items()}
        if viewers and (changed or rows or image):
            _deliver(message(changed, rows, image), viewers)
        if new:
            if viewers or image is None:
                image = self._whole_image()
            whole = {name: part for name, s in self._course.series.items() if (part := s.since(-1, 0)) is not None}
            _deliver(message(facts, whole, image), new)

    def _update(self, known: tuple[str, int, int] | None) -> ImageChange | None:
        """Take in what is new. Returns what has changed of the image."""
        self._course.take(self._tail.lines())
        now = time.monotonic()
        if now - self._looked > _FOLDER_S:
            self._looked = now
            self._folder_facts = {"how": how(self.folder), "waits": waits_for(self.folder)}
        update = self._ask(known)
        if update is None:
            return None
        self._state = update.state
        image = update.image
        if image is None or (known is not None and image.known == self._known):
            return None
        self._take_errors(image)
        self._known = image.known
        return image

    def _ask(self, known: tuple[str, int, int] | None) -> PageUpdate | None:
        """A look at the run; None where it cannot be reached or has ended."""
        now, run = time.monotonic(), self._run
        if run is None:
            if now - self._tried < _AGAIN_S or self._over():
                return None
            self._tried = now
            try:
                run = self._attached()
            except (RuntimeError, OSError) as error:
                logger.info("%s", error)
                return None
        try:
            update = run.page_update(known)
            self._answered = time.monotonic()
            return update
        except TimeoutError:
            return None
        except UNREACHED as error:
            logger.info("the run cannot be reached: %s", error)
            self._let_go(run)
            return None

    def _attached(self) -> Attached:
        """The run, reached once for everybody here."""
        with self._reaching:
            if self._run is None:
                self._run = attach(self.folder, insecure=self._insecure)
            return self._run

    def _let_go(self, run: Attached) -> None:
        """Reach the run anew next time."""
        with self._reaching:
            run.close()
            if self._run is run:
                self._run = None

    def _over(self) -> bool:
        return self.folder.summary().get("status") != "running" or gone(self.folder)

    def _whole_image(self) -> ImageChange | None:
        """All of the image: from the run, or from its folder where that has ended."""
        if self._run is not None:
            update = self._ask(None)
            if update is not None and update.image is not None:
                return update.image
        if self._ended is None and self._over():
            objects = self.folder.objects()
            if objects:
                scan = list(objects)[-1]
                self._ended = image_of(objects[scan], scan)
                self._take_errors(self._ended)
        return self._ended

    def _take_errors(self, image: ImageChange) -> None:
        """Add the errors of new frames, where the truth is known, to the course; before those of a scan that is new
        here, those of the scans in the folder."""
        header, frames = image.header, image.header["frames"]
        scan, count, columns = header["scan"], frames["count"], frames["columns"]
        if scan not in self._judged:
            others = {name: data for name, data in self.folder.objects().items() if name not in (scan, *self._judged)}
            for name, data in others.items():
                self._judged[name] = data.sizes.get("frame", 0)
                if "error" in data and "acquired" in data:
                    self._course.add_errors(data["acquired"].values, data["error"].values)
        last = frames["first"] + count
        new = min(count, last - self._judged.get(scan, 0))
        self._judged[scan] = last
        if new > 0:
            where = {name: np.frombuffer(image.payload, np.float64, count, columns[name]) for name in ("time", "error")}
            self._course.add_errors(where["time"][count - new :], where["error"][count - new :])

    def _facts(self) -> dict[str, Any]:
        summary = standing(self.folder) if self._run is None else {}
        live = self._run is not None
        state = self._state if live else {**self._state, "drift": False, "paused": False, "proposed": None, "next": []}
        status = state.get("status", "running") if live else "failed" if "lost" in summary else summary.get("status")
        ended = "" if live else str(summary.get("lost") or summary.get("reason") or "")
        silent = time.monotonic() - self._answered if live and self._answered else 0.0
        return {
            **{key: value for key, value in state.items() if key not in ("events", "look_cpu_s")},
            "run": self.folder.name,
            "status": status,
            "live": live,
            **self._folder_facts,
            "warnings": warnings(
                state,
                waits=self._folder_facts.get("waits", ()),
                source=silence(self._course.of_source) if live and status == "running" else "",
                silent_s=silent,
                ended=ended,
            ),
            "log": [[round(when, 1), words] for when, words in self._course.log],
            "forgetting": state.get("forgetting") or summary.get("forgetting") or {},
            "figures": {} if live else summary,
        }


def _deliver(data: bytes, viewers: set[Send]) -> None:
    for send in viewers:
        send(data)
