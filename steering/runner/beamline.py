"""The source's actor: frames go straight from here to the predictor, each acknowledged."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import xarray as xr

from steering.campaign import ChunkArrived, DecisionSuggested, Event, FrameRefused, SourceEnded
from steering.records import Decision
from steering.sources import Source


class Beamline:
    """Runs a source on the worker that has one."""

    def __init__(self, source: Source) -> None:
        self.source = source

    async def start(self, predictor: Any) -> None:
        """Begin to measure what decisions ask for, and to send it to the predictor."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._chunks: asyncio.Queue[xr.Dataset | Exception | None] = asyncio.Queue(1)
        self._refused: dict[str, int] = {}
        self.frames = 0
        self.first = self.last = 0.0
        threading.Thread(target=self._pull, name="source", daemon=True).start()
        self._sender = asyncio.create_task(self._send(predictor))

    async def apply(self, decision: DecisionSuggested) -> None:
        """Tell the source where to measure next."""
        dwell = None if decision.dwell is None else np.array(decision.dwell)
        self.source.apply(
            Decision(positions=np.array(decision.positions), reasons=decision.reasons, dwell=dwell, stop=decision.stop)
        )
        self._tell_refused()

    def _tell_refused(self) -> None:
        """Positions that will bring no frame must be known, or the campaign waits for them."""
        counts = {
            "no recorded frame within the tolerance": getattr(self.source, "positions_refused", 0),
            "dropped: the predictor was too slow": self.source.frames_dropped,
        }
        for reason, count in counts.items():
            new = count - self._refused.get(reason, 0)
            if new > 0:
                self._refused[reason] = count
                self._events.put_nowait(FrameRefused(time=time.time(), count=new, reason=reason))

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
        }

    async def close(self) -> None:
        """End the source."""
        self.source.close()

    def _pull(self) -> None:
        """The source's own thread: it waits for frames, so that the event loop need not. It hands them on one by one:
        what cannot be sent in time stays with the source, which drops its oldest and counts."""
        last: Exception | None = None
        try:
            for chunk in self.source.chunks():
                if not self._hand_over(chunk):
                    return
        except Exception as error:  # handed on to whoever reads the events
            last = error
        self._hand_over(last)

    def _hand_over(self, thing: xr.Dataset | Exception | None) -> bool:
        """False once the worker is closing: nobody waits for it any more."""
        put = self._chunks.put(thing)
        try:
            asyncio.run_coroutine_threadsafe(put, self._loop).result()
        except CancelledError:
            return False
        except RuntimeError:  # the loop is closed already
            put.close()
            return False
        return True

    async def _send(self, predictor: Any) -> None:
        while (chunk := await self._chunks.get()) is not None:
            if isinstance(chunk, Exception):
                self._events.put_nowait(chunk)
                return
            try:
                # One at a time: the next is sent when this one is acknowledged, so that they arrive in order.
                await predictor.receive(chunk)
            except Exception as error:  # handed on to whoever reads the events
                self._events.put_nowait(error)
                return
            now = time.time()
            self.first = self.first or now
            self.last = now
            self.frames += chunk.sizes["frame"]
            ids = tuple(chunk["frame"].values.tolist())
            self._events.put_nowait(ChunkArrived(time=now, scan=str(chunk.attrs["scan"]), frame_ids=ids))
            self._tell_refused()
        self._events.put_nowait(SourceEnded(time=time.time()))
