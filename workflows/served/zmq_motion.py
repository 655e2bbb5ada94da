"""Positions as a PandA sends them, and a motion server: what the Dectris and the SWMR publisher share."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from steering import Decision


class PandaAndMotion:
    """A socket that pushes positions as JSON, and one that answers requests, see steering.sources.motion."""

    def __init__(self, context: zmq.Context, *, samples: int = 1, port: int = 0) -> None:
        """samples: of each frame, around its position. port: of the positions, 0: any that is free."""
        self._samples = samples
        self._positions = context.socket(zmq.PUSH)
        self._positions.set(zmq.SNDHWM, 0)
        self._motion = context.socket(zmq.REP)
        ports = [bound(self._positions, port), bound(self._motion)]
        self.addresses = {
            "positions": f"zmq://127.0.0.1:{ports[0]}?y=INENC1&x=INENC2&unit=um&samples={samples}",
            "motion": f"zmq://127.0.0.1:{ports[1]}",
        }
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """The encoders are armed."""
        self._send({"message_type": "start", "arm_time": "", "start_time": ""})

    def positions(self, number: int, positions: NDArray[np.float64]) -> None:
        """The samples of frames from a number on, micrometres; the mean of a frame's is its position."""
        wobble = np.arange(self._samples) - (self._samples - 1) / 2
        datasets = {
            f"/INENC{k + 1}.VAL.Value": {
                "dtype": "float64",
                "size": self._samples * len(positions),
                "starting_sample_number": number * self._samples,
                "data": (1e6 * values[:, None] + 1e-3 * wobble).ravel().tolist(),
            }
            for k, values in enumerate(positions.T)
        }
        self._send({"message_type": "data", "frame_number": number, "datasets": datasets})

    def end(self, frames: int, last: bool) -> None:
        """The encoders are disarmed."""
        self._send({"message_type": "stop", "emitted_frames": frames, "last": last})

    def steered_by(self, apply: Callable[[Decision], None]) -> None:
        """Answer requests in a thread."""
        self._thread = threading.Thread(target=self._answer, args=(apply,), name="motion", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._motion.close(0)
        self._positions.close(2000)

    def _send(self, message: dict[str, Any]) -> None:
        self._positions.send(json.dumps(message).encode())

    def _answer(self, apply: Callable[[Decision], None]) -> None:
        while not self._stopped.is_set():
            if not self._motion.poll(50):
                continue
            try:
                request = json.loads(self._motion.recv())
                where = np.stack([request["y"], request["x"]], axis=1) if request["y"] else np.zeros((0, 2))
                dwell = None if request["dwell"] is None else np.array(request["dwell"])
                reasons = ("asked",) * max(len(where), 1)
                apply(Decision(positions=where, reasons=reasons, dwell=dwell, stop=request["stop"]))
                answer: dict[str, Any] = {"queued": len(where)}
            except (ValueError, KeyError, TypeError) as error:
                answer = {"error": str(error)}
            self._motion.send(json.dumps(answer).encode())


def bound(socket: zmq.Socket, port: int = 0) -> int:
    """Bind a socket to a port of this machine, 0: any that is free. Returns the port."""
    if not port:
        return int(socket.bind_to_random_port("tcp://127.0.0.1"))
    socket.bind(f"tcp://127.0.0.1:{port}")
    return port
