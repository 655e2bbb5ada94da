"""The source's actor: it sends chunks of frames to the predictor, which acknowledges each."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import (
    ChunkArrived,
    DecisionSuggested,
    Event,
    FrameRefused,
    ScanRevisited,
    SourceEnded,
    StreamsReported,
)
from steering.records import Decision
from steering.runner.streams import report
from steering.sources import Source

_LOOK_S = 1.0
"""Between two looks at the streams."""


@dataclass(frozen=True, kw_only=True)
class Undelivered(Event):
    """A chunk could not be sent to the predictor of this number. The source waits for another predictor."""

    predictor: int
    error: Exception


class SourceActor:
    """Runs a source on the worker that has one.

    Chunks are kept until the runner lets go of their scan, up to `keep_bytes` of counts: a predictor that takes the
    place of another is sent them again.
    """

    def __init__(self, source: Source, *, keep_bytes: int = 2**31) -> None:
        self.source = source
        self.keep_bytes = keep_bytes

    async def start(self, predictor: Any) -> None:
        """Begin to measure what decisions ask for, and to send it to the predictor, which is number 0."""
        self._loop = asyncio.get_running_loop()
        self._predictor, self._number = predictor, 0
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
        self.frames = 0
        self.first = self.last = 0.0
        threading.Thread(target=self._pull, name="source", daemon=True).start()
        self._reporting = asyncio.create_task(self._report_streams())

    async def go_on_with(self, predictor: Any, number: int) -> int:
        """Send another predictor what is kept, and from then on what is measured. Returns the frames sent again.

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
            frames = 0
            for chunk in list(self._kept):
                await predictor.receive(chunk)
                frames += chunk.sizes["frame"]
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

    async def apply(self, decision: DecisionSuggested) -> None:
        """Tell the source where to measure next. Positions that it refuses must be known, or the campaign waits for
        them."""
        dwell = None if decision.dwell is None else np.array(decision.dwell)
        refused = self.source.apply(
            Decision(positions=np.array(decision.positions), reasons=decision.reasons, dwell=dwell, stop=decision.stop)
        )
        if refused is not None and len(refused):
            self._refuse(len(refused), "the source cannot measure there", refused)

    def _report_dropped(self) -> None:
        """Frames that the source measured and will not hand out must be known too."""
        dropped = self.source.frames_dropped
        new, self._dropped = dropped - self._dropped, dropped
        if new > 0:
            live = bool(self._streams())
            reason = "lost, set aside or thinned: see the streams" if live else "dropped: the predictor was too slow"
            self._refuse(new, reason, np.zeros((0, 2)))

    def _refuse(self, count: int, reason: str, positions: NDArray[np.float64]) -> None:
        where = tuple((float(y), float(x)) for y, x in positions)
        self._events.put_nowait(FrameRefused(time=time.time(), count=count, reason=reason, positions=where))

    async def events(self) -> list[Event]:
        """What has happened since the last call; waits until there is something. Raises what the source raised."""
        found = [await self._events.get()]
        while not self._events.empty():
            found.append(self._events.get_nowait())
        for event in found:
            if isinstance(event, Exception):
                raise event
        return [event for event in found if isinstance(event, Event)]

    async def figures(self) -> dict[str, Any]:
        """What the source has to say in numbers."""
        return {
            "frames_acquired": self.frames + self.source.frames_dropped,
            "frames_dropped": self.source.frames_dropped,
            "acquire_s": self.last - self.first,
            "streams": self._streams(),
        }

    def _streams(self) -> dict[str, dict[str, Any]]:
        """Figures of the source's streams; a source of one's own need not have any."""
        return {name: dict(figures) for name, figures in getattr(self.source, "streams", {}).items()}

    async def _report_streams(self) -> None:
        """Also while no chunk comes: a stream that is silent must be known."""
        last: StreamsReported | None = None
        while not self._closed:
            streams = self._streams()
            event = report(time.time(), streams, last)
            if event is not None:
                last = event
                self._events.put_nowait(event)
            if streams:
                self._report_dropped()
            await asyncio.sleep(_LOOK_S)

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

    def _pull(self) -> None:
        """The source's own thread. It waits for frames, so that the event loop need not, and then until they are with
        the predictor: what cannot be sent in time stays with the source, which drops its oldest and counts."""
        last: Event | Exception
        try:
            for chunk in self.source.chunks():
                if not self._on_loop(self._send(chunk)):
                    return
            last = SourceEnded(time=time.time())
        except Exception as error:  # handed on to whoever reads the events
            last = error
        self._on_loop(self._events.put(last))

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

    async def _send(self, chunk: xr.Dataset) -> None:
        event = self._visits.note(chunk)
        if event is not None:
            self._events.put_nowait(event)
        await self._deliver(chunk)
        now = time.time()
        self.first = self.first or now
        self.last = now
        self.frames += chunk.sizes["frame"]
        ids = tuple(chunk["frame"].values.tolist())
        self._events.put_nowait(ChunkArrived(time=now, scan=str(chunk.attrs["scan"]), frame_ids=ids))
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


class Visits:
    """Names the scans of a source apart. A scan is over when a chunk of another one comes; where the source comes back
    to its name, that is a new scan: a visit, which is called `NAME-visit-2`, `NAME-visit-3` and so on."""

    def __init__(self) -> None:
        self._name: str | None = None
        """As the source says it."""
        self._called: str = ""
        """And as it is called here."""
        self._used: set[str] = set()

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
