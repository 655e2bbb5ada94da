"""The contract that every strategy fulfils."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from steering.learning.minibatch import Fields, Minibatch
from steering.learning.objectives import ClassObjective, Objective, Outputs


@dataclass(frozen=True)
class Loss:
    """What a step minimises, and the outputs it was computed from."""

    value: Tensor
    outputs: Outputs
    """Of the minibatch's samples, new ones first."""


class Strategy:
    """How a step uses new samples and representatives. A new kind overrides what it does otherwise."""

    rehearses = False
    """Representatives are drawn for it."""
    restarts = False
    """At a task boundary the weights are reset, and every sample so far is trained on again."""
    needs_classes = False
    """Its objective must be a ClassObjective: it serves no reconstruction."""

    def __init__(self, objective: Objective | None = None) -> None:
        """objective: None where it follows from elsewhere, as in an Experiment, where network and probe decide it.

        Raises ValueError for an objective without classes where the strategy needs them.
        """
        self._objective = self._suited(objective)

    @property
    def objective(self) -> Objective:
        """What the network is asked to get right. Raises RuntimeError for a strategy that was made without one."""
        if self._objective is None:
            name = type(self).__name__
            raise RuntimeError(
                f"found the strategy {name} without an objective, expected one, as in {name}(Classification(...)): "
                "only an Experiment adds its own"
            )
        return self._objective

    def bound(self, objective: Objective) -> Self:
        """This strategy, with that objective where it was made without one."""
        if self._objective is not None:
            return self
        other = copy.copy(self)
        other._objective = other._suited(objective)
        return other

    def _suited(self, objective: Objective | None) -> Objective | None:
        """The objective. Raises ValueError where this strategy cannot use it."""
        if self.needs_classes and objective is not None and not isinstance(objective, ClassObjective):
            raise ValueError(
                f"found the strategy {type(self).__name__} with {type(objective).__name__}, expected an objective "
                "whose classes compete, such as Classification: for a reconstruction use ER, DER or DERpp"
            )
        return objective

    def remember(self, batch: Fields, outputs: Outputs) -> Fields | None:
        """What the buffer is offered of n new samples: fields of n rows each, or None.

        batch: the new samples; outputs: those of the whole minibatch, of which the first n are theirs.
        """
        return batch if self.rehearses else None

    def loss(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """What this step minimises: the mean error over every sample of the minibatch."""
        outputs = self.objective.outputs(network, minibatch.fields)
        return Loss(self.objective.error(outputs, minibatch.fields).mean(), outputs)

    def gradient(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """Leave in `.grad` of the parameters, which are empty before, what the optimiser is to follow.

        Every call of `backward` is a collective of all ranks: their number must not depend on the data of one rank.
        """
        loss = self.loss(network, minibatch)
        loss.value.backward()
        return loss
