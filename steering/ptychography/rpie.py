"""The regularised ptychographic iterative engine, batched: A. Maiden, D. Johnson and P. Li, Optica 4, 736 (2017).

With psi = probe * patch, and d the change of psi that gives its far field the measured amplitudes, the frames of a
batch update object += sum conj(probe) d / ((1 - alpha) S + alpha max(S, max |probe|^2)), S = sum |probe|^2, and the
probe likewise with the two exchanged. For one frame this is rPIE; where many frames overlap, S in place of the maximum
keeps their sum from overshooting. Masked pixels keep the amplitude of the model.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.ptychography.forward import shift_ramps
from steering.ptychography.trust import good_pixels, measured_amplitude

_BLOCK_PIXELS = 2**16
"""Frames of a batch go through the Fourier transforms in blocks of so many pixels, so that a block stays in cache."""
_CACHE_BYTES = 2**28
"""Up to here the amplitudes of all frames are kept, and while the probe is fixed their shifted probes; beyond, they are
made anew from the counts for each batch, so that a scan of 1e5 frames needs little more memory than its counts."""
_FRAMES_AT_ONCE = 64
"""When all frames are looked through."""


class Rpie:
    """Object and probe on their way to agreement with frames.

    counts: (n, N, N) of any real dtype, centred. mask: bool (N, N), True = do not use; None: all pixels count.
    corner, fraction: of `Canvas.corners`. object: (Y, X) complex64, changed in place. probe: (mode, N, N). Raises
    ValueError for counts that are negative or not finite.
    """

    def __init__(
        self,
        counts: NDArray,
        mask: NDArray[np.bool_] | None,
        corner: NDArray[np.int64],
        fraction: NDArray[np.float32],
        object: NDArray[np.complex64],
        probe: NDArray[np.complex64],
    ) -> None:
        window = probe.shape[-1]
        self.object = object
        self.probe = torch.from_numpy(np.array(probe, np.complex64))
        self.residual = torch.ones(len(corner))
        self._good = None if mask is None else torch.fft.ifftshift(good_pixels(mask, window))
        self._counts, self._mask = counts, mask
        self._amplitude: Tensor | None = None
        """(n, N, N), the zero frequency at the corner."""
        small = 4 * counts.size <= _CACHE_BYTES
        kept, power = [], []
        for start in range(0, len(counts), _FRAMES_AT_ONCE):
            block = self._measured(np.arange(start, min(start + _FRAMES_AT_ONCE, len(counts))))
            power.append(block.square().sum((1, 2)))
            kept += [block] if small else []
        if kept:
            self._amplitude = torch.cat(kept)
        self._power = torch.cat(power) if power else torch.zeros(0)
        self._corner = corner
        self._ramps = shift_ramps(torch.from_numpy(fraction), window)
        self._change = np.zeros_like(object)
        self._weight = np.zeros(object.shape, np.float32)
        # Keeps 0 / 0 away where the model has no light; a millionth of the mean amplitude changes no digit elsewhere.
        self._floor = 1e-6 * float(self._power.mean().sqrt()) / window + 1e-20
        self._known: Tensor | None = None
        self.probe_changed = False

    def with_light(self) -> NDArray[np.int64]:
        """The frames that have counts; the others hold no information."""
        return np.flatnonzero(self._power.numpy() > 0)

    def step(self, frames: NDArray[np.int64], alpha: float, probe_alpha: float | None = None) -> None:
        """Update the object by a batch of frames, and the probe too where `probe_alpha` is given."""
        window = self.probe.shape[-1]
        light = light_of(self.probe)
        tile = light.numpy()
        self._change.fill(0)
        self._weight.fill(0)
        probe_change = torch.zeros_like(self.probe)
        object_light = torch.zeros(window, window)
        block = max(1, _BLOCK_PIXELS // (window * window * len(self.probe)))
        for start in range(0, len(frames), block):
            here = frames[start : start + block]
            patches, probes, wave = self._revised(here)
            if probe_alpha is not None:
                spectrum = torch.fft.fft2(wave * patches.conj().unsqueeze(1))
                probe_change += self._shift(spectrum, here, back=True).sum(0)
                object_light += (patches * patches.conj()).real.sum(0)
            self._put(here, wave.mul_(probes.conj()).sum(1).numpy(), tile)
        weight = torch.from_numpy(self._weight)
        weight = weight.clamp_min(light.max()).mul_(alpha).add_(weight, alpha=1 - alpha)
        torch.from_numpy(self.object).add_(torch.from_numpy(self._change).mul_(weight.reciprocal_()))
        if probe_alpha is not None:
            weight = (1 - probe_alpha) * object_light + probe_alpha * object_light.max()
            self.probe += torch.fft.ifft2(probe_change) / weight.clamp_min(1e-20)
            self.probe_changed = True

    def measure_residuals(self) -> None:
        """Measure the residual of every frame; object and probe stay as they are."""
        for start in range(0, len(self._corner), 16):
            self._revised(np.arange(start, min(start + 16, len(self._corner))))

    def illumination(self) -> NDArray[np.float32]:
        """(Y, X), illumination of each pixel summed over all frames, relative to the probe's highest intensity."""
        light = light_of(self.probe)
        tile = (light / light.max()).numpy()
        window = len(tile)
        total = np.zeros(self.object.shape, np.float32)
        for y, x in self._corner.tolist():
            total[y : y + window, x : x + window] += tile
        return total

    def _revised(self, frames: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (b, N, N), shifted probes and the change of psi that the frames ask for, both (b, m, N, N)."""
        corner = self._corner[frames]
        windows = np.lib.stride_tricks.sliding_window_view(self.object, self.probe.shape[-2:])
        patches = torch.from_numpy(windows[corner[:, 0], corner[:, 1]])
        probes = self._probes(frames)
        wave = torch.fft.fft2(patches.unsqueeze(1) * probes, norm="ortho")
        light = (wave * wave.conj()).real
        light = light.sum(1) if light.shape[1] > 1 else light[:, 0]
        measured = self._measured(frames)
        model = light.sqrt()
        seen = light if self._good is None else light * self._good
        cross = (model * measured).sum((1, 2)).square()
        power = (seen.sum((1, 2)) * self._power[frames]).clamp_min(1e-30)
        self.residual[frames] = (1 - cross / power).clamp(0, 1)
        ratio = measured.div_(model.add_(self._floor)).sub_(1)
        if self._good is not None:
            ratio *= self._good
        return patches, probes, torch.fft.ifft2(wave.mul_(ratio.unsqueeze(1)), norm="ortho")

    def _measured(self, frames: NDArray[np.int64]) -> Tensor:
        """Amplitudes (b, N, N) of these frames, a copy: 0 on masked pixels, the zero frequency at the corner."""
        if self._amplitude is not None:
            return self._amplitude[frames]
        return torch.fft.ifftshift(measured_amplitude(self._counts[frames], self._mask), dim=(-2, -1))

    def _probes(self, frames: NDArray[np.int64]) -> Tensor:
        if self.probe_changed:
            self._known = None
        elif self._known is None and 8 * len(self._corner) * self.probe.numel() <= _CACHE_BYTES:
            self._known = torch.empty(len(self._corner), *self.probe.shape, dtype=torch.complex64)
            spectrum = torch.fft.fft2(self.probe)
            for k in range(0, len(self._corner), 16):
                some = np.arange(k, min(k + 16, len(self._corner)))
                self._known[some] = torch.fft.ifft2(self._shift(spectrum, some))
        if self._known is not None:
            return self._known[frames]
        return torch.fft.ifft2(self._shift(torch.fft.fft2(self.probe), frames))

    def _shift(self, spectrum: Tensor, frames: NDArray[np.int64], *, back: bool = False) -> Tensor:
        along_y, along_x = (ramp[frames].unsqueeze(1) for ramp in self._ramps)
        if back:
            along_y, along_x = along_y.conj(), along_x.conj()
        return (spectrum * along_y.unsqueeze(3)).mul_(along_x.unsqueeze(2))

    def _put(self, frames: NDArray[np.int64], part: NDArray[np.complex64], tile: NDArray[np.float32]) -> None:
        # A slice per frame in numpy: faster on a CPU than index_add_ on flat views, and the sum has a fixed order.
        window = len(tile)
        for (y, x), change in zip(self._corner[frames].tolist(), part, strict=True):
            here = (slice(y, y + window), slice(x, x + window))
            self._change[here] += change
            self._weight[here] += tile


def light_of(probe: Tensor) -> Tensor:
    """(N, N), intensity of a probe (mode, N, N) summed over modes."""
    return (probe * probe.conj()).real.sum(0)
