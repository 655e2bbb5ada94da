"""The source's actor: it sends chunks of frames to the predictor, which acknowledges each."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import ChunkArrived, Event, FrameRefused, SourceEnded, Steer, StreamsReported
from steering.campaign.unmeasured import Asked, positions_of
from steering.inference.event_queue import EventQueue
from steering.records.optional_parts import offers
from steering.runner.alone import Alone, Positions, Reported, fell_back, say
from steering.runner.asked_before import AskedBefore, as_decision
from steering.runner.folder import RunFolder
from steering.runner.given_again import given_again, keep_again, not_known, unlogged
from steering.runner.outbox import Outbox
from steering.runner.source_events import (
    GoOn,
    SourceFailed,
    SourceResume,
    Standing,
    TakenOver,
    Visits,
    end_quietly,
    failed,
    streams_of,
)
from steering.runner.spool import Spool
from steering.runner.stream_lines import report
from steering.sources import Source

_LOOK_S = 1.0
"""Between two looks at the streams."""


class SourceActor:
    """Runs a source on the worker that has one.

    Where its runner is lost it goes on by itself with a safe raster (see `Alone`) until the next runner adopts it.
    """

    def __init__(
        self,
        source: Source,
        *,
        keep_bytes: int = 2**31,
        spool: Path | None = None,
        folder: RunFolder | None = None,
        unsteered_s: float | None = None,
        holder: str = "",
    ) -> None:
        """keep_bytes: see Outbox. spool: folder into which every chunk is written before it is sent to the predictor;
        None: none is. folder: the run's. unsteered_s: see Alone. holder: see `asked`."""
        self.source = source
        self.keep_bytes = keep_bytes
        self.spool = spool
        self.folder = folder
        self._alone = Alone(unsteered_s)
        self._holder = holder

    async def asked(self, holder: str, method: str, *arguments: Any) -> Any:
        """What a method answers, to the runner that holds this source. A lost one may still be heard when its network
        is back, and would take away what this one is to hear: raises TakenOver for it."""
        if holder != self._holder:
            raise TakenOver("found a source that another runner has taken over, expected to hold it")
        return await getattr(self, method)(*arguments)

    async def start(self, predictor: Any, number: int = 0, point: GoOn | SourceResume | None = None) -> None:
        """Begin to measure what decisions ask for, and to send it to the predictor of this number.

        point: where another source, which is lost, was; what it had sent is kept here, as far as this one has it too.
        After the loss of everything, frames that the predictor lacks are sent first, as far as the source can give them
        again or they were spooled; FramesLost tells of the others.
        """
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._events = EventQueue[Event | Exception]()
        self._reported = Reported()
        self._outbox = Outbox(predictor, number, keep_bytes=self.keep_bytes, put=self._put)
        self._visits = Visits()
        self._spool = Spool(self.spool, put=self._put)
        self._dropped = 0
        """Frames that were reported as dropped."""
        self._applied = 0
        """Id of the newest Steer that the source has heard of."""
        self._turns = 0
        """Sources that were opened."""
        self._before = AskedBefore()
        self._unlogged: dict[int, tuple[str, str]] = {}
        """Spooled frames that are told of only now, and their scans."""
        self._known: Callable[[int], bool] = lambda frame: False
        """Whether a frame had arrived before everything was lost, for a source that may hand it out once more."""
        if point is None:
            self._open()
        elif isinstance(point, SourceResume):
            self._unlogged = await asyncio.to_thread(unlogged, point)
            self._resume(point)
            self._open(point)
        else:
            await self._go_on(point, lost=True)
        self._say()
        self._looking = asyncio.create_task(self._look_after())

    async def beat(self, reserve: Positions) -> None:
        """The runner lives, and allows this reserve for when it does not."""
        await self._outbox.be_alone(False)
        if self._alone.heard(time.time(), reserve):
            self._say()

    async def adopt(self, run: str, predictor: Any, resume: SourceResume, holder: str = "") -> bool:
        """Go on for another runner (holder) of the same run; False where that is not possible, and another source must.
        The predictor takes what it lacks of what is kept; the next `events` tell what the log lacks."""
        position = resume.position or {}
        if self.folder is None or self.folder.identity != run:
            return False
        mark, steered = int(position.get("told", -1)), resume.newest
        if self._closed or mark < self._reported.forgotten or self._outbox.not_kept or self._applied > steered:
            await self.forgotten()
            return False
        self._holder = holder
        old, self._events = self._events, EventQueue[Event | Exception]()
        for event in self._reported.again(mark, resume, old.drained()):
            self._put(event)
        old.put(TakenOver("another runner hears of it now"))
        await self._outbox.go_on_with(predictor, 0)
        for steer in resume.decisions:
            if isinstance(steer, Steer):
                self._apply(steer)
        await self.beat(())
        return True

    async def position(self) -> dict[str, Any]:
        """Where the source is in its stream, in JSON's types: all that `SourceResume` needs to go on from here."""
        return {
            "source": self.source.position() if offers(self.source, "position") else None,
            "visits": self._visits.scans,
            "steered": self._applied,
            "told": self._reported.mark(),
        }

    def _resume(self, resume: SourceResume) -> None:
        position = resume.position or {}
        self._visits = Visits(position.get("visits"))
        if resume.placed:
            self.source.resume(position["source"], resume.handed.keys())
            self._applied = int(position.get("steered", 0))
            self._apply_all(resume.decisions)
            self._alone.arrived(len(resume.handed))
            return
        self._known = lambda frame: frame in self._unlogged or resume.knows(frame)
        begun, events = self._visits.begun(resume.handed.values(), self._unlogged.values())
        if offers(self.source, "after"):
            self.source.after(begun)
        for event in events:
            self._put(event)
        self._applied = resume.newest
        self._before = AskedBefore(resume.asked, 1 / self.source.frame_rate)
        self._alone.steered(sum(len(positions_of(one)) for one in resume.asked))

    async def go_on(self, source: Any, point: GoOn) -> None:
        """Another source, as it was made, takes the place of the one that fails, and hands out what that would have."""
        self._turns += 1  # whatever the other one still says is not heard
        await asyncio.to_thread(end_quietly, self.source)
        self.source = source
        await self._go_on(point)

    async def _go_on(self, point: GoOn, *, lost: bool = False) -> None:
        """lost: the other one was, and what was kept of its frames."""
        self._dropped = 0
        self._visits = Visits(point.scans)
        await asyncio.to_thread(self.source.resume, point.position, point.arrived)
        self._applied = point.applied
        self._apply_all(point.decisions, point.known)
        self._alone.arrived(len(point.arrived))
        if lost and offers(self.source, "again"):
            await asyncio.to_thread(keep_again, self.source, point, self._outbox.keep)
        self._open()

    def _open(self, resume: SourceResume | None = None) -> None:
        self._turns += 1
        # In the context of this call, from which the predictor's actor learns which worker it is asked from.
        run = contextvars.copy_context().run
        work = (self._pull, self.source, self._turns, resume)
        threading.Thread(target=run, args=work, name="source", daemon=True).start()

    async def go_on_with(self, predictor: Any, number: int) -> list[int]:
        """See Outbox.go_on_with."""
        return await self._outbox.go_on_with(predictor, number)

    async def let_go(self, scan: str) -> None:
        """Keep the chunks of a scan no longer."""
        self._outbox.let_go(scan)

    async def apply(self, steer: Steer) -> None:
        """Tell the source where to measure next; what it has heard already is left out. Positions that it refuses must
        be known, or the campaign waits for them."""
        self._apply(steer)

    def _apply_all(self, decisions: Sequence[Asked], known: int = 0) -> None:
        """known: id of the newest one of which it is known what was refused."""
        for one in decisions:
            if isinstance(one, Steer):
                self._apply(one, known=one.id <= known)
            else:
                self._ask(one)

    def _apply(self, steer: Steer, *, known: bool = False) -> None:
        if steer.id > self._applied:
            self._applied = steer.id
            self._ask(steer, known=known)

    def _ask(self, one: Asked, *, known: bool = False) -> None:
        self._alone.steered(len(positions_of(one)))
        if not self._before.holds(one):
            self._measure(one, known=known)

    def _measure(self, one: Asked, *, known: bool = False) -> None:
        refused = self.source.apply(as_decision(one))
        if refused is not None and len(refused) and not known:
            self._refuse(len(refused), "the source cannot measure there", refused)

    def _ask_what_is_due(self) -> None:
        try:
            for one in self._before.due(time.monotonic()):
                self._measure(one)
        except Exception as error:  # handed on to whoever reads the events
            self._put(error)

    def _report_dropped(self) -> None:
        """Frames that the source measured and will not hand out must be known too."""
        dropped = getattr(self.source, "frames_dropped", 0)
        new, self._dropped = dropped - self._dropped, dropped
        if new > 0:
            live = bool(streams_of(self.source))
            reason = "lost, set aside or thinned: see the streams" if live else "dropped: the predictor was too slow"
            self._refuse(new, reason, np.zeros((0, 2)))

    def _refuse(self, count: int, reason: str, positions: NDArray[np.float64]) -> None:
        self._alone.arrived(count)
        self._before.lost(count)
        where = tuple((float(y), float(x)) for y, x in positions)
        self._put(FrameRefused(time=time.time(), count=count, reason=reason, positions=where))

    def _put_soon(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event | Exception) -> None:
        self._events.put(event)  # of now: another runner may have adopted the source

    async def queues(self) -> dict[str, Any]:
        """What waits here, and how often frames have waited for the runner."""
        kept = {"kept_bytes": self._outbox.kept_bytes, "frames_unspooled": self._spool.failed}
        return kept | {"events_waited": self._events.waited}

    async def events(self) -> list[Event]:
        """What has happened since the last call; waits until there is something."""
        waiting = self._events  # while this call waits, another runner may adopt the source, and has others
        found = await waiting.take()
        for event in found:
            if isinstance(event, Exception):
                raise event
            self._reported.note(event)
        events = [event for event in found if isinstance(event, Event)]
        if offers(self.source, "position"):
            # Both on this thread: no decision comes in between.
            events.append(Standing(time=time.time(), position=self.source.position(), applied=self._applied))
        return events

    async def streams(self) -> dict[str, dict[str, Any]]:
        """Figures of the source's streams, see `Source.streams`."""
        return streams_of(self.source)

    async def _look_after(self) -> None:
        """Report the streams, also where no chunk comes. Go on alone where the runner is lost."""
        last: StreamsReported | None = None
        while not self._closed:
            try:
                streams = {} if self._events.full else streams_of(self.source)
                if (event := report(time.time(), streams, last)) is not None:
                    last = event
                    self._put(event)
                if streams:
                    self._report_dropped()
            except Exception as error:  # handed on to whoever reads the events
                self._put(error)
            self._ask_what_is_due()
            if self._alone.look(time.time()):
                await self._go_on_alone()
            await asyncio.sleep(_LOOK_S)

    async def _go_on_alone(self) -> None:
        await self._outbox.be_alone(True)
        room = self._outbox.kept_bytes < self.keep_bytes // 2 and not self._events.full
        if room and (block := self._alone.block()):
            event = fell_back(block, self._alone)
            self._apply_all([event])
            self._put(event)
        self._say()

    def _say(self) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):  # a disk that takes nothing is no reason to stand still
                say(self.folder.path, self._alone)

    async def close(self) -> None:
        """End the source; what waits for another predictor waits no longer."""
        self.source.close()
        self._closed = True
        self._events.close()
        await self._outbox.close()

    async def forgotten(self) -> None:
        """Nobody holds it any more: another one may be open by now, from which it would take frames away."""
        if hasattr(self, "_outbox"):  # else it has never begun
            self._outbox.given_up = True
            await self.close()

    async def release(self) -> None:
        """End the source, and answer the call that waits for its events: the run has ended."""
        await self.forgotten()
        self._put(RuntimeError("the run has ended"))

    def _pull(self, source: Source, turn: int, resume: SourceResume | None) -> None:
        """The source's own thread: it waits for frames, and until they are with the predictor. What cannot be sent in
        time stays with the source, which drops its oldest and counts."""
        last: Event
        try:
            if resume is not None:
                for chunk in given_again(source, resume, self._unlogged, self._put_soon):
                    if not self._on_loop(self._send_again(chunk)):
                        return
                if resume.ended:
                    return
            self._before.listening(time.monotonic())
            for chunk in source.chunks():
                if not self._on_loop(self._send(chunk, turn)):
                    return
            last = SourceEnded(time=time.time())
        except BaseException as error:  # handed on: who reads the events would wait for an end
            last = failed(source, error)
        self._on_loop(self._end(last, turn))

    async def _end(self, last: Event, turn: int) -> None:
        if turn == self._turns:
            try:
                self._report_dropped()
            except Exception as error:
                last = last if isinstance(last, SourceFailed) else failed(self.source, error)
            self._put(last)

    def _on_loop(self, work: Coroutine[Any, Any, None]) -> bool:
        """Have the event loop do some work, and wait for it; False once the worker is closing."""
        try:
            asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except CancelledError:
            return False
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            work.close()
            return False
        return True

    async def _send(self, chunk: xr.Dataset, turn: int) -> None:
        self._before.busy()
        await self._events.room()
        if turn != self._turns:
            raise RuntimeError("another source has taken the place of this one")  # its thread ends with it
        if (new := not_known(chunk, self._known)) is not None:
            if (event := self._visits.note(new)) is not None:
                self._put(event)
            await self._spool.write(new)
            await self._outbox.deliver(new)
            self._tell(new, new["frame"].values.tolist())
        self._report_dropped()
        self._before.listening(time.monotonic())
        self._ask_what_is_due()

    async def _send_again(self, chunk: xr.Dataset) -> None:
        await self._outbox.deliver(chunk)
        if new := [i for i in chunk["frame"].values.tolist() if i in self._unlogged]:
            self._tell(chunk, new)

    def _tell(self, chunk: xr.Dataset, ids: Sequence[int]) -> None:
        self._alone.arrived(len(ids))
        asked = self._before.came(np.stack([chunk["position_y"].values, chunk["position_x"].values], axis=1))
        self._put(ChunkArrived(time=time.time(), scan=str(chunk.attrs["scan"]), frame_ids=tuple(ids), asked=asked))
