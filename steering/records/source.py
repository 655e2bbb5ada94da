"""The contract of a source: it measures frames at the positions that decisions ask for, and yields them in chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.records.canvas import Canvas
from steering.records.decisions import Decision
from steering.records.geometry import Field, Geometry
from steering.records.optional_parts import optional


class Source(Protocol):
    """The contract of a source, which may be a class of your own, in a workflow file or in a module beside it.

    Pickling. A source is made in the driver and pickled (by cloudpickle where it must be) to the worker with the
    resource `source`, before chunks() is called; afterwards it stays there and need not pickle any more. What cannot be
    pickled, such as sockets, threads and open files, is opened in chunks().

    Threads. chunks() is iterated in one thread of that worker. `apply` and `close` are called from another one, also
    before chunks() and while it waits, and return at once; `frames_dropped` may be read from any thread. The attributes
    do not change once the source is made.

    All but `streams`, `frames_dropped`, `position`, `resume`, `again` and `after` must be there; a class that inherits
    from this one has the defaults of `scans`, `frames` and `truth`.
    """

    geometry: Geometry
    probe: NDArray[np.complex64]
    """(mode, y, x), scaled so that sum |probe|^2 is the counts of a frame on a transparent object."""
    field: Field
    """Limits of the probe's centre, in geometry.length_unit."""
    candidates: NDArray[np.float64]
    """(n, 2) of (y, x) in geometry.length_unit, which a policy may choose from."""
    frame_rate: float
    """Frames per second, for a decision that does not say how long to stay."""
    scans: Sequence[str] = ()
    """Names of the scans to come, in their order; empty where that is not known beforehand."""
    frames: int | None = None
    """How many frames are to come in all at most; None where that is not known."""

    @property
    def streams(self) -> Mapping[str, Mapping[str, Any]]:
        """Figures of the streams that a live source joins, by name, for the display and the summary: received, joined,
        waiting, dropped by reason, lost, interpolated, silent_s, listens_s. A source without streams need not define
        it."""
        return {}

    @property
    def frames_dropped(self) -> int:
        """Frames measured that the consumer of chunks() was too slow to take: a detector never waits. They count as
        acquired, and are reported as dropped. A source that leaves none out need not define it."""
        return 0

    @abstractmethod
    def chunks(self) -> Iterator[xr.Dataset]:
        """Measure what decisions ask for; yield chunks, each made by `make_chunk`, until the scans end. Called once.

        A chunk belongs to one scan, whose name it carries; another name begins another scan. Frame ids are unique in a
        run. An exception ends the run with its message. Where the source can go on elsewhere (it has `position` and
        `resume`), OSError and EOFError, by which what is outside fails, do not: after a rest a new copy of it goes on
        from where this one was, and so where no frame comes for `Experiment.silent_s` although positions are due.
        """

    @abstractmethod
    def apply(self, decision: Decision) -> NDArray[np.float64] | None:
        """Queue the positions of a decision, to be measured in their order, and wake a waiting chunks().

        With `stop` the scan number `decision.scan`, or where that is None the one that is measured now, is over after
        them: where another one is measured by then, stop means nothing. Returns the positions (m, 2) of which no frame
        will come, so that the campaign does not wait for them; None: all are queued. An exception ends the run.
        """

    @abstractmethod
    def close(self) -> None:
        """End all: chunks() hands out what was measured by now and ends. May be called twice."""

    def truth(self, scan: str) -> tuple[NDArray[np.complex64], Canvas] | None:
        """The object (Y, X) of a scan and where it lies; None where it is not known. Used to report errors only."""
        return None

    # What follows is optional. With the first three a run that was lost with all its processes goes on where it was.

    @optional
    def position(self) -> Mapping[str, Any]:
        """Where the source is in its stream, in JSON's types: what it has handed out, and what is queued. The newest
        chunk counts as not handed out until the next one is asked for."""

    @optional
    def resume(self, position: Mapping[str, Any], handed: Collection[int]) -> None:
        """On a new source, before anything else is called: go on from what `position` returned elsewhere.

        The decisions since then come by `apply` after this. handed: ids of frames that were handed out since then, as
        far as known; chunks() does not yield these, nor any before them. Raises ValueError for a position that does not
        fit this source.
        """

    @optional
    def again(self, ids: Sequence[int]) -> Iterator[xr.Dataset]:
        """Frames that were handed out before, once more, as chunks; those that it does not have are left out. Called
        in any thread, also before chunks()."""

    @optional
    def after(self, scans: Sequence[str]) -> None:
        """On a new source that has no `position`, before anything else is called: the scans that had begun when the run
        was lost, as this source called them, in their order. The newest may be going on."""
