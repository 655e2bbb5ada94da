"""What the source's actor and the runner tell each other: where a source is and where one goes on; names of scans."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr

from steering.campaign import Event, FellBack, ScanRevisited, Steer
from steering.campaign.unmeasured import Asked
from steering.records import scan_name
from steering.sources import Source


class TakenOver(RuntimeError):
    """Another runner holds the source: this one was lost, and is heard late."""


@dataclass(frozen=True, kw_only=True)
class SourceResume:
    """What a source's actor needs that goes on after the loss of everything."""

    position: Mapping[str, Any] | None
    """As `SourceActor.position` returned it; None: the source has none, and begins anew."""
    decisions: tuple[Steer | FellBack, ...] = ()
    """What may not have reached the source by then, in order, and what it has measured by itself since then."""
    handed: Mapping[int, str] = field(default_factory=dict)
    """Frames that the log knows to have arrived since then, and the scan of each."""
    there: Container[int] = frozenset()
    """All frames that the predictor does not lack: it has them, or has set them aside, or they are known as lost."""
    over: tuple[str, ...] = ()
    """Scans that are saved: nobody needs their frames."""
    asked: tuple[Asked, ...] = ()
    """Of all that was decided, what has brought no frame, in order: for a source that cannot say its position."""
    frames: int = 0
    """That had arrived in all."""
    ended: bool = False
    """The source had no further frame."""
    logged: frozenset[float] = frozenset()
    """Times of the other events of the source that the log has since then."""
    spooled: Path | None = None
    """Where the frames are that were spooled."""

    def knows(self, frame: int) -> bool:
        """Whether a frame had arrived, as far as checkpoint and log know."""
        return frame in self.handed or frame in self.there

    @property
    def placed(self) -> bool:
        """Whether the source goes on from a position of its own."""
        return (self.position or {}).get("source") is not None

    @property
    def newest(self) -> int:
        """Id of the newest Steer that checkpoint or log know of."""
        known = [one.id for one in self.decisions if isinstance(one, Steer)]
        return max([int((self.position or {}).get("steered", 0)), *known])


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
    """Where the source is in its stream, when the newest that it had heard of was this Steer, by its id."""

    position: Any
    applied: int


@dataclass(frozen=True, kw_only=True)
class GoOn:
    """Where a source, as it was made, goes on."""

    position: Any
    applied: int
    """Id of the newest Steer that the position includes."""
    decisions: tuple[Steer | FellBack, ...]
    """Those that came after it."""
    handed: dict[str, tuple[int, ...]]
    """Ids of frames that have arrived, of the scans that are still kept."""
    arrived: frozenset[int]
    """Of all frames that have arrived since this position, and of those."""
    known: int
    """Id of the newest Steer of which the runner knows what the source refused."""
    scans: dict[str, str]
    """Names of the scans so far, in their order, and how the source calls each."""


class Visits:
    """Names the scans of a source apart, and as folders can be named (`scan_name`), before their first frame is used. A
    scan is over when a chunk of another one comes; where the source comes back to its name, that is a new scan: a
    visit, which is called `NAME-visit-2`, `NAME-visit-3` and so on."""

    def __init__(self, scans: Mapping[str, str] | None = None) -> None:
        """scans: names of the scans so far, in their order, and how the source calls each."""
        self.scans = dict(scans or {})
        """The last one is the present scan."""

    def begun(self, logged: Iterable[str], spooled: Iterable[tuple[str, str]]) -> tuple[list[str], list[ScanRevisited]]:
        """All scans that have begun, as the source calls them; and what is to be told of those that only a spool knows.

        logged: names since `scans` was known. spooled: after those, a name and how the source calls it.
        """
        since = [name for name in dict.fromkeys(logged) if name not in self.scans]
        found = [each for each in dict.fromkeys(spooled) if each[0] not in (*self.scans, *since)]
        names = [*self.scans.values(), *since, *(own for _, own in found)]
        self.scans.update(found)
        return names, [ScanRevisited(time=time.time(), scan=own, visit=scan) for scan, own in found if own != scan]

    def note(self, chunk: xr.Dataset) -> ScanRevisited | None:
        """Rename the chunk's scan where it is a visit, or has a name that no folder can have, and keep its own name as
        the attribute `visit_of`. Returns the event with the first chunk of such a scan."""
        name = str(chunk.attrs["scan"])
        called, present = next(reversed(self.scans.items()), ("", None))
        begins = name != present
        if begins:
            called, number = scan_name(name), 2
            while called in self.scans:
                called, number = scan_name(f"{scan_name(name)}-visit-{number}"), number + 1
            self.scans[called] = name
        if called == name:
            return None
        chunk.attrs |= {"scan": called, "visit_of": name}
        return ScanRevisited(time=time.time(), scan=name, visit=called) if begins else None


def failed(source: Source, error: BaseException) -> SourceFailed:
    """What tells that a source has raised, with where it is, as far as it can say that."""
    position = None
    with contextlib.suppress(Exception):
        position = source.position()
    # What ends a process, as sys.exit() does, ends the run with words: it would end whoever hears of it.
    said = error if isinstance(error, Exception) else RuntimeError(f"the source left by {error!r}")
    return SourceFailed(time=time.time(), error=said, position=position)


def streams_of(source: Source) -> dict[str, dict[str, Any]]:
    """Figures of a source's streams; one of your own need not have any."""
    return {name: dict(figures) for name, figures in getattr(source, "streams", {}).items()}


def end_quietly(source: Source) -> None:
    """End a source that has failed, and may fail in this too."""
    with contextlib.suppress(Exception):
        source.close()
