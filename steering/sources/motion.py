"""Decisions carried to a motion server over ZMQ. Needs the extra `dectris`.

The server answers (REP) each request (REQ), both JSON, in seconds and in the unit that its address says (metres, or
object pixels, where it says none):
{"command": "measure", "y": [...], "x": [...], "dwell": [...] or null, "stop": false} with {"queued": N}, or with
{"error": "why"}, and then queues none of them. It moves to each position in turn, exposes there, and with `stop` ends
the scan after the last. Its positions come back in the stream of positions, as they were measured.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from steering.sources.zmq_socket import zmq


class Order(NamedTuple):
    """What is asked of a beamline."""

    positions: NDArray[np.float64]
    """(n, 2)"""
    dwell: NDArray[np.float64] | None
    """(n,) seconds."""
    stop: bool
    """The scan is over after them."""


class Unmeasured(OSError):
    """A measurement that broke off: no frame will come from the last `left` of its positions."""

    def __init__(self, left: int, message: str) -> None:
        super().__init__(message)
        self.left = left


class NotPutBack(OSError):
    """What a motion moved is not where it was found."""


class OpenMotion(Protocol):
    """A motion that is connected; used by one thread."""

    def measure(self, positions: NDArray[np.float64], dwell: NDArray[np.float64] | None, stop: bool) -> None:
        """Measure at positions (n, 2) for dwell (n,) seconds; with stop the scan is over after them.

        Raises ValueError where the beamline refuses them, OSError where it cannot be reached, Unmeasured where it did a
        part of them, or all of them as far as is known.
        """

    def close(self) -> None:
        """Leave the beamline as it was found. Raises NotPutBack where that fails."""


class Motion(Protocol):
    """Where decisions are carried out; made in the driver, pickled, connected in the receiving process."""

    @property
    def close_s(self) -> float:
        """Seconds that it may take from `stopped` on until it is closed."""

    def connected(self, stopped: threading.Event) -> OpenMotion:
        """Connect; what takes long ends early once `stopped` is set. Raises OSError where that fails."""


class Carrier:
    """Has orders measured, one after the other, until None comes; then the beamline is left as it was found."""

    def __init__(
        self,
        motion: Motion,
        orders: SimpleQueue[Order | None],
        stopped: threading.Event,
        answered: Callable[[int, int, Exception | None], None],
        failed: Callable[[BaseException, str], None],
    ) -> None:
        """answered: hears of each order how many positions it had, how many of them, at its end, were refused, and why.
        failed: hears of the error of the first order, where none was accepted before: units or limits are wrong, or
        nobody is there."""
        self._motion, self._orders, self._stopped = motion, orders, stopped
        self._answered, self._failed = answered, failed
        self._over = threading.Event()
        self._left = ""

    def run(self) -> None:
        """All of it, in a thread of its own."""
        try:
            self._carry_out()
        except NotPutBack as error:
            self._left = f"motion: {error}"
        except BaseException as error:  # the boundary of this thread
            self._failed(error, "motion")
        finally:
            self._over.set()

    def left_behind(self, more_s: float) -> str:
        """What is not put back, in words, once it is over, or so much later than it should be; empty: nothing."""
        if not self._over.wait(self._motion.close_s + more_s):
            return "motion: found it busy for too long, expected that it puts its motors back: look where they are"
        left, self._left = self._left, ""
        return left

    def _carry_out(self) -> None:
        accepted = False
        with closing(self._motion.connected(self._stopped)) as open_motion:
            while (order := self._orders.get()) is not None:
                refused, why = 0, None
                try:
                    open_motion.measure(*order)
                    accepted = True
                except (ValueError, OSError) as error:
                    if not accepted:
                        raise
                    refused, why = getattr(error, "left", len(order.positions)), error
                self._answered(len(order.positions), refused, why)


@dataclass(frozen=True, kw_only=True)
class ZmqMotion:
    """A motion server at an address."""

    address: str
    """tcp://HOST:PORT"""
    scale: tuple[float, ...] = (1.0, 1.0)
    """What y and x are multiplied by there to be metres, or object pixels: as those of positions are."""
    answer_s: float = 10.0
    """Seconds that an answer may take."""

    @property
    def close_s(self) -> float:
        """See Motion."""
        return self.answer_s

    def connected(self, stopped: threading.Event) -> _ZmqMotion:
        """Connect; ZMQ waits for a server that is not there yet."""
        return _ZmqMotion(self)


class _ZmqMotion:
    def __init__(self, motion: ZmqMotion) -> None:
        self._zmq = zmq()
        self._motion = motion
        self._context = self._zmq.Context()
        self._connect()

    def _connect(self) -> None:
        self._socket = self._context.socket(self._zmq.REQ)
        self._socket.set(self._zmq.LINGER, 0)
        try:
            self._socket.connect(self._motion.address)
        except self._zmq.ZMQError as error:
            raise OSError(f"found the address {self._motion.address!r} ({error}), expected tcp://HOST:PORT") from error

    def measure(self, positions: NDArray[np.float64], dwell: NDArray[np.float64] | None, stop: bool) -> None:
        """See OpenMotion."""
        y, x = (positions / np.asarray(self._motion.scale)).T.tolist() if len(positions) else ([], [])
        times = None if dwell is None else dwell.tolist()
        answer = self._ask({"command": "measure", "y": y, "x": x, "dwell": times, "stop": stop})
        if "error" in answer:
            raise ValueError(str(answer["error"]))

    def close(self) -> None:
        """Nothing to put back: the server moves its own motors."""
        self._context.destroy(linger=0)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._socket.send(json.dumps(request).encode())
        if not self._socket.poll(round(1e3 * self._motion.answer_s)):
            self._socket.close()
            self._connect()  # a REQ socket without its answer can ask no more
            raise Unmeasured(  # it may measure them all the same: what does not come is given up in time
                0,
                f"found no answer from the motion server {self._motion.address} within {self._motion.answer_s:g} s, "
                "expected one: is it running?",
            )
        try:
            answer = json.loads(self._socket.recv())
        except ValueError as error:
            raise ValueError("found an answer of the motion server that is no JSON") from error
        return answer if isinstance(answer, dict) else {"error": f"an answer of {type(answer).__name__}"}
