"""How long the parts of a step take: by the clock on a CPU, by events of the stream on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """What the parts of a step are timed by on a GPU, of torch.cuda.Event."""

    def synchronize(self) -> None:
        """Wait until the GPU has come to it."""

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds from this one to a later one."""


class Clock:
    """Says what was spent between moments that the thread has come to.

    On a GPU a moment is an event of its current stream: the host is ahead of it, and by the host's clock launching
    would look like computing. Times are then known when the GPU has come there too, see `settle`.
    """

    def __init__(self, device: torch.device, mark: Callable[[], Mark] | None = None) -> None:
        """mark: makes an event that the present moment is; None: torch's own where the device is a GPU."""
        self._mark = mark or (_marks_on(device) if device.type == "cuda" else None)
        self._last: Any = None
        self._pending: list[tuple[str, Mark, Mark]] = []

    def start(self) -> None:
        """From now on."""
        self._last = time.perf_counter() if self._mark is None else self._mark()

    def lap(self, part: str, spent: Callable[[str, float], None]) -> None:
        """Until now it was this part: `spent(part, seconds)` is called now, or by `settle`."""
        before = self._last
        self.start()
        if self._mark is None:
            spent(part, self._last - before)
        else:
            self._pending.append((part, before, self._last))

    def settle(self, spent: Callable[[str, float], None]) -> None:
        """Wait for the GPU, and say what was not said yet, in its order."""
        if self._pending:
            self._pending[-1][2].synchronize()
        for part, before, after in self._pending:
            spent(part, before.elapsed_time(after) / 1e3)
        self._pending.clear()


def _marks_on(device: torch.device) -> Callable[[], Mark]:
    def mark() -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return mark
