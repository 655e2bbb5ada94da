"""The contract of the plug."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from steering.learning.objectives import Fields, Objective


@dataclass(frozen=True)
class Minibatch:
    """An augmented minibatch: `new` samples first, representatives behind them, in the same tensors.

    They share their tensors because the exchange writes representatives in place: a step copies nothing.
    """

    fields: dict[str, Tensor]
    """Each (new + representatives, ...)."""
    new: int

    @property
    def batch(self) -> Fields:
        """The new samples alone."""
        return {name: value[: self.new] for name, value in self.fields.items()}


@dataclass(frozen=True)
class Loss:
    """What a step minimises, and the outputs it was computed from."""

    value: Tensor
    outputs: Any
    """Of all samples of the minibatch, new ones first."""


class Strategy(Protocol):
    """How a step uses new samples and representatives."""

    rehearses: bool
    restarts: bool

    def remember(self, batch: Fields, outputs: Any) -> Fields | None:
        """What the buffer is offered of the new samples: fields of n rows each, or None."""

    def loss(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """What this step minimises."""


def mean_error(objective: Objective, network: nn.Module, minibatch: Minibatch) -> Loss:
    """The mean error over every sample of the minibatch: the term that all strategies share."""
    outputs = objective.outputs(network, minibatch.fields)
    return Loss(objective.error(outputs, minibatch.fields).mean(), outputs)
