"""When a job needs another one in its place: pure decisions, from what the batch system says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.clusters.job_states import JobState
from steering.clusters.roles import INFERENCE

FAILURES = 3
"""Jobs in a row that end before their worker has come, after which a place is given up."""

LAST_S = 20.0
"""So long before its end a job lays down its roles, also where its successor still waits in the queue."""

Next = Literal["keep", "replace", "give up"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One job that a run wants to have at all times, whichever job it is by now."""

    kind: str
    """trainer, inference or beamline."""
    number: int
    processes: int = 1
    attempt: int = 0
    """How many jobs had the place before."""
    job: str = ""
    """Its id."""
    came: bool = False
    """Whether the worker of this job has been there."""
    failures: int = 0
    """Jobs in a row, up to the one before, whose worker never came."""
    lead: float | None = None
    """Seconds before its end at which its successor is submitted; None before it runs."""

    @property
    def name(self) -> str:
        """Of its worker; a job that follows another one in the same place has a name of its own."""
        return f"{self.kind}-{self.number}" + (f".{self.attempt}" if self.attempt else "")


def lead(state: JobState | None, now: float, handover: float) -> float | None:
    """How long before its end the successor of a job is submitted: half of its time at most, or successors of short
    jobs would be submitted at once, one after the other."""
    return None if state is None or state.ends is None else min(handover, (state.ends - now) / 2)


def due(place: Place, state: JobState | None, now: float) -> Next:
    """What a place needs. state: of its job; None: the batch system does not have it any more."""
    if state is None:
        return "give up" if not place.came and place.failures + 1 >= FAILURES else "replace"
    near = state.ends is not None and place.lead is not None and now >= state.ends - place.lead
    return "replace" if near else "keep"


def lays_down(kind: str, state: JobState | None, now: float, *, heir: bool) -> bool:
    """Whether the workers of a job whose successor is submitted lay down their roles, so that what they do is handed
    over. heir: whether the successor's workers are there.

    Where they are not, what can be kept for them is written before the end is near; the predictor goes on predicting
    until it is lost, for all that it knows others know too.
    """
    near = state is not None and state.ends is not None and state.ends - now <= LAST_S
    return heir or (near and kind != INFERENCE)


def successor(place: Place) -> Place:
    """The same place with the next job in it, which is to be submitted."""
    failures = 0 if place.came else place.failures + 1
    return Place(
        kind=place.kind,
        number=place.number,
        processes=place.processes,
        attempt=place.attempt + 1,
        failures=failures,
    )
