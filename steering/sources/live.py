"""A live source: frames of a detector, joined with their positions in a process of its own, and steered."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.records import Canvas, Decision, Field, Geometry, make_chunk
from steering.sources.beam import NO_BEAM, BeamSettings
from steering.sources.join import NO_LOSS, UNREADABLE
from steering.sources.motion import Motion
from steering.sources.plan import Batch, Plan
from steering.sources.streams import FRAMES, POSITIONS, Began, Companion, JoinSettings, Stream
from steering.sources.window import Window

logger = logging.getLogger(__name__)

_END_S = 10.0
"""Seconds that the receiving process may take to end, beyond what its motion takes to close."""
STUCK_S = 120.0
"""Seconds without a word from the receiving process, which says something twice a second, once it has begun."""
SCAN_IDS = 10**9
"""A frame's id is its number plus so much for each scan before its own."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Where a live source gets its frames and positions from, and where it sends decisions."""

    frames: Stream
    positions: Stream
    positions_are: Companion = field(default_factory=lambda: Companion(name=POSITIONS, width=2))
    """Samples of a frame, and the gap that is interpolated."""
    motion: Motion | None = None
    """None: the beamline scans by itself, and decisions are not carried out."""
    monitors: tuple[tuple[Companion, Stream], ...] = ()

    def named(self) -> dict[str, Stream]:
        """All that are listened to, by name, the frames first."""
        beside = ((self.positions_are, self.positions), *self.monitors)
        return {FRAMES: self.frames, **{companion.name: stream for companion, stream in beside}}


@dataclass(frozen=True, kw_only=True)
class LiveSourceSettings:
    """How a live source joins, waits and ends."""

    join: JoinSettings = field(default_factory=JoinSettings)
    scans: int | None = 1
    """Scans to measure; None: until the stream says that no more will come, or the run is stopped."""
    beam: BeamSettings = field(default_factory=BeamSettings)
    """Below what the beam counts as away: such frames are set aside, and measured again where they can be."""
    chunk_frames: int = 10
    give_up_s: float = 10.0
    """Seconds without a frame after which positions that were asked for count as lost, and others may be asked for."""
    end_s: float | None = 300.0
    """Seconds without a frame after which the run ends with an error; None: never."""
    going_on: Began | None = None
    """Of a scan that another source has begun (its `goes_on`): stream2 says once only how it is called, and what pixels
    are bad."""
    truths: Mapping[str, NDArray[np.complex64]] = field(default_factory=dict)
    """Objects (Y, X) of test samples that are known, by the scan's name, in the order of the scans: to report errors.
    Position (0, 0) lies at the middle pixel (Y // 2, X // 2)."""

    def __post_init__(self) -> None:
        if not self.give_up_s > self.join.wait_s or self.chunk_frames < 1:
            raise ValueError(
                f"found give_up_s={self.give_up_s}, chunk_frames={self.chunk_frames}; expected more than "
                f"join.wait_s={self.join.wait_s}, after which a missing frame is lost, and 1 or more"
            )


