"""Memory of many processes over time, and whether it grows."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray


class MemoryLog:
    """Memory that is a set of processes' own (USS), in MiB, every few seconds while the context is open."""

    def __init__(self, processes: Callable[[], Iterable[int]], every_s: float = 2.0) -> None:
        """processes: the ids, asked for at each look."""
        self._processes, self._every_s = processes, every_s
        self._over = threading.Event()
        self.samples: list[tuple[float, float]] = []
        """Seconds since 1970, MiB of all."""

    def __enter__(self) -> "MemoryLog":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(self._every_s):
            with contextlib.suppress(Exception):  # the processes are being exchanged
                self.samples.append((time.time(), sum(map(_own_mib, self._processes()))))


def _own_mib(pid: int) -> float:
    try:
        return psutil.Process(pid).memory_full_info().uss / 2**20
    except psutil.Error:  # it has just ended
        return 0.0


def slope(samples: list[tuple[float, float]], *, block_s: float, settled: float = 0.2) -> dict[str, Any]:
    """How fast the memory grows, in MiB per minute, and the standard error of that.

    The first part (`settled`, a share) is left out. Medians of blocks count as independent: within one, memory depends
    on what was just lost. Within noise: the slope is not above twice its error.
    """
    time_s, mib = np.array(samples, float).reshape(-1, 2).T
    if not len(time_s):
        return {"blocks": 0}
    begun = time_s[0] + settled * (time_s[-1] - time_s[0])
    block = ((time_s - begun) // block_s).astype(int)
    names = [number for number in np.unique(block) if number >= 0]
    medians = np.array([np.median(mib[block == number]) for number in names])
    minutes = np.array(names) * block_s / 60
    found = {"blocks": len(names), "first_mib": float(medians[0]), "last_mib": float(medians[-1])}
    if len(names) < 4:
        return found
    per_minute, error = _line(minutes, medians)
    return {
        **found,
        "mib_per_minute": per_minute,
        "error_mib_per_minute": error,
        "within_noise": bool(per_minute <= 2 * error),
    }


def _line(x: NDArray, y: NDArray) -> tuple[float, float]:
    """Slope of the line through points, and its standard error."""
    x, y = x - x.mean(), y - y.mean()
    per = float((x * y).sum() / (x * x).sum())
    rest = y - per * x
    return per, float(np.sqrt((rest * rest).sum() / (len(x) - 2) / (x * x).sum()))
