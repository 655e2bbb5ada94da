"""The learning rate over the steps of several tasks.

Source of `paper`: the public code of Bouvier et al., FGCS 2024 (DOI 10.1016/j.future.2024.07.016), after Goyal et al.,
arXiv 1706.02677.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Shape = Literal["paper", "cosine"]
MOST = 64  # ranks up to which the learning rate grows with their number
WARM_UP = 5 / 30  # of a task
STEPS = ((0.0, 1.0), (21 / 30, 0.5), (26 / 30, 0.05), (28 / 30, 0.01))
"""Shares of a task, and the factor from there on."""


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate that one rank would have, by step; every task begins anew.

    steps: of each task, in their order. ranks: with which the factor grows, in proportion, up to 64. shape: `paper`, a
    warm-up from 1 over the first sixth of a task, then steps down at 21, 26 and 28 of 30 epochs; or `cosine`, down to 0
    at the end of a task.
    """

    steps: Sequence[int]
    ranks: int
    shape: Shape

    def __call__(self, step: int) -> float:
        """The factor of that step, 0, 1, ..."""
        begins = [0, *itertools.accumulate(self.steps)]
        task = min(bisect.bisect_right(begins, step), len(self.steps)) - 1
        done = (step - begins[task]) / self.steps[task]
        most = min(self.ranks, MOST)
        if self.shape == "cosine":
            return most * (1 + math.cos(math.pi * done)) / 2
        if done < WARM_UP:
            return 1 + (most - 1) * done / WARM_UP
        return most * next(factor for begin, factor in reversed(STEPS) if done >= begin)
