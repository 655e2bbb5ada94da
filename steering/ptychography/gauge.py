"""The ambiguities that frames leave between object and probe, held where they were at the start.

Moving both, tilting both against each other, scaling one up and the other down, turning their phases against each
other, or mixing the modes of the probe leaves every frame as it is. An update of both drifts along these directions
unless something holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_SHIFT = 0.01
"""Pixels of drift below which nothing is moved: a shift by Fourier transform touches every pixel of the canvas."""


@dataclass(frozen=True, eq=False)
class Gauge:
    """Where a probe stands."""

    centre: Tensor
    """(2,) centre (y, x) of the squared intensity, pixels; the square leaves out the faint light far from the beam."""
    tilt: Tensor
    """(2,) centre (y, x) of the far field's squared intensity, cycles per pixel."""
    power: float
    first: Tensor
    """(N, N), the first mode, for the global phase."""

    @classmethod
    def of(cls, probe: Tensor) -> Gauge:
        """The gauge of a probe (mode, N, N) complex."""
        power = float((probe * probe.conj()).real.sum())
        return cls(_centre(probe), _tilt(probe), power, probe[0].clone())

    def hold(self, object: Tensor, probe: Tensor) -> None:
        """Bring the probe (mode, N, N) back to this gauge and take the object (Y, X) along, both in place."""
        probe.copy_(_unmixed(probe))
        step = self.centre - _centre(probe)
        if float(step.norm()) > _LEAST_SHIFT:
            probe.copy_(_shifted(probe, step))
            object.copy_(_shifted(object, step))
        cycles = self.tilt - _tilt(probe)
        probe.copy_(_tilted(probe, cycles))
        object.copy_(_tilted(object, -cycles))
        turn = torch.vdot(probe[0].flatten(), self.first.flatten())
        power = float((probe * probe.conj()).real.sum())
        factor = turn / turn.abs().clamp_min(1e-30) * (self.power / max(power, 1e-30)) ** 0.5
        probe *= factor
        object /= factor


def _unmixed(probe: Tensor) -> Tensor:
    """The same incoherent sum by orthogonal modes, the strongest first."""
    if len(probe) == 1:
        return probe
    flat = probe.flatten(1)
    _, mixing = torch.linalg.eigh(flat.conj() @ flat.T)
    return (mixing.T.flip(0) @ flat).reshape(probe.shape)


def _centre(wave: Tensor) -> Tensor:
    weight = (wave * wave.conj()).real.sum(0).to(torch.float64).square()
    steps = torch.arange(len(weight), dtype=torch.float64) - len(weight) // 2
    return torch.stack([(weight.sum(1) * steps).sum(), (weight.sum(0) * steps).sum()]) / weight.sum()


def _tilt(probe: Tensor) -> Tensor:
    spectrum = torch.fft.fftshift(torch.fft.fft2(probe, norm="ortho"), dim=(-2, -1))
    return _centre(spectrum) / probe.shape[-1]


def _turned(wave: Tensor, angles: list[Tensor]) -> Tensor:
    along_y, along_x = (torch.polar(torch.ones_like(a), a).to(wave.dtype) for a in angles)
    return wave * along_y[:, None] * along_x


def _shifted(wave: Tensor, step: Tensor) -> Tensor:
    angles = [
        -2 * torch.pi * s * torch.fft.fftfreq(n, dtype=torch.float64)
        for n, s in zip(wave.shape[-2:], step, strict=True)
    ]
    return torch.fft.ifft2(_turned(torch.fft.fft2(wave), angles))


def _tilted(wave: Tensor, cycles: Tensor) -> Tensor:
    angles = [
        2 * torch.pi * c * (torch.arange(n, dtype=torch.float64) - n // 2)
        for n, c in zip(wave.shape[-2:], cycles, strict=True)
    ]
    return _turned(wave, angles)
