"""What every event has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at `time`, seconds since the epoch."""

    time: float


@dataclass(frozen=True, kw_only=True)
class Answer(Event):
    """The answer to one action of the campaign. One that fits no open action changes nothing."""

    action: int | None = None
    """Id of the action; None: the campaign did not ask for it."""
    generation: int = 0
    """Of the group of ranks when it was answered."""
