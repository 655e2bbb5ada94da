"""Minibatches that hold new samples and, behind them, representatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Fields = Mapping[str, Tensor]
Specification = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of a sample and dtype, by field."""


@dataclass(frozen=True)
class Minibatch:
    """An augmented minibatch: `new` samples first, representatives behind them, in the same tensors.

    They share their tensors because the exchange writes representatives in place: a step copies nothing.
    """

    fields: dict[str, Tensor]
    """Each (new + representatives, ...)."""
    new: int

    def __getitem__(self, name: str) -> Tensor:
        """The field of this name, (new + representatives, ...)."""
        return self.fields[name]

    @property
    def batch(self) -> Fields:
        """The new samples alone."""
        return {name: value[: self.new] for name, value in self.fields.items()}

    @property
    def representatives(self) -> Fields:
        """The stored samples alone; none of them while the buffers are empty."""
        return {name: value[self.new :] for name, value in self.fields.items()}


class Ring:
    """Two minibatches in turn, allocated once: one is trained on while the next is filled."""

    def __init__(self, fields: Specification, rows: int, device: torch.device) -> None:
        self._fields, self._rows, self._device = dict(fields), rows, device
        self._pair = [
            {name: torch.zeros((rows, *shape), dtype=dtype, device=device) for name, (shape, dtype) in fields.items()}
            for _ in range(2)
        ]

    def fits(self, fields: Specification, rows: int, device: torch.device) -> bool:
        """Whether it holds these fields, and that many rows or more."""
        return self._fields == fields and rows <= self._rows and device == self._device

    def next(self) -> dict[str, Tensor]:
        """The tensors (rows, ...) to fill next."""
        self._pair.reverse()
        return self._pair[0]
