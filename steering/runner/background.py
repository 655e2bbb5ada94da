"""Work that goes on beside other work: the first failure of any of it ends all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from steering.runner.actors import retrieved

T = TypeVar("T")


class Background:
    """The work of a run that goes on beside its main line."""

    def __init__(self) -> None:
        self._jobs: set[asyncio.Task] = set()
        self._failed: asyncio.Future | None = None
        """Raises what ends the run early."""

    def begin(self) -> None:
        """From now on failures count. In the event loop of the work."""
        self._failed = asyncio.get_running_loop().create_future()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work beside."""
        job = asyncio.ensure_future(self._guarded(work))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # raised again by `unless_failed`
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Have `unless_failed` raise this error, if it is the first."""
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # it may come when nobody waits any more

    async def unless_failed(self, work: Awaitable[T]) -> T:
        """The result of some work; raises at once what any other part of the run has raised."""
        job = asyncio.ensure_future(work)
        if self._failed is None:
            raise RuntimeError("found a run that has not begun, expected `run` to be called")
        try:
            await asyncio.wait({job, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            return job.result()
        finally:
            job.cancel()
            job.add_done_callback(retrieved)

    def cancel(self) -> None:
        """End all of it."""
        for job in self._jobs:
            job.cancel()
