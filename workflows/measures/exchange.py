"""The exchange of representatives by itself."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from steering.learning.exchange import Exchange


def exchange_seconds(exchange: Exchange, steps: int, out: Mapping[str, Tensor]) -> list[float]:
    """Seconds of each exchange without training beside it; out: tensors (r, ...) that it writes.

    All ranks of its group call it together.
    """
    times = []
    for step in range(steps + 10):
        begun = time.perf_counter()
        exchange.start(step)
        exchange.finish(out)
        times.append(time.perf_counter() - begun)
    return times[10:]
