"""Publishes over EPICS PV Access: frames as NTNDArray with the position among their attributes, and motors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from p4p import Value
from p4p.nt import NTNDArray, NTScalar, NTTable
from p4p.server import Server, ServerOperation
from p4p.server.thread import SharedPV

from steering import Decision
from steering.sources.compression import compress

REACH = 1e-5  # metres: limits of the motors
SCALARS = {"|u1": 5, "<u2": 6, "<u4": 7}  # of pvData


class PvaPublisher:
    """PVs of a detector and of a stage on this machine. Frames are measured one at a time, as they are triggered."""

    armed = False

    def __init__(self, *, compression: str | None = None) -> None:
        self._compression = compression
        self._array = NTNDArray()
        self._image = SharedPV(initial=self._empty())
        self.motors = [SharedPV(nt=NTScalar("d", control=True), initial=_motor(0.0)) for _ in "yx"]
        self._trigger, self._end, self._done, self.dwell = (
            SharedPV(nt=NTScalar(kind), initial=0) for kind in ("i", "i", "i", "d")
        )
        self._table = SharedPV(nt=NTTable([("number", "l"), ("y", "d"), ("x", "d")]), initial=[])
        names = ("image", "y", "x", "trigger", "end", "done", "dwell", "table")
        pvs = (self._image, *self.motors, self._trigger, self._end, self._done, self.dwell, self._table)
        conf = {
            "EPICS_PVAS_SERVER_PORT": "0",
            "EPICS_PVAS_INTF_ADDR_LIST": "127.0.0.1",
            "EPICS_PVAS_AUTO_BEACON_ADDR_LIST": "NO",
            "EPICS_PVAS_BEACON_ADDR_LIST": "127.0.0.1",
        }
        served = {f"SIM:{name}": pv for name, pv in zip(names, pvs, strict=True)}
        self._server = Server(providers=[served], conf=conf, useenv=False)
        here = f"server=127.0.0.1:{self._server.conf()['EPICS_PVAS_SERVER_PORT']}"
        self.addresses = {
            "frames": f"pva://SIM:image?scan=ScanName&done=SIM:done&{here}",
            "positions": "pva://SIM:image?y=PositionY&x=PositionX&unit=um",
            "readbacks": f"pva://SIM:y,SIM:x?unit=um&{here}",
            "table": f"pva://SIM:table?y=y&x=x&unit=um&{here}",
            "motion": f"pva://SIM:y,SIM:x?trigger=SIM:trigger&dwell=SIM:dwell&end=SIM:end&unit=um&{here}",
        }
        self._scan, self._base = "", 1
        self.overflowed = 0
        self._over = False
        self._positions: dict[int, NDArray[np.float64]] = {}
        self._waiting: ServerOperation | None = None
        self._lock = threading.Lock()

    def begin(self, scan: str) -> None:
        """The arrays carry another scan's name."""
        self._scan = scan

    def frame(self, number: int, counts: NDArray) -> None:
        """Publish an array; the trigger that asked for it completes."""
        self.send(number, counts)
        self._complete()

    def encoded(self, counts: NDArray) -> NDArray:
        """A frame, to be sent any number of times; it is compressed when it is sent."""
        return counts

    def send(self, number: int, counts: NDArray) -> None:
        """Publish an array."""
        self._image.post(self._of(number, counts))

    def _of(self, number: int, counts: NDArray) -> object:
        """The array of a frame (y, x)."""
        y, x = self._positions.pop(number, np.full(2, np.nan))
        attributes = {"ScanName": self._scan, "PositionY": 1e6 * y, "PositionX": 1e6 * x}
        value = self._array.wrap(counts, timestamp=time.time())
        value["attribute"] = [{"name": name, "value": here, "descriptor": ""} for name, here in attributes.items()]
        value["uniqueId"] = self._base + number
        if self._compression is not None:
            payload = compress(self._compression, counts)
            if self._compression == "bslz4":
                payload = payload[12:]  # as areaDetector sends it
            value["value"] = ("ubyteValue", np.frombuffer(payload, np.uint8))
            value["codec.name"] = self._compression
            value["codec.parameters"] = SCALARS[counts.dtype.str]
            value["compressedSize"], value["uncompressedSize"] = len(payload), counts.nbytes
        return value

    def position(self, number: int, position: NDArray[np.float64]) -> None:
        """Send it in the table, and keep it for the frame's attributes; where the frame is lost its trigger completes
        all the same."""
        self._positions[number] = position
        y, x = (1e6 * position).tolist()
        self._table.post([{"number": self._base + number, "y": y, "x": x}])

    def end(self, frames: int, last: bool) -> None:
        """The numbers go on in the next scan."""
        self._base += frames
        self._positions.clear()
        self._complete()
        if last:
            self._over = True
            self._done.post(1)

    def steered_by(self, apply: Callable[[Decision], None]) -> None:
        """By puts: to a motor, which moves at once; to the trigger, which completes with its frame; to the end."""
        for pv in (*self.motors, self.dwell):
            pv.put(_put)
        here = self.motors

        @self._trigger.put
        def trigger(pv: SharedPV, operation: ServerOperation) -> None:
            where = 1e-6 * np.array([[float(motor.current()) for motor in here]])
            seconds = float(self.dwell.current())
            if self._over:
                operation.done(error="the beamline is closed")
                return
            try:
                with self._lock:
                    self._waiting = operation
                apply(Decision(positions=where, reasons=("trigger",), dwell=np.array([seconds]) if seconds else None))
            except ValueError as error:
                with self._lock:
                    self._waiting = None
                operation.done(error=str(error))

        @self._end.put
        def end(pv: SharedPV, operation: ServerOperation) -> None:
            apply(Decision(positions=np.zeros((0, 2)), reasons=("end",), stop=True))
            operation.done()

    def positions(self, number: int, positions: NDArray[np.float64]) -> None:
        """Keep the positions (n, 2) of frames from a number on."""
        self._positions |= {number + k: position for k, position in enumerate(positions)}

    def missed(self) -> None:
        """A frame was measured and is not published."""
        self._complete()

    def close(self) -> None:
        """Leave."""
        time.sleep(1.0)  # the last updates are on their way
        self._server.stop()

    def _complete(self) -> None:
        with self._lock:
            operation, self._waiting = self._waiting, None
        if operation is not None:
            operation.done()

    def _empty(self) -> object:
        """What an idle PV holds: no array yet."""
        return Value(NTNDArray.buildType())


def _motor(value: float) -> dict[str, object]:
    return {"value": value, "control": {"limitLow": -1e6 * REACH, "limitHigh": 1e6 * REACH, "minStep": 0.0}}


def _put(pv: SharedPV, operation: ServerOperation) -> None:
    pv.post(float(operation.value()), timestamp=time.time())
    operation.done()
