"""Forget on purpose at each task boundary, then learn everything again: the upper bound, in accuracy and in cost."""

from __future__ import annotations

from typing import Any

from torch import nn

from steering.learning.objectives import Fields, Objective
from steering.learning.strategies.contract import Loss, Minibatch, mean_error


class FromScratch:
    """The error of minibatches drawn from all samples so far, with weights that are reset at each task boundary."""

    rehearses = False
    restarts = True

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def remember(self, batch: Fields, outputs: Any) -> None:
        """Nothing: the trainer keeps every sample for a strategy that restarts."""

    def loss(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """Mean error over the minibatch."""
        return mean_error(self.objective, network, minibatch)
