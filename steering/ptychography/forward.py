"""From the object to the frame: the far-field forward model, its adjoint, and the sub-pixel shift of the probe.

psi = probe * patch at each position, frame = sum over modes of |FFT psi|^2. FFTs are orthonormal, so the energy of the
frame is the energy of psi. The centre of a window and the zero frequency both stand at pixel N // 2.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from steering.records import Canvas

_AXES = (-2, -1)
_FRAMES_AT_ONCE = 64
"""Keeps the working set of `simulate` near the processor's cache, whatever the number of frames."""


def diffract(patches: Tensor, probe: Tensor) -> Tensor:
    """Far-field wave behind each patch: orthonormal FFT of probe * patch, zero frequency centred.

    patches: (n, N, N) complex. probe: (m, N, N) or (n, m, N, N) complex. Returns (n, m, N, N) complex.
    """
    exit_wave = patches.unsqueeze(1) * probe
    spectrum = torch.fft.fft2(torch.fft.ifftshift(exit_wave, dim=_AXES), norm="ortho")
    return torch.fft.fftshift(spectrum, dim=_AXES)


def backpropagate(wave: Tensor, probe: Tensor) -> Tensor:
    """Adjoint of `diffract` with respect to the patches: sum over modes of conj(probe) * inverse FFT.

    wave: (n, m, N, N) complex. probe: (m, N, N) or (n, m, N, N) complex. Returns (n, N, N) complex.
    """
    exit_wave = torch.fft.ifft2(torch.fft.ifftshift(wave, dim=_AXES), norm="ortho")
    return (probe.conj() * torch.fft.fftshift(exit_wave, dim=_AXES)).sum(1)


def shift_probe(probe: Tensor, fraction: Tensor) -> Tensor:
    """The probe moved by a fraction of a pixel, once for each frame, by a phase ramp on its Fourier transform.

    probe: (m, N, N) complex. fraction: (n, 2) of (y, x), object pixels. Returns (n, m, N, N) complex.
    """
    along_y, along_x = shift_ramps(fraction, probe.shape[-1], probe.dtype)
    ramp = along_y[:, None, :, None] * along_x[:, None, None, :]
    return torch.fft.ifft2(torch.fft.fft2(probe) * ramp)


def shift_ramps(fraction: Tensor, window: int, dtype: torch.dtype = torch.complex64) -> tuple[Tensor, Tensor]:
    """Factors along y and along x, (n, N) each, zero frequency first, that shift a transform by fraction (n, 2)."""
    frequency = torch.fft.fftfreq(window, dtype=torch.float64, device=fraction.device)
    angle = -2 * torch.pi * fraction.to(torch.float64).T[:, :, None] * frequency
    ramps = torch.polar(torch.ones_like(angle), angle).to(dtype)
    return ramps[0], ramps[1]


def simulate(
    object: NDArray, probe: NDArray[np.complex64], canvas: Canvas, positions_px: ArrayLike
) -> NDArray[np.float32]:
    """Expected counts of the frames at these positions; draw them from a Poisson law for a measurement.

    object: complex (Y, X) on the canvas. probe: complex64 (mode, y, x). positions_px: (n, 2) of (y, x), object
    pixels. Returns (n, N, N) float32, zero frequency centred. The window stands at the nearest whole pixel and the
    probe is shifted by the rest, which is exact for a probe that fits its window.
    Raises ValueError for a position whose window leaves the canvas.
    """
    if object.shape != canvas.shape:
        raise ValueError(f"found an object of shape {object.shape}, expected the canvas's {canvas.shape}")
    window = probe.shape[-1]
    corner, fraction = canvas.corners(positions_px, window)
    windows = np.lib.stride_tricks.sliding_window_view(object, (window, window))
    modes = torch.from_numpy(np.ascontiguousarray(probe, np.complex64))
    counts = np.empty((len(corner), window, window), np.float32)
    for start in range(0, len(corner), _FRAMES_AT_ONCE):
        part = slice(start, start + _FRAMES_AT_ONCE)
        patches = torch.from_numpy(windows[corner[part, 0], corner[part, 1]].astype(np.complex64))
        wave = diffract(patches, shift_probe(modes, torch.from_numpy(fraction[part])))
        counts[part] = intensity(wave).numpy()
    return counts


def far_field_amplitude(patches: Tensor, probe: Tensor) -> Tensor:
    """Square root of the `intensity` of what `diffract` returns, (n, N, N) real, for the same arguments.

    In half the time: where the window's centre stands changes the far field's phase only.
    """
    wave = torch.fft.fft2(patches.unsqueeze(1) * probe, norm="ortho")
    return torch.fft.fftshift(torch.linalg.vector_norm(wave, dim=1), dim=_AXES)


def intensity(wave: Tensor) -> Tensor:
    """Sum over modes of |wave|^2: (n, m, N, N) complex to (n, N, N) real."""
    return (wave * wave.conj()).real.sum(1)
