"""A random order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.policies.candidates import Ordered, checked
from steering.policies.dwell import DwellRule
from steering.policies.stop import StopRule


class Random(Ordered):
    """Every candidate once, in an order drawn from `seed`."""

    def __init__(
        self,
        candidates: NDArray[np.float64],
        *,
        seed: int = 0,
        stop: StopRule | None = None,
        dwell: DwellRule | None = None,
    ) -> None:
        where = checked(candidates)
        order = np.random.default_rng(seed).permutation(len(where))
        super().__init__(where, order, f"random (seed {seed})", stop=stop, dwell=dwell)
