"""Objectives: the error of a network's outputs. A strategy combines new and stored samples; the objective measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from steering.learning.minibatch import Fields

Outputs = tuple[Tensor, ...]
"""A network's outputs for n samples: tensors (n, ...)."""


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, the network is as where it serves: no dropout, and batch normalisation by the means it has learnt."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Objective(Protocol):
    """How a sample's fields enter a network, and the error of its outputs."""

    names: tuple[str, ...]
    """Of the outputs, in their order."""

    def outputs(self, network: nn.Module, fields: Fields) -> Outputs:
        """The network's outputs for n samples."""

    def error(self, outputs: Outputs, fields: Fields) -> Tensor:
        """(n,) error of each sample, differentiable."""

    def distance(self, outputs: Outputs, stored: Outputs) -> Tensor:
        """(n,) squared distance of outputs from earlier ones of the same samples, differentiable."""


@runtime_checkable
class ClassObjective(Objective, Protocol):
    """An objective with classes that compete."""

    def error_among_own(self, outputs: Outputs, fields: Fields) -> Tensor:
        """(n,) error of each sample, differentiable, where only the classes of these n samples compete."""


class Reconstruction:
    """Diffraction in, amplitude and phase out; errors weighted by the illumination.

    weight: (patch, patch) float32, 1 where the probe is strongest: where no photon went, nothing can be known.
    absolute: share of the error that is sensitive to a constant phase, 0 to 1. A far-field frame does not determine
    this constant; only what the patches of a sample have in common does. So most of the error is taken after the best
    constant is removed. 0.3 is enough to keep the patches of one sample in step: 0 lets each drift by itself, and 1
    spends the network on a constant that its input does not contain.
    """

    names: tuple[str, ...] = ("amplitude", "phase")

    def __init__(self, weight: NDArray[np.float32], *, absolute: float = 0.3) -> None:
        self.weight = torch.from_numpy(np.asarray(weight, np.float32))
        self.absolute = absolute
        self._share = self.weight / self.weight.sum()

    def outputs(self, network: nn.Module, fields: Fields) -> Outputs:
        """(amplitude, phase), each (n, patch, patch)."""
        return network(fields["counts"])

    def error(self, outputs: Outputs, fields: Fields) -> Tensor:
        """(n,) illumination-weighted mean of |amplitude difference| and of the chord between the phases.

        The two are taken apart because the modulus of their complex difference is smallest for an amplitude of zero
        wherever the phase is more than 60 degrees off: a network that starts there never recovers.
        """
        amplitude, phase = outputs
        share = self._share_on(phase.device)
        turn = phase - fields["phase"]
        # The best constant is the angle of the mean phasor; no gradient flows through it.
        with torch.no_grad():
            constant = torch.atan2((turn.sin() * share).sum((-2, -1)), (turn.cos() * share).sum((-2, -1)))
        free = _chord(turn - constant[:, None, None])
        chord = (1 - self.absolute) * free + self.absolute * _chord(turn)
        return ((chord + (amplitude - fields["amplitude"]).abs()) * share).sum((-2, -1))

    def distance(self, outputs: Outputs, stored: Outputs) -> Tensor:
        """(n,) illumination-weighted mean of |amplitude difference|^2 + |exp(i phase difference) - 1|^2."""
        share = self._share_on(outputs[0].device)
        chord = 2 - 2 * (outputs[1] - stored[1]).cos()
        return (((outputs[0] - stored[0]).square() + chord) * share).sum((-2, -1))

    def _share_on(self, device: torch.device) -> Tensor:
        """The weight, its sum 1: moved to a device once, and not in each step."""
        if self._share.device != device:
            self._share = self._share.to(device)
        return self._share


class Classification:
    """Images in, logits out; cross entropy.

    Fields: `image` uint8 (n, channels, y, x), `label` int64 (n,).

    Args:
        mean, std: of each channel, of values between 0 and 1; images are normalised to them.
        shift: while a network trains, images are moved by up to so many pixels along each axis, edges filled with the
            mean, and mirrored at random; 0: they are taken as they are.
    """

    names: tuple[str, ...] = ("logits",)

    def __init__(self, *, mean: Sequence[float], std: Sequence[float], shift: int = 0) -> None:
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        self.shift = shift

    def outputs(self, network: nn.Module, fields: Fields) -> Outputs:
        """(logits,), float32 (n, classes)."""
        image = fields["image"]
        if self.mean.device != image.device:  # once, and not in each step
            self.mean, self.std = self.mean.to(image.device), self.std.to(image.device)
        image = (image.float() / 255 - self.mean) / self.std
        if network.training and self.shift:
            image = _moved(image, self.shift)
        # Several times faster for small images on a CPU, and what tensor cores want.
        image = image.contiguous(memory_format=torch.channels_last)
        return (network(image).float(),)

    def error(self, outputs: Outputs, fields: Fields) -> Tensor:
        """(n,) cross entropy in nats."""
        return cross_entropy(outputs[0], fields["label"], reduction="none")

    def error_among_own(self, outputs: Outputs, fields: Fields) -> Tensor:
        """(n,) cross entropy in nats over the classes that are among these samples' labels."""
        logits, label = outputs[0], fields["label"]
        absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        absent[label] = False
        return cross_entropy(logits.masked_fill(absent, -torch.inf), label, reduction="none")

    def distance(self, outputs: Outputs, stored: Outputs) -> Tensor:
        """(n,) mean squared difference of the logits."""
        return (outputs[0] - stored[0]).square().mean(1)


def _moved(image: Tensor, shift: int) -> Tensor:
    """Images (n, channels, y, x), each moved and mirrored at random, which torch's generator decides."""
    n, _, height, width = image.shape
    device = image.device
    y, x = torch.randint(0, 2 * shift + 1, (2, n, 1), device=device)
    columns = torch.arange(width, device=device).expand(n, -1)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns, width - 1 - columns)
    rows = y + torch.arange(height, device=device)
    padded = pad(image, (shift, shift, shift, shift))
    return padded[torch.arange(n, device=device)[:, None, None], :, rows[:, :, None], (x + columns)[:, None]].movedim(
        -1, 1
    )


def _chord(angle: Tensor) -> Tensor:
    """|exp(i angle) - 1|; the small constant gives it a gradient at 0."""
    return (2 - 2 * angle.cos() + 1e-6).sqrt()
