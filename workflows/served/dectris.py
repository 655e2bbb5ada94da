"""Publishes as a Dectris detector with stream2, positions as a PandA, decisions by a motion server."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import cbor2
import numpy as np
import zmq
from numpy.typing import NDArray

from served.zmq_motion import PandaAndMotion, bound
from steering import Decision, Geometry
from steering.sources.compression import compress

_TAGS = {"|u1": 64, "<u2": 69, "<u4": 70}


def image(frame: NDArray, compression: str | None) -> cbor2.CBORTag:
    """A frame (y, x) as stream2 has it: a multi-dimensional array, its bytes compressed (bslz4, lz4) or not."""
    payload = frame.tobytes() if compression is None else compress(compression, frame)
    if compression is not None:
        payload = cbor2.CBORTag(56500, [compression, frame.dtype.itemsize, payload])
    return cbor2.CBORTag(40, [list(frame.shape), cbor2.CBORTag(_TAGS[frame.dtype.str], payload)])


class DectrisPublisher:
    """A stream2 at a port of this machine."""

    armed = True

    def __init__(
        self,
        *,
        port: int = 0,
        positions_port: int = 0,
        compression: str | None = "bslz4",
        wait: bool = True,
        samples: int = 1,
        geometry: Geometry | None = None,
    ) -> None:
        """wait: for the client where it is slower; False: drop the frame, as a detector with a full buffer does.
        geometry: as the start message says it; None: it does not."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set(zmq.SNDHWM, 2000)
        port = bound(self._socket, port)
        self._panda = PandaAndMotion(self._context, samples=samples, port=positions_port)
        self.addresses = {"frames": f"dectris://127.0.0.1:{port}", **self._panda.addresses}
        self._compression, self._wait = compression, wait
        self._series, self._unique = 0, ""
        self._optics: dict[str, object] = {}
        if geometry is not None:  # as far as a real detector knows it
            self._optics = {
                "incident_wavelength": 1e10 * geometry.wavelength,
                "detector_translation": [0.0, 0.0, -geometry.distance],
                "pixel_size_x": geometry.detector_pixel,
                "pixel_size_y": geometry.detector_pixel,
            }
        self.overflowed = 0
        """Frames that the client was too slow for."""

    def begin(self, scan: str) -> None:
        """Arm."""
        self._series += 1
        self._unique = uuid.uuid4().hex
        self._send(
            type="start",
            arm_date="2026-11-28T00:00:00.0Z",
            channels=["threshold_1"],
            **self._optics,
            user_data={"scan": scan},
        )
        self._panda.begin()

    def frame(self, number: int, counts: NDArray) -> None:
        """Send an image."""
        self.send(number, self.encoded(counts))

    def encoded(self, counts: NDArray) -> cbor2.CBORTag:
        """An image, to be sent any number of times."""
        return image(counts, self._compression)

    def send(self, number: int, encoded: cbor2.CBORTag) -> None:
        """Send an image that `image` has made."""
        times = {"start_time": [number, 1000], "stop_time": [number + 1, 1000], "real_time": [1, 1000]}
        self._send(type="image", image_id=number, data={"threshold_1": encoded}, **times)

    def missed(self) -> None:
        """Nothing waits for it."""

    def position(self, number: int, position: NDArray[np.float64]) -> None:
        """Send a position."""
        self.positions(number, position[None])

    def positions(self, number: int, positions: NDArray[np.float64]) -> None:
        """Send the positions (n, 2) of frames from a number on."""
        self._panda.positions(number, positions)

    def end(self, frames: int, last: bool) -> None:
        """Disarm."""
        self._send(type="end")
        self._panda.end(frames, last)

    def steered_by(self, apply: Callable[[Decision], None]) -> None:
        """By the motion server."""
        self._panda.steered_by(apply)

    def close(self) -> None:
        """What was sent still arrives, if the client is there."""
        self._panda.close()
        self._socket.close(2000)
        self._context.term()

    def _send(self, **fields: object) -> None:
        message = {"series_id": self._series, "series_unique_id": self._unique, **fields}
        payload = cbor2.dumps(cbor2.CBORTag(55799, message))
        try:
            self._socket.send(payload, 0 if self._wait or fields["type"] != "image" else zmq.NOBLOCK)
        except zmq.Again:
            self.overflowed += 1
