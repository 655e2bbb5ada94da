"""Events on their way to the runner: none is refused, and yet there is a bound."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")

MOST_WAITING = 10_000
"""Events that may wait for the runner before no further frame is taken: minutes of a detector, some tens of MB."""


class EventQueue(Generic[T]):
    """Events that wait until somebody asks for them, in one event loop.

    Each says what has happened, so none is dropped. The bound holds where frames come in: whoever takes frames waits
    for `room` first. While nobody listens frames stay with their source, which drops its oldest and counts them.
    """

    def __init__(self, most: int = MOST_WAITING, *, heard: bool = True) -> None:
        """most: from how many that wait on there is no room for frames. heard: False where somebody will listen only
        when all is here that is sent again; until then there is room."""
        self.most = most
        self._heard = heard
        self.waited = 0
        """How often frames have waited for room."""
        self._events: asyncio.Queue[T] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    def __len__(self) -> int:
        return self._events.qsize()

    @property
    def full(self) -> bool:
        """Whether frames have to wait."""
        return not self._room.is_set()

    def put(self, event: T) -> None:
        """Add an event."""
        self._events.put_nowait(event)
        if len(self) >= self.most and self._heard and not self._closed:
            self._room.clear()

    async def room(self) -> None:
        """Wait until frames may come in."""
        self.waited += self.full
        await self._room.wait()

    async def take(self) -> list[T]:
        """All that wait, at least one."""
        self._heard = True
        return [await self._events.get(), *self.drained()]

    def drained(self) -> list[T]:
        """All that wait now."""
        found = [self._events.get_nowait() for _ in range(len(self))]
        self._room.set()
        return found

    def close(self) -> None:
        """Nobody waits for room any more: no further frame will come, or nobody is left to hear of it."""
        self._closed = True
        self._room.set()
