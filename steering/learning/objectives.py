"""What a network is asked to get right. A strategy mixes new and stored samples; the objective says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Fields = Mapping[str, Tensor]


class Objective(Protocol):
    """How a sample's fields go into a network, and how wrong the outputs are."""

    def outputs(self, network: nn.Module, fields: Fields) -> Any:
        """The network's outputs for n samples."""

    def error(self, outputs: Any, fields: Fields) -> Tensor:
        """(n,) error of each sample, differentiable."""


class Reconstruction:
    """Diffraction in, amplitude and phase out; errors weighted by the illumination.

    weight: (patch, patch) float32, 1 where the probe is strongest: where no photon went, nothing can be known.
    absolute: weight of the part of the error that sees a constant phase. A far-field frame does not tell it; only what
    the samples have in common does. So most of the error is taken after the best constant phase is removed, and the
    rest keeps the patches of one sample in step.
    """

    def __init__(self, weight: NDArray[np.float32], *, absolute: float = 0.3) -> None:
        self.weight = torch.from_numpy(np.asarray(weight, np.float32))
        self.absolute = absolute

    def outputs(self, network: nn.Module, fields: Fields) -> tuple[Tensor, Tensor]:
        """(amplitude, phase), each (n, patch, patch)."""
        return network(fields["counts"])

    def error(self, outputs: tuple[Tensor, Tensor], fields: Fields) -> Tensor:
        """(n,) illumination-weighted mean of |amplitude difference| and of the chord between the phases.

        The two are taken apart because the modulus of their complex difference is smallest for an amplitude of zero
        wherever the phase is more than 60 degrees off: a network that starts there never recovers.
        """
        amplitude, phase = outputs
        share = (self.weight / self.weight.sum()).to(phase.device)
        turn = phase - fields["phase"]
        # The best constant is the angle of the mean phasor; it is no way for the gradient to go.
        with torch.no_grad():
            constant = torch.atan2((turn.sin() * share).sum((-2, -1)), (turn.cos() * share).sum((-2, -1)))
        free = _chord(turn - constant[:, None, None])
        chord = (1 - self.absolute) * free + self.absolute * _chord(turn)
        return ((chord + (amplitude - fields["amplitude"]).abs()) * share).sum((-2, -1))


def _chord(angle: Tensor) -> Tensor:
    """|exp(i angle) - 1|; the small constant gives it a gradient at 0."""
    return (2 - 2 * angle.cos() + 1e-6).sqrt()