class LiveSource:
    """A source for any protocol of which there are `Streams`. What its attributes mean: see the contract, `Source`.

    `streams` holds the figures of each stream, which add up: received = joined + dropped + waiting.
    """

    scans: Sequence[str] = ()
    frames: int | None = None

    def __init__(
        self,
        streams: Streams,
        *,
        window: Window,
        geometry: Geometry,
        probe: NDArray[np.complex64],
        candidates: NDArray[np.float64],
        frame_rate: float = 100.0,
        settings: LiveSourceSettings | None = None,
    ) -> None:
        """window: how frames are cut; its size is the geometry's. probe: (m, N, N), in counts. candidates: (n, 2)."""
        if geometry.shape != (window.size, window.size) or probe.shape[-2:] != geometry.shape:
            raise ValueError(
                f"found a window of {window.size} pixels, a geometry of {geometry.shape} and a probe of "
                f"{probe.shape[-2:]}, expected one size for all"
            )
        self.settings = settings or LiveSourceSettings()
        self.geometry = geometry
        self.probe = np.asarray(probe, np.complex64)
        self.candidates = np.asarray(candidates, np.float64)
        low, high = self.candidates.min(0), self.candidates.max(0)
        self.field = Field(float(low[0]), float(high[0]), float(low[1]), float(high[1]))
        self.frame_rate = frame_rate
        self.scans = tuple(self.settings.truths)
        self.plan = Plan(
            frames=streams.frames,
            companions=((streams.positions_are, streams.positions), *streams.monitors),
            motion=streams.motion,
            window=window,
            settings=self.settings.join,
            going_on=self.settings.going_on,
            beam=self.settings.beam,
            scans=self.settings.scans,
            chunk_frames=self.settings.chunk_frames,
            give_up_s=self.settings.give_up_s,
            end_s=self.settings.end_s,
        )
        self._positions = streams.positions_are.name
        self._figures: dict[str, Any] = {}
        self.began: Began | None = None
        """What the frames' stream said when the newest scan began."""
        self._orders: list[tuple[Any, ...]] = []
        """Not sent yet."""
        self._connection: Connection | None = None
        self._process: subprocess.Popen | None = None
        self._started = self._closed = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        with self._lock:
            if self._started:
                raise TypeError("found a source that is measuring already; send it to its process before chunks()")
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def streams(self) -> dict[str, dict[str, Any]]:
        """The figures of each stream, by its name: received, joined, waiting, dropped by reason, lost, and others."""
        return dict(self._figures.get("streams", {}))

    @property
    def frames_dropped(self) -> int:
        """Frames that were asked for, or came, and are not handed out: lost on the way, set aside, or thinned; without
        those that are measured again."""
        frames = self.streams.get(FRAMES)
        if frames is None:
            return 0
        again = NO_LOSS if self.plan.motion is None else (*NO_LOSS, NO_BEAM)
        losses = (why for why in frames["dropped"] if why not in again and not why.startswith(UNREADABLE))
        dropped = sum(frames["dropped"][why] for why in losses)
        others = sum(self._figures[what] for what in ("given_up", "refused", "unmeasured"))
        return int(dropped + frames["lost"] + others)

    @property
    def goes_on(self) -> Began:
        """How the newest scan began, for the `going_on` of a source that is opened later. A scan that is not steered
        goes on meanwhile: with the number of its next frame, so that those that nobody receives count as lost."""
        last = self.streams.get(FRAMES, {}).get("last_number")
        first = None if self.plan.motion is not None or last is None else last + 1
        return (self.began or Began(None))._replace(first=first)

    @property
    def receiver_pid(self) -> int | None:
        """The receiving process, while there is one."""
        return None if self._process is None else self._process.pid

    def chunks(self) -> Iterator[xr.Dataset]:
        """Receive; yield chunks until the scans are over, or close() is called. Raises RuntimeError for a stream that
        failed, with its name and the reason."""
        with self._lock:
            if self._started:
                raise RuntimeError("found a second call of chunks(), expected one: a source measures its scan once")
            self._started = True
            self._process, self._connection = _started(self.plan)
            for order in self._orders:
                self._connection.send(order)
        try:
            yield from self._received(self._connection)
        finally:
            self.close()
            self._end_process()

    def after(self, scans: Sequence[str]) -> None:
        """Before chunks(): these scans had begun, in this order, when the run was lost that goes on. The newest keeps
        its name where the stream is joined in its middle, and numbers of scans go on."""
        if scans:
            limit, known = self.settings.scans, self.settings.going_on
            header = known.header if known is not None and known.name == scans[-1] else {}
            self.plan = replace(
                self.plan,
                going_on=Began(scans[-1], None, header),
                begun=len(scans),
                scans=None if limit is None else max(1, limit - len(scans) + 1),
            )

    def apply(self, decision: Decision) -> None:
        """Have the beamline measure the positions of a decision. What it refuses counts as dropped."""
        if self.plan.motion is not None:
            self._order(("measure", decision.positions, decision.dwell, decision.stop))

    def close(self) -> None:
        """End it; what was joined by now is still handed out."""
        if not self._closed:
            self._closed = True
            self._order(("close",))

    def truth(self, scan: str) -> tuple[NDArray[np.complex64], Canvas] | None:
        """The object (Y, X) of a test sample, and where it lies; None: what other samples look like is not known."""
        if scan not in self.settings.truths:
            return None
        thing = np.asarray(self.settings.truths[scan], np.complex64)
        ny, nx = thing.shape
        return thing, Canvas((ny, nx), (-(ny // 2), -(nx // 2)))

    def _order(self, order: tuple[Any, ...]) -> None:
        with self._lock:
            if self._connection is None:
                self._orders.append(order)
                return
            try:
                self._connection.send(order)
            except (OSError, ValueError):
                logger.debug("the receiving process has left: %s is not carried out", order[0])

    def _received(self, connection: Connection) -> Iterator[xr.Dataset]:
        while True:
            try:
                if not connection.poll(STUCK_S):
                    raise self._stuck()
                kind, *rest = connection.recv()
            except (EOFError, OSError) as error:
                code = self._process.wait() if self._process is not None else None
                raise RuntimeError(
                    f"found the receiving process gone (exit code {code}), expected it to receive: its own last words "
                    "are on the standard error of the worker with the resource source"
                ) from error
            if kind == "frames":
                yield self._chunk(rest[0])
            elif kind == "figures":
                self._figures = rest[0]
            elif kind == "began":
                self.began = rest[0]
            elif kind == "warning":
                logger.warning("%s", rest[0])
            elif kind == "error":
                raise RuntimeError(rest[0])
            else:
                return

    def _stuck(self) -> RuntimeError:
        if self._process is not None:
            self._process.kill()
        return RuntimeError(
            f"found the receiving process silent for {STUCK_S:.0f} s, expected a word from it each second: a library "
            "is stuck in something it reads, as in a damaged file"
        )

    def _chunk(self, batch: Batch) -> xr.Dataset:
        return make_chunk(
            batch.counts,
            batch.number + SCAN_IDS * batch.scan,
            batch.values[self._positions],
            self.geometry,
            scan=batch.name,
            acquired=float(batch.acquired[0]),
        )

    def _end_process(self) -> None:
        if self._process is None or self._connection is None:
            return
        self._connection.close()
        try:
            self._process.wait(_END_S + (0.0 if self.plan.motion is None else self.plan.motion.close_s))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _started(plan: Plan) -> tuple[subprocess.Popen, Connection]:
    """A receiving process with its plan. Not by multiprocessing: a Dask worker may not have such children."""
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", "from steering.sources.receiver import main; main()", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    connection = Connection(ours.detach())
    connection.send(plan)
    return process, connection
