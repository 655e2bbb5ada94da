"""A bluesky plan that measures where a running campaign asks it to. Needs the extra `bluesky`.

    from bluesky import RunEngine
    from steering.sources.bluesky_plan import CampaignConnection, steered_scan

    campaign = CampaignConnection(unit="mm")   # of the motors
    RE = RunEngine()
    RE.subscribe(campaign)                     # documents go to the campaign
    print(campaign.addresses)                  # --source, --positions and --motion of workflows/live_scan.py
    RE(steered_scan([detector], [stage.y, stage.x], campaign, md={"sample": "gravel"}))

The plan takes its next points from `campaign` and never waits for it inside of bluesky: where there is none it sleeps
for a moment, in a message that the RunEngine can interrupt.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from steering.sources.zmq_socket import zmq

_UNITS = {"m": 1.0, "mm": 1e-3, "um": 1e-6, "nm": 1e-9}
_POLL_MS, _IDLE_S = 5, 0.01
_MOST = 100_000
"""Points that may wait, and documents of a run that are kept for one who comes late."""


class Point(NamedTuple):
    """Where to measure next."""

    y: float
    """In the unit of the motors."""
    x: float
    dwell: float | None
    """Seconds; None: as the detector is set."""


class CampaignConnection:
    """The connection of a plan to a running campaign: points come from it, the plan's documents go to it.

    It is a callback for `RunEngine.subscribe`, which only queues each document; a thread sends them (ZMQ PUB, in the
    format of bluesky.callbacks.zmq, as JSON), answers requests as in steering.sources.motion, and sends the run that is
    going on once more to whoever subscribes late. Close it at the end, or use it in `with`.
    """

    def __init__(
        self,
        *,
        unit: str = "mm",
        host: str = "127.0.0.1",
        documents: int = 0,
        motion: int = 0,
        field: tuple[float, float, float, float] | None = None,
        silent_s: float = 300.0,
    ) -> None:
        """unit: of the motors, m, mm, um or nm. host: the interface to listen on; beyond this machine others may then
        send points. documents, motion: ports, 0: any that is free. field: (y0, y1, x0, x1) in that unit; other
        points are refused. silent_s: seconds without a word after which a plan that waits gives up."""
        if unit not in _UNITS:
            raise ValueError(f"found unit={unit!r}, expected one of {', '.join(_UNITS)}")
        self._scale, self._field, self.silent_s = 1 / _UNITS[unit], field, silent_s
        self._zmq = zmq()
        self._context = self._zmq.Context()
        self._motion = self._context.socket(self._zmq.REP)
        self._documents = self._context.socket(self._zmq.XPUB)
        self._documents.set(self._zmq.SNDHWM, _MOST)
        self._documents.set(self._zmq.XPUB_VERBOSE, 1)
        ports = [_bound(self._documents, host, documents), _bound(self._motion, host, motion)]
        where = f"bluesky://{host}:{ports[0]}"
        self.addresses = {"frames": where, "positions": where, "motion": f"zmq://{host}:{ports[1]}"}
        """Of workflows/live_scan.py; positions want ?y=NAME&x=NAME&unit=UNIT, the motors' names in the events."""
        self._turn = threading.Lock()
        self._points: deque[Point | None] = deque()
        """None: the scan is over here."""
        self._heard = time.monotonic()
        self._queue: deque[bytes] = deque()
        """Documents to be sent."""
        self._run: list[bytes] = []
        """Documents of the run so far."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="campaign", daemon=True)
        self._thread.start()

    def __call__(self, name: str, document: Mapping[str, Any]) -> None:
        """Take a document of the RunEngine. Raises RuntimeError where too many wait to be sent."""
        if len(self._queue) >= _MOST:
            raise RuntimeError(f"found {_MOST} documents that wait to be sent, expected fewer: is the campaign closed?")
        self._queue.append(b" ".join([b"", name.encode(), to_json(document)]))

    def __enter__(self) -> CampaignConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(
        self, y: Sequence[float], x: Sequence[float], dwell: Sequence[float] | None = None, *, stop: bool = False
    ) -> int:
        """Queue points, metres and seconds; with stop the scan is over after them. Returns how many wait now.

        Raises ValueError for points outside the field, and for more than may wait; none of them is queued then.
        """
        times = [None] * len(y) if dwell is None else [float(seconds) for seconds in dwell]
        points = [Point(self._scale * float(a), self._scale * float(b), t) for a, b, t in zip(y, x, times, strict=True)]
        for point in points:
            self._refuse(point)
        with self._turn:
            if len(self._points) + len(points) > _MOST:
                raise ValueError(f"found {len(self._points)} points that wait, expected fewer: does a plan run?")
            self._points += points
            self._points += [None] if stop else []
            self._heard = time.monotonic()
            return len(self._points)

    def take(self) -> tuple[Point | None, bool]:
        """The next point, None where there is none now; and whether the scan is over, which is then taken as well.

        Raises TimeoutError where the campaign has said nothing for silent_s.
        """
        with self._turn:
            now = time.monotonic()
            if not self._points:
                if now - self._heard > self.silent_s:
                    raise TimeoutError(
                        f"found no word from the campaign for {self.silent_s:g} s, expected points: does it run, with "
                        f"--motion {self.addresses['motion']}?"
                    )
                return None, False
            self._heard = now
            point = self._points.popleft()
            over = point is None or bool(self._points and self._points[0] is None)
            if over and point is not None:
                self._points.popleft()
            return point, over

    def begin(self) -> None:
        """A scan asks for points from now on: the silence before it does not count."""
        with self._turn:
            self._heard = time.monotonic()

    def give_up(self) -> None:
        """A scan was ended before its last point: those that wait for it are not measured in the next one."""
        with self._turn:
            while self._points and self._points.popleft() is not None:
                pass

    def close(self) -> None:
        """Send what waits, and leave."""
        self._closed.set()
        self._thread.join()
        self._context.destroy(linger=2000)

    def _refuse(self, point: Point) -> None:
        inside = bool(np.isfinite([point.y, point.x]).all())
        if inside and self._field is not None:
            y0, y1, x0, x1 = self._field
            inside = y0 <= point.y <= y1 and x0 <= point.x <= x1
        if not inside:
            raise ValueError(f"found the point ({point.y:g}, {point.x:g}), expected one within {self._field}")

    def _serve(self) -> None:
        poller = self._zmq.Poller()
        for socket in (self._motion, self._documents):
            poller.register(socket, self._zmq.POLLIN)
        while not self._closed.is_set() or self._queue:
            ready = dict(poller.poll(_POLL_MS))
            if self._documents in ready and self._documents.recv()[:1] == b"\1":
                for message in self._run:  # somebody came late; others know the documents by their numbers
                    self._documents.send(message)
            if self._motion in ready:
                self._motion.send(json.dumps(self._answer(self._motion.recv())).encode())
            while self._queue:
                message = self._queue.popleft()
                if message.startswith(b" start "):
                    self._run = []
                if len(self._run) < _MOST:
                    self._run.append(message)
                self._documents.send(message)
                if message.startswith(b" stop "):
                    self._run = []  # who comes now would take it for the scan that is next

    def _answer(self, message: bytes) -> dict[str, Any]:
        try:
            request = json.loads(message)
            return {"queued": self.measure(request["y"], request["x"], request["dwell"], stop=request["stop"] is True)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return {"error": f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)}


def to_json(document: Mapping[str, Any]) -> bytes:
    """A document as JSON: the serializer for bluesky.callbacks.zmq.Publisher, whose own default is refused here."""
    return json.dumps(document, default=_plain).encode()


def steered_scan(
    detectors: Sequence[Any],
    motors: Sequence[Any],
    campaign: CampaignConnection,
    *,
    md: Mapping[str, Any] | None = None,
    points: int | None = None,
    dwell: Any = None,
) -> Generator[Any, Any, Any]:
    """A plan: one run with an event for each point, until the campaign ends the scan.

    detectors: what is triggered and read at each point; at most one frame each. motors: y and x. md: of the start
    document; its `sample` names the scan. points: most of them; None: no limit. dwell: what takes the seconds of a
    point that has them.

    It may be paused, resumed, stopped and aborted anywhere: it goes on at the last point, of which an exposure that was
    interrupted is thrown away, and puts the motors (and dwell) back at the end, however that comes about. Where it is
    stopped, aborted or fails, points that wait for it are left out, up to the end of its scan. Raises ImportError
    without bluesky, TimeoutError where the campaign is silent for too long.
    """
    plans, around = _bluesky()
    y, x = motors
    watched = [OneFrame(each) if hasattr(each, "collect_asset_docs") else each for each in detectors]
    moved = [y, x, *([] if dwell is None else [dwell])]
    metadata = {
        "plan_name": "steered_scan",
        "detectors": [each.name for each in detectors],
        "motors": [y.name, x.name],
        "hints": {"dimensions": [(_fields(motor), "primary") for motor in (y, x)]},
        **(md or {}),
    }

    def measure() -> Generator[Any, Any, None]:
        measured, over = 0, False
        campaign.begin()
        try:
            while not over and measured != points:
                yield from plans.checkpoint()
                point, over = campaign.take()
                if point is not None:
                    extra = [] if dwell is None or point.dwell is None else [dwell, point.dwell]
                    yield from plans.mv(y, point.y, x, point.x, *extra)
                    yield from plans.trigger_and_read([*watched, y, x])
                    measured += 1
                elif not over:
                    yield from plans.sleep(_IDLE_S)
        except BaseException:  # as where the plan is aborted
            if not over:
                campaign.give_up()
            raise

    staged = around.stage_wrapper(around.run_wrapper(measure(), md=metadata), watched)
    return (yield from around.reset_positions_wrapper(staged, moved))


class OneFrame:
    """A detector that says of each point the last frame only.

    When a pause interrupts an exposure, bluesky triggers the point once more; its detectors then have two frames for
    one event, which bluesky refuses. Here the earlier one stays in the file, and no document says anything of it.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._exposing: Any = None
        self._asked = 0
        self.name, self.parent = device.name, device.parent

    @property
    def hints(self) -> Any:
        """As of the detector, like all that follows."""
        return self._device.hints

    def stage(self) -> Any:
        """Make it ready."""
        self._exposing = None
        return self._device.stage()

    def unstage(self) -> Any:
        """Stop it, and close its file."""
        return self._device.unstage()

    def trigger(self) -> Any:
        """Expose, after an exposure that was interrupted and goes on still."""
        return _library("ophyd_async.core").AsyncStatus(self._expose())

    async def _expose(self) -> None:
        self._asked += 1
        mine = self._asked
        while self._exposing is not None and not self._exposing.done:
            with contextlib.suppress(Exception):  # whoever triggered it has heard of it
                await self._exposing
        if mine == self._asked:  # else this one was interrupted as well, before it began
            self._exposing = self._device.trigger()
            await self._exposing

    async def describe(self) -> Any:
        """Its data keys."""
        return await self._device.describe()

    async def read(self) -> Any:
        """Its readings."""
        return await self._device.read()

    async def describe_configuration(self) -> Any:
        """Data keys of its configuration."""
        return await self._device.describe_configuration()

    async def read_configuration(self) -> Any:
        """Its configuration."""
        return await self._device.read_configuration()

    async def get_index(self) -> int:
        """Frames so far."""
        return int(await self._device.get_index())

    async def collect_asset_docs(self, index: int | None = None) -> AsyncIterator[tuple[str, Any]]:
        """Its resources, and of each the last frame."""
        async for name, document in self._device.collect_asset_docs(index):
            if name == "stream_datum":
                stop = document["indices"]["stop"]
                yield name, {**document, "indices": {"start": stop - 1, "stop": stop}}
            else:
                yield name, document


def _fields(motor: Any) -> list[str]:
    return list(getattr(motor, "hints", {}).get("fields", [])) or [motor.name]


def _plain(value: Any) -> Any:
    """What JSON does not know: numpy's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value)


def _bluesky() -> tuple[Any, Any]:
    return _library("bluesky.plan_stubs"), _library("bluesky.preprocessors")


def _library(name: str) -> Any:
    try:
        if name == "ophyd_async.core":
            import ophyd_async.core as library  # noqa: PLC0415
        elif name == "bluesky.plan_stubs":
            import bluesky.plan_stubs as library  # noqa: PLC0415
        else:
            import bluesky.preprocessors as library  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"a steered scan needs {name.partition('.')[0].replace('_', '-')}, which is not installed: pip "
            "install 'steering[bluesky]'"
        ) from error
    return library


def _bound(socket: Any, host: str, port: int) -> int:
    if port:
        socket.bind(f"tcp://{host}:{port}")
        return port
    return int(socket.bind_to_random_port(f"tcp://{host}"))
