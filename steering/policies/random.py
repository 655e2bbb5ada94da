"""A random order: the plainest way to have the whole field early."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.policies.candidates import Ordered, checked


class Random(Ordered):
    """Every candidate once, in an order drawn from `seed`."""

    def __init__(self, candidates: NDArray[np.float64], *, seed: int = 0) -> None:
        where = checked(candidates)
        super().__init__(where, np.random.default_rng(seed).permutation(len(where)), f"random (seed {seed})")
