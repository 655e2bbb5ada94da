"""Experience replay: new samples and stored ones, together in each minibatch.

Source: Rolnick et al., "Experience Replay for Continual Learning", NeurIPS 2019 (arXiv 1811.11682); over many ranks:
Bouvier et al., FGCS 2024, DOI 10.1016/j.future.2024.07.016.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from steering.learning.objectives import Fields, Objective
from steering.learning.strategies.contract import Loss, Minibatch, mean_error


class ER:
    """The mean error over new samples and representatives alike; the samples themselves are remembered."""

    rehearses = True
    restarts = False

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def remember(self, batch: Fields, outputs: Any) -> Fields:
        """The samples as they are."""
        return batch

    def loss(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """Mean error over the augmented minibatch."""
        return mean_error(self.objective, network, minibatch)
