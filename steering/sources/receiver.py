"""The receiving process of a live source: it decodes, cuts, joins and steers; the source reads joined frames from it.

It is a process of its own, without torch: a thread that decodes beside a network loses frames, and what a file or a
stream from outside may break is not the worker. `main` is its entry.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from numpy.typing import NDArray

from steering.sources.armings import Armings
from steering.sources.asked import Asked
from steering.sources.bad_pixels import BadPixels
from steering.sources.begun import BegunScans
from steering.sources.expectation import refuse_other_samples
from steering.sources.join import BEYOND, DAMAGED, GIVEN_UP, UNREADABLE, Joiner
from steering.sources.motion import Carrier, Order
from steering.sources.plan import Batch, Plan
from steering.sources.streams import (
    ARMED,
    FRAMES,
    Began,
    Ended,
    Frame,
    Joined,
    Packed,
    Record,
    Samples,
    Stream,
    Unreadable,
    damage,
)

_FIGURES_S, _CLOSE_S = 0.5, 15.0
_SEND_S, _LOOKS = 0.05, 3
"""Frames of a slow stream leave together, as a chunk costs the predictor more than a frame in it: after so many times
so many seconds at the latest, or once none has come for so long."""
_LISTEN_S = 5.0
"""Seconds that streams may take to listen; what is asked for is measured then all the same."""
_SAID_S = 3.0
"""Seconds for which the last word of a stream is waited for once all is joined."""


class Receiver:
    """Follows the streams in a thread each, and sends what is joined."""

    def __init__(self, plan: Plan, connection: Connection) -> None:
        self.plan = plan
        self._connection = connection
        companions = [companion for companion, _ in plan.companions]
        self._joiner = Joiner(companions, plan.settings, self._judge)
        self._begun = time.monotonic()
        self._asked = Asked(plan, self._joiner.counters[FRAMES], self._begun)
        self._turn = threading.Condition()
        self._stopped = threading.Event()
        self._error = ""
        """What failed first, in words."""
        self._armings = Armings(companion.name for companion in companions)
        self._deaf = set(self._joiner.counters)
        """Streams that do not listen yet."""
        self._carrier: Carrier | None = None
        if plan.motion is not None:
            self._carrier = Carrier(plan.motion, self._asked.orders, self._stopped, self._answered, self._fail)
        self._looks = dict.fromkeys(self._joiner.counters, 0.0)
        """How often nothing unread was found in each stream; infinite: it has ended."""
        self._quiet_since = math.inf
        """Since when all frames that came are read; infinite: some are not."""
        self._rows = dict.fromkeys(self._joiner.counters, 0)
        """Samples that the scan has had, by the highest index."""
        self._news: Began | None = None
        """A scan that has begun since the source heard of one."""
        self._scans = BegunScans(plan)
        self._joined_by: float | None = None
        self._last: dict[str, int] = {}
        """Streams that said that no further scan will come, and the scan that was theirs then."""
        self._pixels = BadPixels(plan.window)
        self._closing = self._window_fits = self._beyond = False
        self._figured = 0.0

    def run(self) -> None:
        """Until the scans are over, or the source is closed, or something fails, which is sent as the last message."""
        jobs = [(self._follow, FRAMES, self.plan.frames)]
        jobs += [(self._follow, companion.name, stream) for companion, stream in self.plan.companions]
        threads = [threading.Thread(target=job, args=rest, daemon=True) for job, *rest in jobs]
        for thread in (threading.Thread(target=self._listen, daemon=True), *threads):
            thread.start()
        if self._carrier is not None:
            threading.Thread(target=self._steer, args=(self._carrier,), daemon=True).start()
        try:
            while not self._error and not self._done():
                self._send()
            self._stopped.set()
            if self._closing:
                threads[0].join(1.0)
                self._join(self._pixels.ready(time.monotonic(), all_there=True), time.monotonic())
                with self._turn:
                    self._joiner.finish()
            while not self._error and self._joiner.ready:
                self._send()
            self._leave_beamline()
            self._connection.send(("figures", self._figures()))
            self._connection.send(("error", self._error) if self._error else ("end",))
        finally:
            self._leave_beamline()
            for thread in threads:
                thread.join(_CLOSE_S)

    def terminate(self) -> None:
        """This process is told to end by somebody else than its source: put the motors back meanwhile."""
        self._fail(InterruptedError("found SIGTERM, expected to be closed by the source"), "receiving process")
        self._stopped.set()
        self._asked.orders.put(None)

    def _leave_beamline(self) -> None:
        """Have the motors put back; where they are not, whoever looks after the beamline must know."""
        self._stopped.set()
        with self._turn:
            self._asked.put(self._asked.beam.ends(), time.monotonic())
            self._asked.orders.put(None)
        left = "" if self._carrier is None else self._carrier.left_behind(_CLOSE_S)
        if left:
            try:
                self._connection.send(("warning", left))
            except OSError:  # the source has left: these are its worker's last words
                sys.stderr.write(left + "\n")

    def _done(self) -> bool:
        with self._turn:
            begun = self._armings.scan[FRAMES] + 1
            over = sum(self._joiner.over(scan) for scan in range(begun))
            enough = self.plan.scans is not None and over >= self.plan.scans
            # Another stream may have said all before the first frame comes.
            last = any(name == FRAMES or scan < begun for name, scan in self._last.items())
            return self._closing or (over == begun and (enough or last) and not self._joiner.ready and self._all_said())

    def _all_said(self) -> bool:
        """Streams that say when a scan begins have said that it is over, by which wrong positions are found; or they
        have not, for long after all was joined."""
        now, scan = time.monotonic(), self._armings.scan
        self._joined_by = self._joined_by or now
        ended = all(self._armings.ended(name, min(scan[name], scan[FRAMES])) for name in self._armings.begun)
        return ended or now - self._joined_by > _SAID_S

    def _send(self) -> None:
        """Wait for joined frames for a moment, and send a batch of them, and the figures now and then."""
        with self._turn:
            ready = 0
            for _ in range(_LOOKS):
                full = self._turn.wait_for(
                    lambda: self._joiner.ready >= self.plan.chunk_frames or self._error or self._closing, _SEND_S
                )
                if full or self._joiner.ready == ready:
                    break
                ready = self._joiner.ready
            now = time.monotonic()
            if not full or now - self._figured > _FIGURES_S:
                self._joiner.expire(now, self._quiet_since)
            taken = self._joiner.take(self.plan.chunk_frames)
            self._turn.notify_all()
            if silent := self._asked.silence(now):
                self._fail(RuntimeError(silent), FRAMES)
            news, self._news = self._news, None
            unjudged = self._joiner.waiting(FRAMES) - self._joiner.ready
            self._asked.put(self._asked.beam.due(now, self._asked.outstanding() + unjudged), now)
        if news is not None:
            self._connection.send(("began", news))
        whole = [one for one in taken if self._opened(one)]
        for scan in dict.fromkeys(one.scan for one in whole):
            mine = [one for one in whole if one.scan == scan]
            batch = Batch.of(mine, scan + self._scans.before, self._scans.name(scan))
            self._connection.send(("frames", batch))
        if now - self._figured > _FIGURES_S:
            self._figured = now
            self._connection.send(("figures", self._figures()))

    def _judge(self, joined: Joined) -> str:
        """Why a joined frame is set aside; only where the beam is judged by counts they are looked at for it."""
        wrong = damage(joined.frame[0]) if self.plan.beam.least_counts else ""
        return self._joiner.counters[FRAMES].reason(DAMAGED, wrong) if wrong else self._asked.beam.judge(joined)

    def _opened(self, joined: Joined) -> bool:
        """Decompress and cut a frame that is taken; a damaged one counts as dropped."""
        if wrong := damage(joined.frame[0]):
            with self._turn:
                self._joiner.spoilt(joined, self._joiner.counters[FRAMES].reason(DAMAGED, wrong))
        return not wrong

    def _follow(self, name: str, stream: Stream) -> None:
        try:
            for record in stream.records(self._stopped):
                if name in self._deaf:
                    with self._turn:
                        self._deaf.remove(name)
                        self._turn.notify_all()
                if name == FRAMES:
                    # Those that are held back until the scan's bad pixels are known.
                    last = isinstance(record, Began | Ended) or self._all_asked_for()
                    self._join(self._pixels.ready(time.monotonic(), all_there=last), time.monotonic())
                if record is not None:
                    self._quiet_since = math.inf if name == FRAMES else self._quiet_since
                    self._note(name, record)
                else:
                    self._nothing_unread(name, 1)
                self._wait_for_room(name)
            self._nothing_unread(name, math.inf)
        except BaseException as error:  # the boundary of this thread: the source raises it
            self._fail(error, name)

    def _all_asked_for(self) -> bool:
        """Whether no frame will come before others are asked for: those that are held back are all."""
        if self.plan.motion is None or not self._pixels.held:
            return False
        with self._turn:
            return self._asked.outstanding() <= self._pixels.held

    def _nothing_unread(self, name: str, looks: float) -> None:
        with self._turn:
            self._looks[name] += looks
            if name == FRAMES:
                self._quiet_since = min(self._quiet_since, time.monotonic())
            self._turn.notify_all()

    def _wait_for_others(self, name: str, *, again: bool) -> None:
        """Before a stream begins a scan: have those read that are behind it, as after a pause of this process, or where
        frames are held back. Frames wait for others no longer than for their samples: these may go on for ever."""
        looks = {stream: count + 2 for stream, count in self._looks.items()}  # the second began after now
        until = time.monotonic() + (self.plan.settings.wait_s if name == FRAMES else math.inf)
        while any(self._looks[other] < looks[other] for other in self._armings.behind(name, again=again)):
            if self._stopped.is_set() or self._closing or time.monotonic() >= until:
                return
            self._turn.wait(0.1)

    def _wait_for_room(self, name: str) -> None:
        with self._turn:
            while self._joiner.full(name) and not self._stopped.is_set() and not self._closing:
                self._turn.wait(0.1)

    def _note(self, name: str, record: Record) -> None:
        now = time.monotonic()
        match record:
            case Frame():
                self._frame(record, now)
            case Samples():
                self._samples(name, record, now)
            case Began():
                self._begin(name, record)
            case Ended():
                with self._turn:
                    if name != FRAMES:  # before anybody may take the scan for finished
                        refuse_other_samples(self._joiner.companions[name].samples, self._rows[name], record.frames)
                    else:
                        self._asked.put(self._asked.beam.ended(), now)
                    scan = self._armings.end(name, record.frames)
                    if record.last:
                        self._last[name] = scan
                        self._asked.expectation.over()
                    self._joiner.end(name, scan, now, record.frames)
                    self._turn.notify_all()
            case Unreadable():
                with self._turn:
                    counters = self._joiner.counters[name]
                    counters.last_seen = now
                    counters.left_out(counters.reason(UNREADABLE, record.reason))

    def _begin(self, name: str, record: Began) -> None:
        with self._turn:
            newest = self._armings.scan[FRAMES]
            if name == FRAMES and self.plan.scans == newest + 1 and self._armings.ended(FRAMES, newest):
                self._beyond = True  # a detector may be armed at once for what is not asked for here
                return
            again = bool(record.header.get(ARMED))
            self._wait_for_others(name, again=again)
            self._rows[name] = 0
            if name != FRAMES:
                scan, given_up = self._armings.begins(name, again=again)
                if given_up:
                    self._joiner.withdraw(name, scan, GIVEN_UP)
            else:
                scan = self._armings.frames_begin()
                record = self._news = self._scans.begin(scan, record)
                self._pixels.begin()
                self._asked.beam.scan_over()
                self._joiner.begin(scan, record.first)
                self._joiner.end(FRAMES, scan - 1, time.monotonic())

    def _frame(self, record: Frame, now: float) -> None:
        if self._beyond:
            with self._turn:
                self._joiner.counters[FRAMES].left_out(BEYOND)
            return
        header = self._scans.header
        bad = header.get("bad")
        bad = bad if bad is not None and bad.shape == record.counts.shape else None
        try:
            ready = self._pixels.take(record, bad, now, saturation=header.get("saturation"))
        except ValueError as error:
            if not self._window_fits and not damage(record.counts):
                raise  # the window does not fit the detector
            self._note(FRAMES, Unreadable(str(error)))
            return
        self._window_fits = True
        with self._turn:
            self._armings.frame()
            self._asked.expectation.came(now)
        self._join(ready, now)

    def _join(self, ready: Sequence[tuple[Frame, NDArray | Packed]], now: float) -> None:
        with self._turn:
            scan = self._armings.scan[FRAMES]
            for frame, counts in ready:
                for name in frame.own.keys() & self._joiner.companions.keys():
                    self._joiner.sample(name, scan, frame.number, frame.own[name].tolist(), now)
                self._joiner.frame(scan, frame.number, (counts, frame.time), now)
            if self._joiner.ready >= self.plan.chunk_frames:
                self._turn.notify_all()

    def _samples(self, name: str, record: Samples, now: float) -> None:
        each = self._joiner.companions[name].samples
        with self._turn:
            scan = self._armings.samples(name)
            self._rows[name] = max(self._rows[name], record.first + len(record.rows))
            for k, row in enumerate(record.rows, record.first):
                self._joiner.sample(name, scan, k // each, row, now, sample=k % each)
            self._turn.notify_all()

    def _listen(self) -> None:
        """What the source says; its silence, when it is gone, ends this process."""
        try:
            while True:
                order = self._connection.recv()
                if order[0] == "close":
                    with self._turn:
                        self._closing = True
                        self._turn.notify_all()
                else:
                    with self._turn:
                        self._asked.put(self._asked.beam.ask(Order(*order[1:])), time.monotonic())
        except (EOFError, OSError):
            with self._turn:  # the source is gone: put the motors back, and leave
                self._closing = True
                self._turn.notify_all()
            self._stopped.wait(_CLOSE_S)
            time.sleep(_CLOSE_S + (0.0 if self.plan.motion is None else self.plan.motion.close_s))
            os._exit(1)

    def _steer(self, carrier: Carrier) -> None:
        with self._turn:  # what is measured before a stream is connected is lost
            self._turn.wait_for(lambda: not self._deaf or self._closing or self._error, _LISTEN_S)
        carrier.run()

    def _answered(self, positions: int, refused: int, why: Exception | None) -> None:
        with self._turn:
            self._asked.answered(positions, refused, _words(why) if why else "", time.monotonic())

    def _figures(self) -> dict[str, Any]:
        with self._turn:
            now = time.monotonic()
            streams = {
                name: counters.said(self._joiner.waiting(name), now, self._begun)
                for name, counters in self._joiner.counters.items()
            }
            of_frames, of_run = self._asked.said(now, over=self._stopped.is_set())
            streams[FRAMES] |= of_frames
            if runs := self._scans.runs:
                streams[FRAMES]["runs"] = runs
            return {"streams": streams, "cpu_s": time.process_time(), **of_run}

    def _fail(self, error: BaseException, stream: str) -> None:
        with self._turn:
            if not self._error and not self._stopped.is_set():
                self._error = f"{stream}: {_words(error)}"
            self._turn.notify_all()


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if " " in text else f"{type(error).__name__} {text}"


def main() -> None:
    """Receive as the plan says that comes first over the socket whose number is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the source ends this process
    connection = Connection(int(sys.argv[1]))
    plan = connection.recv()
    receiver = Receiver(plan, connection)
    # In a thread, as it waits for what this one may hold.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=receiver.terminate, daemon=True).start())
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the source has left
        receiver.run()
