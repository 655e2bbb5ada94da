"""What a number of steps came to: losses, counts, and the seconds of their parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from steering.learning.clock import Clock

PARTS = ("load", "train", "populate", "augment", "wait")
_SETTLED = 256
"""Steps after which losses and times of a GPU are read, so that they do not pile up in a long run."""


@dataclass
class Tally:
    """Time, losses and representatives of a number of steps."""

    seconds: Counter[str] = field(default_factory=Counter)
    """For each of PARTS."""
    representatives: int = 0
    remote: int = 0
    """Of the representatives, how many came from another rank."""
    losses: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Seconds that each step waited for representatives."""
    _losses: list[torch.Tensor] = field(default_factory=list)
    """Of the newest steps, which `settle` reads."""
    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))
    """Of the device that the steps are taken on."""

    @property
    def loss(self) -> float:
        """Mean over the steps; 0 where there was none."""
        return sum(self.losses) / max(1, len(self.losses))

    def __add__(self, other: Tally) -> Tally:
        """The sum of both."""
        return Tally(
            seconds=self.seconds + other.seconds,
            representatives=self.representatives + other.representatives,
            remote=self.remote + other.remote,
            losses=self.losses + other.losses,
            waits=self.waits + other.waits,
        )

    def add(self, loss: torch.Tensor) -> None:
        """Count the loss () of a step. One on a GPU stays there, for reading it would make the host wait."""
        self._losses.append(loss)
        if len(self._losses) >= _SETTLED:
            self.settle()

    def settle(self) -> None:
        """Read the losses and times that were counted."""
        if self._losses:
            self.losses += torch.stack(self._losses).tolist()
            self._losses = []
        self.clock.settle(self._spend)

    def lap(self, part: str) -> None:
        """What came since the last call, or since `clock.start`, was this part of a step."""
        self.clock.lap(part, self._spend)

    def _spend(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds  # type: ignore[assignment]
        if part == "wait":
            self.waits.append(seconds)
