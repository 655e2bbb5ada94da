"""The source's actor: it sends chunks of frames to the predictor, which acknowledges each."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import threading
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import ChunkArrived, DecisionSuggested, Event, FrameRefused, ScanRevisited, SourceEnded
from steering.records import Decision
from steering.sources import Source


@dataclass(frozen=True, kw_only=True)
class Undelivered(Event):
    """A chunk could not be sent to the predictor of this number. The source waits for another predictor."""

    predictor: int
    error: Exception


@dataclass(frozen=True, kw_only=True)
class SourceFailed(Event):
    """The source has raised, or is silent: it hands out nothing more unless another goes on from it."""

    error: Exception
    silent: bool = False
    position: Any = None
    """Its last one, all decisions included; None: it could not say it."""


@dataclass(frozen=True, kw_only=True)
class Standing(Event):
    """Where the source is in its stream, when it had heard of so many decisions."""

    position: Any
    applied: int


@dataclass(frozen=True, kw_only=True)
class GoOn:
    """Where a source, as it was made, goes on."""

    position: Any
    applied: int
    """Decisions that the position includes."""
    decisions: tuple[DecisionSuggested, ...]
    """Those that came after them."""
    handed: dict[str, tuple[int, ...]]
    """Ids of frames that have arrived, of the scans that are still kept."""
    scans: dict[str, str]
    """Names of the scans so far, in their order, and how the source calls each."""


class SourceActor:
    """Runs a source on the worker that has one.

    Chunks are kept until the runner lets go of their scan, up to `keep_bytes` of counts: a predictor that takes the
    place of another is sent them again.
    """

    def __init__(self, source: Source, *, keep_bytes: int = 2**31) -> None:
        self.source = source
        self.keep_bytes = keep_bytes

    async def start(self, predictor: Any, number: int = 0, point: GoOn | None = None) -> None:
        """Begin to measure what decisions ask for, and to send it to the predictor of this number.

        point: where another source, which is lost, was; what it had sent is kept here, as far as this one has it too.
        """
        self._loop = asyncio.get_running_loop()
        self._predictor, self._number = predictor, number
        self._kept: list[xr.Dataset] = []
        self._kept_bytes = 0
        self._not_kept: set[str] = set()
        """Scans that were too large."""
        self._turn = asyncio.Condition()
        self._sending: asyncio.Future | None = None
        self._closed = False
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._visits = Visits()
        self._dropped = 0
        """Frames that were reported as dropped."""
        self._applied = 0
        self._turns = 0
        """Sources that were opened."""
        if point is None:
            self._open()
        else:
            if hasattr(self.source, "again"):
                await asyncio.to_thread(self._keep_again, self.source, point)
            await self.go_on(self.source, point)

    async def go_on(self, source: Any, point: GoOn) -> None:
        """Another source, as it was made, takes the place of the one that fails, and hands out what that would have."""
        self._turns += 1  # whatever the other one still says is not heard
        await asyncio.to_thread(_closed, self.source)
        self.source, self._dropped = source, 0
        self._visits = Visits(point.scans)
        arrived = {i for ids in point.handed.values() for i in ids}
        await asyncio.to_thread(source.resume, point.position, arrived)
        self._applied = point.applied
        for number, decision in enumerate(point.decisions, point.applied + 1):
            await self.apply(decision, number)
        self._open()

    def _open(self) -> None:
        self._turns += 1
        # In the context of this call, from which the predictor's actor learns which worker it is asked from.
        run = contextvars.copy_context().run
        work = (self._pull, self.source, self._turns)
        threading.Thread(target=run, args=work, name="source", daemon=True).start()

    def _keep_again(self, source: Any, point: GoOn) -> None:
        """Keep the frames that have arrived, as far as the source has them; another predictor may need them."""
        other = copy.deepcopy(source)
        other.resume(point.position, {i for ids in point.handed.values() for i in ids})
        for scan, ids in point.handed.items():
            for chunk in other.again(ids):
                chunk.attrs |= {"scan": scan} | ({"visit_of": point.scans[scan]} if point.scans[scan] != scan else {})
                self._keep(chunk)

    async def go_on_with(self, predictor: Any, number: int) -> list[int]:
        """Send another predictor what is kept, and from then on what is measured. Returns the ids of frames sent again.

        Raises RuntimeError where a scan was too large to be kept.
        """
        if self._not_kept:
            raise RuntimeError(
                f"found the predictor lost, and more than {self.keep_bytes} bytes of frames of "
                f"{', '.join(sorted(self._not_kept))}, expected fewer, which are kept for another predictor: raise "
                "PredictorSettings.keep_bytes"
            )
        if self._sending is not None:
            self._sending.cancel()  # the lost one may be there and silent; what it was sent is sent again
        async with self._turn:
            frames: list[int] = []
            for chunk in list(self._kept):
                await predictor.receive(chunk)
                frames += chunk["frame"].values.tolist()
            self._predictor, self._number = predictor, number
            self._turn.notify_all()
            return frames

    async def let_go(self, scan: str) -> None:
        """Keep the chunks of a scan no longer."""
        self._not_kept.discard(scan)
        self._drop(scan)

    def _keep(self, chunk: xr.Dataset) -> None:
        scan = chunk.attrs["scan"]
        if scan in self._not_kept:
            return
        self._kept.append(chunk)
        self._kept_bytes += chunk["counts"].nbytes
        if self._kept_bytes > self.keep_bytes:
            self._drop(scan)
            self._not_kept.add(scan)

    def _drop(self, scan: str) -> None:
        self._kept = [chunk for chunk in self._kept if chunk.attrs["scan"] != scan]
        self._kept_bytes = sum(chunk["counts"].nbytes for chunk in self._kept)

    async def apply(self, decision: DecisionSuggested, number: int) -> None:
        """Tell the source where to measure next; number: of the decision, 1, 2, ...; one that it has heard already is
        left out. Positions that it refuses must be known, or the campaign waits for them."""
        if number <= self._applied:
            return
        self._applied = number
        dwell = None if decision.dwell is None else np.array(decision.dwell)
        refused = self.source.apply(
            Decision(positions=np.array(decision.positions), reasons=decision.reasons, dwell=dwell, stop=decision.stop)
        )
        if refused is not None and len(refused):
            self._refuse(len(refused), "the source cannot measure there", refused)

    def _report_dropped(self) -> None:
        """Frames that the source measured and will not hand out must be known too."""
        new, self._dropped = self.source.frames_dropped - self._dropped, self.source.frames_dropped
        if new > 0:
            self._refuse(new, "dropped: the predictor was too slow", np.zeros((0, 2)))

    def _refuse(self, count: int, reason: str, positions: NDArray[np.float64]) -> None:
        where = tuple((float(y), float(x)) for y, x in positions)
        self._events.put_nowait(FrameRefused(time=time.time(), count=count, reason=reason, positions=where))

    async def events(self) -> list[Event]:
        """What has happened since the last call; waits until there is something."""
        found = [await self._events.get()]
        while not self._events.empty():
            found.append(self._events.get_nowait())
        for event in found:
            if isinstance(event, Exception):
                raise event
        events = [event for event in found if isinstance(event, Event)]
        if hasattr(self.source, "position"):
            # Both on this thread: no decision comes in between.
            events.append(Standing(time=time.time(), position=self.source.position(), applied=self._applied))
        return events

    async def close(self) -> None:
        """End the source; what waits for another predictor waits no longer."""
        self.source.close()
        self._closed = True
        async with self._turn:
            self._turn.notify_all()

    async def release(self) -> None:
        """End the source, and answer the call that waits for its events: the run has ended."""
        await self.close()
        self._events.put_nowait(RuntimeError("the run has ended"))

    def _pull(self, source: Source, turn: int) -> None:
        """The source's own thread. It waits for frames, so that the event loop need not, and then until they are with
        the predictor: what cannot be sent in time stays with the source, which drops its oldest and counts."""
        last: Event
        try:
            for chunk in source.chunks():
                if not self._on_loop(self._send(chunk, turn)):
                    return
            last = SourceEnded(time=time.time())
        except Exception as error:  # handed on to whoever reads the events
            last = SourceFailed(time=time.time(), error=error, position=_position(source))
        self._on_loop(self._end(last, turn))

    async def _end(self, last: Event, turn: int) -> None:
        if turn == self._turns:
            self._report_dropped()
            self._events.put_nowait(last)

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
        if turn != self._turns:
            raise RuntimeError("another source has taken the place of this one")  # its thread ends with it
        event = self._visits.note(chunk)
        if event is not None:
            self._events.put_nowait(event)
        await self._deliver(chunk)
        ids = tuple(chunk["frame"].values.tolist())
        self._events.put_nowait(ChunkArrived(time=time.time(), scan=str(chunk.attrs["scan"]), frame_ids=ids))
        self._report_dropped()

    async def _deliver(self, chunk: xr.Dataset) -> None:
        """One at a time: the next is sent when this one is acknowledged, so that they arrive in order."""
        async with self._turn:
            self._keep(chunk)
            number = self._number
            self._sending = sending = asyncio.ensure_future(_send_to(self._predictor, chunk))
            await asyncio.wait({sending})
            if sending.cancelled():
                error: BaseException | None = None
            elif (error := sending.exception()) is None:
                return
            if isinstance(error, Exception):  # handed on to whoever reads the events, and who knows what to do
                self._events.put_nowait(Undelivered(time=time.time(), predictor=number, error=error))
            await self._turn.wait_for(lambda: self._number != number or self._closed)


async def _send_to(predictor: Any, chunk: xr.Dataset) -> None:
    """Where the worker is known to be gone, already the name of the method raises: here inside the future."""
    await predictor.receive(chunk)


def _position(source: Any) -> Any:
    """Where a source that has failed is; None where it cannot say."""
    try:
        return source.position()
    except Exception:
        return None


def _closed(source: Source) -> None:
    """End a source that has failed, and may fail in this too."""
    with contextlib.suppress(Exception):
        source.close()


class Visits:
    """Names the scans of a source apart. A scan is over when a chunk of another one comes; where the source comes back
    to its name, that is a new scan: a visit, which is called `NAME-visit-2`, `NAME-visit-3` and so on."""

    def __init__(self, scans: Mapping[str, str] | None = None) -> None:
        """scans: names of the scans so far, in their order, and how the source calls each."""
        present: tuple[str, str | None] = list(scans.items())[-1] if scans else ("", None)
        self._called, self._name = present
        """The present scan as it is called here, and as the source says it."""
        self._used = set(scans or ())

    def note(self, chunk: xr.Dataset) -> ScanRevisited | None:
        """Rename the chunk's scan where it is a visit, and keep its own name as the attribute `visit_of`. Returns the
        event with the first chunk of a visit."""
        name = str(chunk.attrs["scan"])
        begins = name != self._name
        if begins:
            self._name, self._called = name, name
            number = 2
            while self._called in self._used:
                self._called, number = f"{name}-visit-{number}", number + 1
            self._used.add(self._called)
        if self._called == name:
            return None
        chunk.attrs |= {"scan": self._called, "visit_of": name}
        return ScanRevisited(time=time.time(), scan=name, visit=self._called) if begins else None
