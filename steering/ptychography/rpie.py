"""The regularised ptychographic iterative engine, batched: A. Maiden, D. Johnson and P. Li, Optica 4, 736 (2017).

With psi = probe * patch, and d the change of psi that gives its far field the measured amplitudes, the frames of a
batch update object += sum conj(probe) d / ((1 - alpha) S + alpha max(S, max |probe|^2)), S = sum |probe|^2, and the
probe likewise with the two exchanged. For one frame this is rPIE; where many frames overlap, S in place of the maximum
keeps their sum from overshooting. Masked pixels keep the amplitude of the model. A position moves, where that is asked
for, by the step whose product with probe * gradient of the patch is nearest to d.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.ptychography.forward import shift_ramps
from steering.ptychography.trust import good_pixels, measured_amplitude
from steering.ptychography.windows import DeviceWindows, HostWindows, Windows

_BLOCK_PIXELS = {"cpu": 2**16, "cuda": 2**24}
"""Frames of a batch go through the Fourier transforms in blocks of so many pixels: on a CPU so that a block stays in
cache, on a GPU as many as fill it."""
_CACHE_BYTES = 2**28
"""Up to here the amplitudes of all frames are kept, and while the probe is fixed their shifted probes; beyond, they are
made anew from the counts for each batch, so that a scan of 1e5 frames needs little more memory than its counts."""
_FARTHEST, _STEP = 5.0, 0.5
"""Object pixels by which a position is moved at most, in all and at once."""
_FRAMES_AT_ONCE = 64
"""When all frames are looked through."""


class Rpie:
    """Object and probe on their way to agreement with frames.

    counts: (n, N, N) of any real dtype, centred. mask: bool (N, N), True = do not use; None: all pixels count.
    corner, fraction: of `Canvas.corners`. object: (Y, X) complex64; on the CPU it is changed in place. probe: (mode, N,
    N). device: where all of it is computed. Raises ValueError for counts that are negative or not finite.
    """

    def __init__(
        self,
        counts: NDArray,
        mask: NDArray[np.bool_] | None,
        corner: NDArray[np.int64],
        fraction: NDArray[np.float32],
        object: NDArray[np.complex64],
        probe: NDArray[np.complex64],
        device: torch.device | None = None,
    ) -> None:
        window = probe.shape[-1]
        self.device = torch.device("cpu") if device is None else device
        self._windows: Windows = (
            HostWindows(object) if self.device.type == "cpu" else DeviceWindows(object, self.device)
        )
        self.probe = torch.from_numpy(np.array(probe, np.complex64)).to(self.device)
        self.residual = torch.ones(len(corner), device=self.device)
        self._good = None if mask is None else torch.fft.ifftshift(good_pixels(mask, window)).to(self.device)
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
        self._power = torch.cat(power) if power else torch.zeros(0, device=self.device)
        self._corner, self._shape = corner, object.shape
        self._fraction = torch.from_numpy(fraction).to(self.device)
        self._ramps = shift_ramps(self._fraction, window)
        self.moved = torch.zeros_like(self._fraction)
        """(n, 2) by which the positions were corrected, object pixels."""
        # Keeps 0 / 0 away where the model has no light; a millionth of the mean amplitude changes no digit elsewhere.
        self._floor = 1e-6 * float(self._power.mean().sqrt()) / window + 1e-20
        self._known: Tensor | None = None
        self.probe_changed = False

    @property
    def object(self) -> NDArray[np.complex64]:
        """(Y, X), on the host."""
        return self._windows.object()

    def with_light(self) -> NDArray[np.int64]:
        """The frames that have counts; the others hold no information."""
        return np.flatnonzero(self._power.cpu().numpy() > 0)

    def step(
        self, frames: NDArray[np.int64], alpha: float, probe_alpha: float | None = None, *, move: bool = False
    ) -> None:
        """Update the object by a batch of frames, and the probe too where `probe_alpha` is given; move: and where the
        frames are."""
        window = self.probe.shape[-1]
        light = light_of(self.probe)
        self._windows.begin()
        steps: list[Tensor] = []
        probe_change = torch.zeros_like(self.probe)
        object_light = torch.zeros(window, window, device=self.device)
        block = max(1, _BLOCK_PIXELS[self.device.type] // (window * window * len(self.probe)))
        for start in range(0, len(frames), block):
            here = frames[start : start + block]
            patches, probes, wave = self._revised(here)
            steps += [_step(patches, probes, wave)] if move else []
            if probe_alpha is not None:
                spectrum = torch.fft.fft2(wave * patches.conj().unsqueeze(1))
                probe_change += self._shift(spectrum, here, back=True).sum(0)
                object_light += (patches * patches.conj()).real.sum(0)
            self._windows.add(self._corner[here], wave.mul_(probes.conj()).sum(1), light)
        self._windows.apply(alpha, light.max())
        if probe_alpha is not None:
            weight = (1 - probe_alpha) * object_light + probe_alpha * object_light.max()
            self.probe += torch.fft.ifft2(probe_change) / weight.clamp_min(1e-20)
            self.probe_changed = True
        if steps:
            self._move(frames, torch.cat(steps))

    def _move(self, frames: NDArray[np.int64], step: Tensor) -> None:
        """Move these frames (b, 2), and not all of them together: that is the object's to do."""
        step = step.clamp(-_STEP, _STEP)
        self.moved[frames] = (self.moved[frames] + step - step.mean(0)).clamp(-_FARTHEST, _FARTHEST)
        window = self.probe.shape[-1]
        for ramp, new in zip(
            self._ramps, shift_ramps(self._fraction[frames] + self.moved[frames], window), strict=True
        ):
            ramp[frames] = new
        self.probe_changed = True  # where it lies in each window

    def measure_residuals(self) -> None:
        """Measure the residual of every frame; object and probe stay as they are."""
        for start in range(0, len(self._corner), 16):
            self._revised(np.arange(start, min(start + 16, len(self._corner))))

    def illumination(self) -> NDArray[np.float32]:
        """(Y, X), illumination of each pixel summed over all frames, relative to the probe's highest intensity."""
        light = light_of(self.probe)
        tile = (light / light.max()).cpu().numpy()
        window = len(tile)
        total = np.zeros(self._shape, np.float32)
        for y, x in self._corner.tolist():
            total[y : y + window, x : x + window] += tile
        return total

    def _revised(self, frames: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (b, N, N), shifted probes and the change of psi that the frames ask for, both (b, m, N, N)."""
        patches = self._windows.take(self._corner[frames], self.probe.shape[-1])
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
        measured = measured_amplitude(self._counts[frames], self._mask).to(self.device)
        return torch.fft.ifftshift(measured, dim=(-2, -1))

    def _probes(self, frames: NDArray[np.int64]) -> Tensor:
        if self.probe_changed:
            self._known = None
        elif self._known is None and 8 * len(self._corner) * self.probe.numel() <= _CACHE_BYTES:
            shape = (len(self._corner), *self.probe.shape)
            self._known = torch.empty(shape, dtype=torch.complex64, device=self.device)
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


def _step(patches: Tensor, probes: Tensor, wave: Tensor) -> Tensor:
    """(b, 2) by which each position moves. patches: (b, N, N); probes and the change of psi: (b, m, N, N)."""
    down, right = (
        (probes * (0.5 * (patches.roll(-1, axis) - patches.roll(1, axis))).unsqueeze(1)).flatten(1) for axis in (1, 2)
    )
    wanted = wave.flatten(1)
    yy, xx, yx = (_dot(a, b) for a, b in ((down, down), (right, right), (down, right)))
    y, x = _dot(down, wanted), _dot(right, wanted)
    # Where the patch changes along one direction only, the position along the other is not known.
    damp = 1e-2 * (yy + xx) + 1e-30
    determinant = (yy + damp) * (xx + damp) - yx.square()
    return torch.stack([(xx + damp) * y - yx * x, (yy + damp) * x - yx * y], 1) / determinant[:, None]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """(b,) real part of the inner product of two (b, k)."""
    return (one.conj() * other).real.sum(1)


def light_of(probe: Tensor) -> Tensor:
    """(N, N), intensity of a probe (mode, N, N) summed over modes."""
    return (probe * probe.conj()).real.sum(0)
