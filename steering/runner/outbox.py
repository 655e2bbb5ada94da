"""Chunks on their way from the source to the predictor, which acknowledges each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import xarray as xr

from steering.campaign import Event
from steering.runner.source_events import Undelivered


class Outbox:
    """Sends chunks one after the other, and keeps them until the runner lets go of their scan, up to `keep_bytes` of
    counts: a predictor that takes the place of another is sent them again."""

    def __init__(self, predictor: Any, number: int, *, keep_bytes: int, put: Callable[[Event], None]) -> None:
        """predictor: of this number. put: where Undelivered goes."""
        self.keep_bytes = keep_bytes
        self.kept: list[xr.Dataset] = []
        self.kept_bytes = 0
        self.not_kept: set[str] = set()
        """Scans that were too large."""
        self.given_up = False
        """Another source sends all of it: nothing is sent from here."""
        self._predictor, self._number = predictor, number
        self._put = put
        self._turn = asyncio.Condition()
        self._sending: asyncio.Future | None = None
        self._alone = self._closed = False

    async def deliver(self, chunk: xr.Dataset) -> None:
        """Send a chunk; returns when the predictor has acknowledged it, or, where it is lost, when another one was sent
        it too. One at a time, so that they arrive in order. Alone nobody waits for another predictor."""
        async with self._turn:
            self.keep(chunk)
            predictor, number = self._predictor, self._number
            self._sending = sending = asyncio.ensure_future(_send_to(predictor, chunk))
            await asyncio.wait({sending})
            if sending.cancelled():
                error: BaseException | None = None
            elif (error := sending.exception()) is None:
                return
            if isinstance(error, Exception):  # handed on to whoever reads the events, and who knows what to do
                self._put(Undelivered(time=time.time(), predictor=number, error=error))
            await self._turn.wait_for(lambda: self._predictor is not predictor or self._closed or self._alone)

    async def go_on_with(self, predictor: Any, number: int) -> list[int]:
        """Send another predictor what is kept, and from then on what is measured. Returns the ids of frames sent again.

        Raises RuntimeError where a scan was too large to be kept.
        """
        if self.not_kept:
            raise RuntimeError(
                f"found the predictor lost, and more than {self.keep_bytes} bytes of frames of "
                f"{', '.join(sorted(self.not_kept))}, expected fewer, which are kept for another predictor: raise "
                "PredictorSettings.keep_bytes"
            )
        if self._sending is not None:
            self._sending.cancel()  # the lost one may be there and silent; what it was sent is sent again
        async with self._turn:
            frames: list[int] = []
            for chunk in list(self.kept):
                if self.given_up:
                    break
                await predictor.receive(chunk)
                frames += chunk["frame"].values.tolist()
            self._predictor, self._number = predictor, number
            self._turn.notify_all()
            return frames

    async def be_alone(self, alone: bool) -> None:
        """Wait for no other predictor where the runner is lost: it is the runner that would bring one, and a predictor
        that went with it may never answer. What is kept is sent to the next one."""
        self._alone = alone
        if alone and self._sending is not None:
            self._sending.cancel()
        await self._wake()

    async def close(self) -> None:
        """What waits for another predictor waits no longer. One that comes is still sent what is kept: when all is
        measured the last work on a run goes on."""
        self._closed = True
        await self._wake()

    async def _wake(self) -> None:
        async with self._turn:
            self._turn.notify_all()

    def let_go(self, scan: str) -> None:
        """Keep the chunks of a scan no longer."""
        self.not_kept.discard(scan)
        self._drop(scan)

    def keep(self, chunk: xr.Dataset) -> None:
        """Keep a chunk, and where its scan is too large by now, none of it."""
        scan = chunk.attrs["scan"]
        if scan in self.not_kept:
            return
        self.kept.append(chunk)
        self.kept_bytes += chunk["counts"].nbytes
        if self.kept_bytes > self.keep_bytes:
            self._drop(scan)
            self.not_kept.add(scan)

    def _drop(self, scan: str) -> None:
        self.kept = [chunk for chunk in self.kept if chunk.attrs["scan"] != scan]
        self.kept_bytes = sum(chunk["counts"].nbytes for chunk in self.kept)


async def _send_to(predictor: Any, chunk: xr.Dataset) -> None:
    """Where the worker is known to be gone, already the name of the method raises: here inside the future."""
    await predictor.receive(chunk)
