"""Decisions as puts to motors of EPICS: put with completion, within their limits, put back at the end.

Needs the extra `epics`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.sources.exposure import unless_stopped
from steering.sources.motion import NotPutBack, Unmeasured
from steering.sources.pva_client import context


@dataclass(frozen=True, kw_only=True)
class PvaMotion:
    """Motors, and a detector that is triggered at each position."""

    y: str
    x: str
    trigger: str = ""
    """PV that takes one frame when 1 is put to it, and completes when that is done; empty: nothing is triggered."""
    dwell: str = ""
    """PV of the exposure, seconds; for a position without a dwell, and at the end, it is what it was; empty: it is not
    set."""
    end: str = ""
    """PV to which 1 is put when a decision ends the scan."""
    scale: tuple[float, ...] = (1.0, 1.0)
    """What the motors' values are multiplied by to be metres."""
    server: str = ""
    timeout_s: float = 30.0
    """Seconds that a move, or a frame beyond its dwell, may take."""

    @property
    def close_s(self) -> float:
        """A move may be under way, and another one goes back; a frame is not waited for."""
        return 2 * self.timeout_s

    def connected(self, stopped: threading.Event) -> _PvaMotion:
        """Connect, and note where the motors are, and the exposure. Raises OSError where they do not answer."""
        return _PvaMotion(self, stopped)


class _PvaMotion:
    def __init__(self, motion: PvaMotion, stopped: threading.Event) -> None:
        self._motion, self._stopped = motion, stopped
        self._context = context(motion.server)
        self._names = [motion.y, motion.x]
        names = [*self._names, *([motion.dwell] if motion.dwell else [])]
        try:
            found = self._context.get(names, timeout=motion.timeout_s)
        except TimeoutError as error:
            self._context.close()
            expected = "motors and the exposure" if motion.dwell else "motors"
            raise OSError(f"found no answer from {' and '.join(names)}, expected {expected}: check names") from error
        self._before = {name: float(value["value"]) for name, value in zip(names, found, strict=True)}
        self._limits = [_limits(value) for value in found[:2]]
        self._dwelt = False
        """The exposure is not what it was."""

    def measure(self, positions: NDArray[np.float64], dwell: NDArray[np.float64] | None, stop: bool) -> None:
        """See OpenMotion."""
        where = positions / np.asarray(self._motion.scale)
        for name, values, (low, high) in zip(self._names, where.T, self._limits, strict=True):
            if len(values) and not (low <= values.min() and values.max() <= high):
                raise ValueError(
                    f"found positions {values.min():g}..{values.max():g} for {name}, expected them within its limits "
                    f"{low:g}..{high:g}"
                )
        times = np.full(len(where), np.nan) if dwell is None else dwell
        done = 0
        try:
            for target, seconds in zip(where.tolist(), times.tolist(), strict=True):
                if self._stopped.is_set():
                    return
                self._one(target, seconds)
                done += 1
            if stop and self._motion.end:
                self._put([self._motion.end], [1])
        except (TimeoutError, RuntimeError) as error:  # RuntimeError: the IOC refused, or was disconnected
            raise Unmeasured(
                len(where) - done, f"found a move or a frame that did not complete: {error or 'no answer in time'}"
            ) from error

    def close(self) -> None:
        """The motors go back to where they were, and the exposure to what it was."""
        try:
            self._put_back()
        finally:
            self._context.close()

    def _put_back(self) -> None:
        names = [*self._names, *([self._motion.dwell] if self._dwelt else [])]
        values = [self._before[name] for name in names]
        answers = self._context.put(names, values, timeout=self._motion.timeout_s, wait=True, throw=False)
        left = [
            f"{name} at {value:g} ({str(answer) or 'no answer in time'})"
            for name, value, answer in zip(names, values, answers, strict=True)
            if isinstance(answer, Exception)
        ]
        if left:
            raise NotPutBack(f"found no way to put back {' and '.join(left)}, expected it: put it there by hand")

    def _one(self, target: list[float], seconds: float) -> None:
        self._put(self._names, target)
        own = seconds != seconds  # noqa: PLR0124 - NaN: the detector's own
        if self._motion.dwell and (self._dwelt or not own):
            self._put([self._motion.dwell], [self._before[self._motion.dwell] if own else seconds])
            self._dwelt = not own
        if self._motion.trigger:
            more_s = 0.0 if own else seconds
            unless_stopped(lambda: self._put([self._motion.trigger], [1], more_s), self._stopped)

    def _put(self, names: list[str], values: Sequence[float], more_s: float = 0.0) -> None:
        timeout = self._motion.timeout_s + more_s
        self._context.put(names, list(values), timeout=timeout, wait=True)


def _limits(value: Any) -> tuple[float, float]:
    """Of a motor's control structure; equal ones are EPICS's way to say that there are none."""
    control = value.todict().get("control") or {}
    low, high = float(control.get("limitLow", 0)), float(control.get("limitHigh", 0))
    return (low, high) if low < high else (-np.inf, np.inf)
