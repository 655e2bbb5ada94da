"""What every paced source shares: targets in, chunks out, in real time, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Target = TypeVar("Target")
Measure = Callable[[int, list[Target], NDArray[np.float64]], xr.Dataset]
"""(part, targets of one chunk, seconds spent on each) -> the chunk."""

STARVED_S = 0.2
"""How long a chunk that is not full waits for further targets before it is handed out."""
LONGEST_S = 2.0
"""How long the first frame of a chunk waits for further ones at most: where exposures are long, a full chunk would be
minutes old, and its source taken for silent."""


@dataclass(frozen=True)
class _Request(Generic[Target]):
    target: Target | None
    """None: there is nothing to measure, the part ends here."""
    seconds: float
    """Exposure."""
    before: float
    """Seconds of travel before it, without exposure."""
    ends: int | None
    """The scan of which the part measured then is over after this request; None: none is."""


@dataclass
class _Group(Generic[Target]):
    """The requests of one chunk, from the first that is being measured until the chunk is done with."""

    part: int
    requests: list[_Request[Target]]
    dropped: bool = False

    @property
    def frames(self) -> int:
        return sum(request.target is not None for request in self.requests)


class Pacer(Generic[Target]):
    """Measures queued targets one after the other, each in its own time, and hands the chunks out.

    A campaign is a sequence of parts (stages of a beamline; a recording has one). A part is over after its frames, or
    when a request that ends it is done; no chunk spans two parts. Targets are measured in the order in which they came,
    each once; those that a part leaves over are measured in the next one.

    Frame k is due when the exposures and travel times before it have passed. Late frames follow without sleep; after a
    time without targets the clock starts anew. Measuring never waits for the consumer: past `queue_chunks` finished
    chunks the oldest is dropped and counted in `frames_dropped`.

    Every method is thread-safe; a source may hold `lock` around a call of `add`. The object pickles until `run` is
    called.
    """

    def __init__(
        self,
        parts: Sequence[int],
        *,
        frame_rate: float,
        chunk_frames: int,
        queue_chunks: int = 64,
        scans: Sequence[int] | None = None,
    ) -> None:
        """parts: frames of each part. frame_rate: frames per second. scans: number of the scan that each part belongs
        to; None: each is a scan."""
        if not parts or min(parts) < 1:
            raise ValueError(
                f"found parts of {list(parts)} frames, expected at least one part, each of 1 frame or more"
            )
        if not (np.isfinite(frame_rate) and frame_rate > 0):
            raise ValueError(f"found frame_rate={frame_rate}, expected a positive number of frames per second")
        if chunk_frames < 1 or queue_chunks < 1:
            raise ValueError(f"found chunk_frames={chunk_frames}, queue_chunks={queue_chunks}, expected 1 or more")
        self.frame_rate = float(frame_rate)
        self.frames_dropped = 0
        self._parts = tuple(parts)
        self._scans = tuple(range(len(parts)) if scans is None else scans)
        self._chunk_frames = chunk_frames
        self._queue_chunks = queue_chunks
        self._part = 0
        self._left = self._parts[0]
        self._requests: deque[_Request[Target]] = deque()
        self._groups: deque[_Group[Target]] = deque()
        """Of the chunk that the consumer has, those that wait for it, and the one that is being measured, in order."""
        self._held = False
        self._finished: deque[xr.Dataset] = deque()
        self._started = self._closed = self._over = self._measuring = False
        self._error: BaseException | None = None
        self.lock = threading.Condition()

    def __getstate__(self) -> dict[str, object]:
        with self.lock:
            if self._started:
                raise TypeError("found a source that is measuring already; send it to its process before chunks()")
            return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Condition()

    def add(
        self,
        targets: Sequence[Target],
        *,
        dwell: NDArray[np.float64] | None = None,
        travel: NDArray[np.float64] | None = None,
        stop: bool = False,
        scan: int | None = None,
    ) -> None:
        """Queue targets; dwell: seconds of exposure of each (None: one frame time); travel: seconds before each (None:
        none); stop: the part that is measured then is over after them, if it belongs to that scan (None: the scan of
        the part that is measured now)."""
        before = np.zeros(len(targets)) if travel is None else travel
        with self.lock:
            now = self._scans[min(self._part, len(self._scans) - 1)] if scan is None else scan
            ends = now if stop else None
            seconds = np.full(len(targets), 1 / self.frame_rate) if dwell is None else dwell
            last = len(targets) - 1
            for k, (target, exposure, moving) in enumerate(zip(targets, seconds, before, strict=True)):
                self._requests.append(_Request(target, float(exposure), float(moving), ends if k == last else None))
            if stop and not targets:
                self._requests.append(_Request(None, 0.0, 0.0, ends))
            self.lock.notify_all()

    def position(self) -> dict[str, Any]:
        """What is still to be measured or taken, in JSON's types: the chunk that the consumer has counts as not taken
        until it asks for the next one."""
        with self.lock:
            part, left = self._part, self._left
            if self._groups:
                part = self._groups[0].part
                mine = sum(group.frames for group in self._groups if group.part == part)
                # Of the one that is being measured the frames are not counted in `left` yet.
                measuring = self._groups[-1].frames if self._measuring else 0
                left = mine + self._left - measuring if part == self._part else mine
            requests = [request for group in self._groups for request in group.requests]
            return {
                "part": part,
                "left": left,
                "requests": [[r.target, r.seconds, r.before, r.ends] for r in (*requests, *self._requests)],
            }

    def resume(self, position: Mapping[str, Any], target: Callable[[Any], Target]) -> None:
        """Before `run`: go on from a position. target: makes a target of what JSON has made of it.

        Raises ValueError for a position in another sequence of parts.
        """
        part, left = int(position["part"]), int(position["left"])
        if not 0 <= part <= len(self._parts) or not 0 <= left <= (*self._parts, 0)[part]:
            raise ValueError(
                f"found a position in part {part} with {left} frames left, expected one of {list(self._parts)} frames: "
                "recover a run with the workflow and the arguments that it had"
            )
        with self.lock:
            self._part, self._left = part, left
            for found, seconds, before, ends in position["requests"]:
                mine = None if found is None else target(found)
                self._requests.append(_Request(mine, float(seconds), float(before), ends))

    def waiting(self) -> list[Target]:
        """Targets that are queued."""
        with self.lock:
            return [request.target for request in self._requests if request.target is not None]

    def skip(self, count: int) -> list[tuple[int, Target, float]]:
        """Before `run`: leave out so many frames, which were measured before. Returns part, target, seconds of each."""
        found: list[tuple[int, Target, float]] = []
        with self.lock:
            while len(found) < count and self._requests:
                request = self._requests.popleft()
                over = request.ends == self._scans[self._part]
                if request.target is not None:
                    found.append((self._part, request.target, request.seconds))
                    self._left -= 1
                self._end_part(over)
        return found

    def close(self) -> None:
        """End the measurement: what was measured is still handed out, what was queued is not measured any more."""
        with self.lock:
            self._closed = True
            self.lock.notify_all()

    def run(self, measure: Measure[Target]) -> Iterator[xr.Dataset]:
        """Start measuring and yield chunks until the parts are over or `close` is called; once only."""
        with self.lock:
            if self._started:
                raise RuntimeError("found a second call of chunks(), expected one: a source measures its scan once")
            self._started = True
        thread = threading.Thread(target=self._measure_all, args=(measure,), name="measuring", daemon=True)
        thread.start()
        try:
            while (chunk := self._next_finished()) is not None:
                yield chunk
        finally:
            self.close()
            thread.join()
        if self._error is not None:
            raise self._error

    def _next_finished(self) -> xr.Dataset | None:
        with self.lock:
            if self._held:
                self._groups.popleft()
            while self._groups and self._groups[0].dropped:
                self._groups.popleft()
            self.lock.wait_for(lambda: self._finished or self._over)
            self._held = bool(self._finished)
            return self._finished.popleft() if self._finished else None

    def _measure_all(self, measure: Measure[Target]) -> None:
        try:
            due = time.monotonic()
            while self._part < len(self._parts) and not self._closed:
                due = self._measure_chunk(measure, due)
        except BaseException as error:  # the boundary of this thread: the consumer raises it
            self._error = error
        finally:
            with self.lock:
                self._over = True
                self.lock.notify_all()

    def _measure_chunk(self, measure: Measure[Target], due: float) -> float:
        """Fill one chunk in real time and hand it out; returns when the next frame is due to start."""
        taken: list[_Request[Target]] = []
        ends: list[float] = []
        with self.lock:
            part, room, over = self._part, min(self._chunk_frames, self._left), False
            group: _Group[Target] = _Group(part, [])
            self._groups.append(group)
            self._measuring = True
            while len(taken) < room and not over and not self._closed:
                starved = not self._requests
                if not self.lock.wait_for(lambda: self._requests or self._closed, STARVED_S if taken else None):
                    break
                if starved:
                    due = max(due, time.monotonic())
                while self._requests and len(taken) < room and not over:
                    request = self._requests[0]
                    if ends and due + request.before + request.seconds > ends[0] + LONGEST_S:
                        room = len(taken)
                        break
                    self._requests.popleft()
                    group.requests.append(request)
                    over = request.ends == self._scans[part]
                    if request.target is not None:
                        due += request.before + request.seconds
                        taken.append(request)
                        ends.append(due)
                self.lock.wait_for(lambda: self._closed, max(0.0, due - time.monotonic()))
            if self._closed:
                now = time.monotonic()
                taken = [request for request, end in zip(taken, ends, strict=True) if end <= now]
        targets = [request.target for request in taken if request.target is not None]
        chunk = measure(part, targets, np.array([request.seconds for request in taken])) if targets else None
        with self.lock:
            self._measuring = False
            if chunk is None:
                self._groups.pop()
            else:
                self._hand_out(chunk)
            self._left -= len(targets)
            self._end_part(over)
        return due

    def _end_part(self, over: bool) -> None:
        if over or self._left == 0:
            self._part += 1
            self._left = self._parts[self._part] if self._part < len(self._parts) else 0

    def _hand_out(self, chunk: xr.Dataset) -> None:
        self._finished.append(chunk)
        if len(self._finished) > self._queue_chunks:
            if not self.frames_dropped:
                logger.warning("the consumer of chunks() is behind: from now on the oldest are dropped")
            self.frames_dropped += self._finished.popleft().sizes["frame"]
            waiting = (group for group in list(self._groups)[int(self._held) :] if not group.dropped)
            next(waiting).dropped = True
        self.lock.notify_all()
