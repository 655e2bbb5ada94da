"""Learn from the new samples alone: fastest, and forgets. The lower bound."""

from __future__ import annotations

from typing import Any

from torch import nn

from steering.learning.objectives import Fields, Objective
from steering.learning.strategies.contract import Loss, Minibatch, mean_error


class Incremental:
    """The error of the new samples; nothing is remembered."""

    rehearses = False
    restarts = False

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def remember(self, batch: Fields, outputs: Any) -> None:
        """Nothing."""

    def loss(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """Mean error over the minibatch."""
        return mean_error(self.objective, network, minibatch)
