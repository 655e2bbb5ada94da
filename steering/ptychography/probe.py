"""Where a probe comes from: a zone plate's focus, a guess brought to the measured flux, further modes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def zone_plate(
    window: int,
    defocus: float,
    *,
    wavelength: float = 1.0,
    object_pixel: float = 1.0,
    aperture: float = 0.3,
    stop: float = 0.3,
    counts: float = 1e6,
) -> NDArray[np.complex64]:
    """The illumination behind a Fresnel zone plate with a central stop, at a distance from its focus.

    window: pixels of a side. defocus, wavelength, object_pixel: metres; left at 1, wavelength and pixel make defocus a
    multiple of object_pixel^2 / wavelength. aperture: the plate's outermost frequency as a share of the window's
    highest (its outermost zone is object_pixel / aperture wide). stop: diameter of the central stop as a share of the
    plate's. counts: photons of a frame on a transparent object.
    The light is a ring of outer diameter wavelength * defocus * aperture / object_pixel, blurred by diffraction.
    Returns complex64 (1, window, window). Raises ValueError for a beam wider than its window.
    """
    if not (0 < aperture <= 1 and 0 <= stop < 1 and counts > 0):
        raise ValueError(
            f"found aperture={aperture}, stop={stop}, counts={counts}; "
            "expected 0 < aperture <= 1, 0 <= stop < 1, counts > 0"
        )
    diameter = wavelength * abs(defocus) * aperture / object_pixel**2
    if diameter > 0.9 * window:
        raise ValueError(
            f"found a beam {diameter:.0f} pixels wide, expected less than 0.9 of the window's {window}: "
            "lower the defocus or widen the window"
        )
    frequency = np.fft.fftfreq(window, object_pixel)
    squared = frequency[:, None] ** 2 + frequency[None, :] ** 2
    radius = np.sqrt(squared) * 2 * object_pixel / aperture
    # Half a pixel of softness at the rims: a hard rim on a coarse grid would throw light all over the window.
    soft = 2 / (window * aperture)
    pupil = np.clip((1 - radius) / soft + 0.5, 0, 1)
    if stop:
        pupil *= np.clip((radius - stop) / soft + 0.5, 0, 1)
    wave = np.fft.fftshift(np.fft.ifft2(pupil * np.exp(-1j * np.pi * wavelength * defocus * squared)))
    return (wave * np.sqrt(counts / (np.abs(wave) ** 2).sum()))[None].astype(np.complex64)


def beam_diameter(probe: NDArray[np.complex64]) -> float:
    """Diameter, object pixels, of the disc of even light with the same (sum I)^2 / sum I^2 as the probe's intensity I.

    probe: complex (mode, N, N); I is summed over its modes.
    """
    light = (np.abs(probe) ** 2).sum(0, dtype=np.float64)
    return float(np.sqrt(4 / np.pi * light.sum() ** 2 / (light**2).sum()))


def rescale_probe(
    probe: NDArray[np.complex64], counts: NDArray, mask: NDArray[np.bool_] | None = None
) -> NDArray[np.complex64]:
    """The probe scaled to the measured power: sum |probe|^2 is the counts of a bright frame.

    probe: complex (mode, N, N), its power arbitrary. counts: (n, N, N). mask: bool (N, N), True = do not use. The
    brightest tenth of the frames stands for the transparent object; pixels under the mask are left out on both sides.
    Raises ValueError for a probe or frames without light.
    """
    good = np.ones(probe.shape[-2:], bool) if mask is None else ~mask
    measured = np.quantile(np.where(good, counts, 0).sum((1, 2), dtype=np.float64), 0.9)
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(probe, axes=(-2, -1)), norm="ortho"), axes=(-2, -1))
    power = (np.abs(spectrum) ** 2).sum(0)[good].sum(dtype=np.float64)
    if not (measured > 0 and power > 0):
        raise ValueError(
            f"found {measured:.3g} counts in a frame and a probe of power {power:.3g}, expected both above 0"
        )
    return (probe * np.sqrt(measured / power)).astype(np.complex64)


def aim_probe(
    probe: NDArray[np.complex64], counts: NDArray, mask: NDArray[np.bool_] | None = None
) -> NDArray[np.complex64]:
    """The probe tilted so that its far field falls where the frames are brightest on average.

    probe: complex (mode, N, N). counts: (n, N, N). mask: bool (N, N), True = do not use. Probe and object share one
    tilt between them; what the probe does not take, the object shows as a phase ramp, which wraps around and hides
    everything else. Both centres are those of the squared intensity, which leaves the faint background out.
    """
    good = np.ones(probe.shape[-2:], bool) if mask is None else ~mask
    steps = np.arange(probe.shape[-1]) - probe.shape[-1] // 2
    wanted = _centre(np.where(good, counts, 0).mean(0, dtype=np.float64), steps)
    for _ in range(3):  # the mask is blind to part of the far field until it has moved
        spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(probe, axes=(-2, -1))), axes=(-2, -1))
        found = _centre(np.where(good, (np.abs(spectrum) ** 2).sum(0), 0), steps)
        y, x = (np.exp(2j * np.pi * d * steps / probe.shape[-1]) for d in wanted - found)
        probe = probe * y[:, None] * x
    return probe.astype(np.complex64)


def _centre(intensity: NDArray, steps: NDArray) -> NDArray[np.float64]:
    weight = intensity**2
    return np.array([(weight.sum(1) * steps).sum(), (weight.sum(0) * steps).sum()]) / weight.sum()


def add_modes(probe: NDArray[np.complex64], n: int, *, share: float = 0.05) -> NDArray[np.complex64]:
    """The probe with `n` incoherent modes in all, each further one a start for `refine` to improve.

    probe: complex64 (mode, N, N). The new modes are the first mode times a low polynomial in y and x (as the modes of a
    partly coherent source are), orthogonal to the ones before, each with `share` of the total power, which is kept.
    """
    have, window = probe.shape[0], probe.shape[-1]
    if n < have or not 0 <= share * (n - have) < 1:
        raise ValueError(
            f"found n={n} and share={share} for {have} modes, expected n >= {have}, new shares below 1 in all"
        )
    power = float((np.abs(probe) ** 2).sum())
    ramp = (np.arange(window) - window // 2) / window
    orders = [(j, total - j) for total in range(1, n + 1) for j in range(total + 1)]
    modes = [probe[k].astype(np.complex128) for k in range(have)]
    for oy, ox in orders[: n - have]:
        mode = modes[0] * ramp[:, None] ** oy * ramp[None, :] ** ox
        for other in modes:
            mode = mode - other * np.vdot(other, mode) / np.vdot(other, other).real
        modes.append(mode * np.sqrt(share * power) / np.linalg.norm(mode))
    scale = np.sqrt(1 - share * (n - have))
    return np.stack([m * scale for m in modes[:have]] + modes[have:]).astype(np.complex64)
