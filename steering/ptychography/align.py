"""Compare two reconstructions of one object after removing the ambiguities of ptychography.

A reconstruction is known up to a small shift, a global phase and a linear phase ramp. All three are fitted to the
phases, within `max_shift`; the amplitude is never scaled.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_TAPS = 4
"""Half width of the Lanczos kernel that moves an image by a fraction of a pixel."""
_ROUNDS = 6
"""Of the least-squares fit; each one after the first corrects what is left by a fraction."""


def align(
    image: NDArray, reference: NDArray, *, weight: NDArray | None = None, max_shift: float = 5.0
) -> NDArray[np.complex64]:
    """The image with shift, global phase and linear phase ramp taken out with respect to the reference.

    image, reference: complex (Y, X). weight: (Y, X), 0 where a pixel must not count (pixels that are 0 or not finite
    in either never count). max_shift: pixels in y and in x; a larger shift is not removed.
    Returns complex64 (Y, X); where the shift brings in what lies outside the image, its border value stands.
    The shift is found by correlating phase gradients, which knows neither the global phase nor the ramp, and refined
    together with both by least squares on the phase difference.
    """
    return _aligned(*_checked(image, reference, weight, max_shift), max_shift)[0]


def phase_error(image: NDArray, reference: NDArray, *, weight: NDArray | None = None, max_shift: float = 5.0) -> float:
    """Weighted RMS phase difference in radians after `align`; NaN where no pixel can be compared."""
    image, reference, trusted = _checked(image, reference, weight, max_shift)
    aligned, inside = _aligned(image, reference, trusted, max_shift)
    total = float(inside.sum())
    if total == 0:
        return math.nan
    return float(np.sqrt((inside * np.angle(aligned * np.conj(reference)) ** 2).sum() / total))


def phase_correlation(
    image: NDArray, reference: NDArray, *, weight: NDArray | None = None, max_shift: float = 5.0
) -> float:
    """Weighted Pearson correlation of the phases after `align`; NaN where there is nothing to correlate.

    The plane that fits the reference's own phase is taken out of both, so that a ramp never counts as agreement.
    """
    image, reference, trusted = _checked(image, reference, weight, max_shift)
    aligned, inside = _aligned(image, reference, trusted, max_shift)
    if not (inside > 0).any():
        return math.nan
    phase = np.angle(_fitted(reference, np.ones_like(reference), inside, None, 0.0)[0])
    other = phase + np.angle(aligned * np.conj(reference))
    share = inside / inside.sum(dtype=np.float64)
    phase = phase - (share * phase).sum()
    other = other - (share * other).sum()
    spread = float((share * phase**2).sum() * (share * other**2).sum())
    return float((share * phase * other).sum() / math.sqrt(spread)) if spread > 1e-20 else math.nan


def _finite(image: NDArray) -> NDArray[np.complex64]:
    return np.where(np.isfinite(image), image, 0).astype(np.complex64)


def _checked(
    image: NDArray, reference: NDArray, weight: NDArray | None, max_shift: float
) -> tuple[NDArray[np.complex64], NDArray[np.complex64], NDArray[np.float32]]:
    if image.ndim != 2 or image.shape != reference.shape or (weight is not None and weight.shape != image.shape):
        shapes = (image.shape, reference.shape, None if weight is None else weight.shape)
        raise ValueError(f"found image, reference and weight of shapes {shapes}, expected one common (y, x)")
    if not 0 <= max_shift < min(image.shape) / 4:
        raise ValueError(f"found max_shift={max_shift} for an image of {image.shape}, expected 0 to a quarter of it")
    image, reference = _finite(image), _finite(reference)
    trusted = np.ones(image.shape, np.float32) if weight is None else np.nan_to_num(weight).astype(np.float32)
    return image, reference, np.where((image != 0) & (reference != 0), np.maximum(trusted, 0), 0).astype(np.float32)


def _gradients(image: NDArray) -> tuple[NDArray, NDArray]:
    """exp(i phase difference to the next pixel) in y and in x; the last row and column repeat the phase 0."""
    size = np.abs(image)
    unit = np.where(size > 0, image / np.where(size > 0, size, 1), 0)
    along_y, along_x = np.zeros_like(unit), np.zeros_like(unit)
    along_y[:-1] = unit[1:] * unit[:-1].conj()
    along_x[:, :-1] = unit[:, 1:] * unit[:, :-1].conj()
    return along_y, along_x


def _coarse_shift(image: NDArray, reference: NDArray, trusted: NDArray, max_shift: float) -> tuple[float, float]:
    """Whole-pixel (y, x) by which the image lies off the reference: the best normalised correlation of gradients."""
    reach = math.floor(max_shift)
    weight = np.zeros_like(trusted)
    inner = (slice(reach, -reach or None), slice(reach, -reach or None))
    weight[inner] = trusted[inner]
    total = np.zeros((2 * reach + 1, 2 * reach + 1))
    for moved, fixed in zip(_gradients(image), _gradients(reference), strict=True):
        w = weight * (np.abs(fixed) > 0)
        mean = (w * fixed).sum() / max(float(w.sum()), 1e-12)
        known = np.abs(moved) > 0
        centred = np.where(known, moved - (w * moved).sum() / max(float(w.sum()), 1e-12), 0)
        cross = _correlate(centred, w * (fixed - mean), reach)
        energy = _correlate(np.abs(centred) ** 2, w, reach).real
        total += np.abs(cross) / np.sqrt(np.maximum(energy, 1e-3 * energy.max() + 1e-12))
    y, x = np.unravel_index(int(total.argmax()), total.shape)
    return float(y - reach), float(x - reach)


def _correlate(moved: NDArray, fixed: NDArray, reach: int) -> NDArray:
    """sum over r of moved(r + s) conj(fixed(r)) for every whole shift s up to `reach`; fixed is 0 near the border."""
    spectrum = np.fft.fft2(moved) * np.fft.fft2(fixed).conj()
    steps = np.arange(-reach, reach + 1)
    return np.fft.ifft2(spectrum)[np.ix_(steps, steps)]


def _aligned(
    image: NDArray, reference: NDArray, trusted: NDArray, max_shift: float
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """The aligned image, and the weights without the border that the shift brought in."""
    if not (trusted > 0).any():
        return image, trusted
    return _fitted(image, reference, trusted, _coarse_shift(image, reference, trusted, max_shift), max_shift)


def _fitted(
    image: NDArray, reference: NDArray, trusted: NDArray, shift: tuple[float, float] | None, max_shift: float
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """The image after a weighted least-squares fit of phase, ramp and (unless shift is None) shift to the reference.

    Returns the image and the weights of the pixels that lay inside it before the shift.
    """
    here = np.zeros(2) if shift is None else np.array(shift)
    with_shift = shift is not None and max_shift > 0
    trusted = trusted * _inside(image.shape, here, 1.0 if with_shift else 0.0)
    moved = _moved(image, here)
    ramp = _first_ramp(moved, reference, trusted)
    y, x = (np.linspace(-0.5, 0.5, n) for n in image.shape)
    columns = [np.ones(image.shape), np.broadcast_to(y[:, None], image.shape), np.broadcast_to(x, image.shape)]
    if with_shift:
        columns += [np.angle(g) for g in _gradients(_smooth(reference))]
    used = trusted > 0
    basis = np.stack([c[used] for c in columns], 1)
    weighted = basis * trusted[used][:, None]
    gram = weighted.T @ basis
    gram += np.eye(len(gram)) * (1e-9 * np.trace(gram) + 1e-30)
    result = moved * ramp
    for _ in range(_ROUNDS):
        turn = np.angle((trusted * result * np.conj(reference)).sum())
        fit = np.linalg.solve(gram, weighted.T @ np.angle(result * np.conj(reference) * np.exp(-1j * turn))[used])
        ramp = ramp * np.exp(-1j * (turn + fit[0] + fit[1] * y[:, None] + fit[2] * x))
        if with_shift:
            here = np.clip(here - fit[3:], -max_shift, max_shift)
            moved = _moved(image, here)
        result = moved * ramp
    return result.astype(np.complex64), trusted * _inside(image.shape, here, 0.0)


def _inside(shape: tuple[int, ...], shift: NDArray, spare: float) -> NDArray[np.bool_]:
    """(Y, X), True where r + shift lies in the image, `spare` pixels from its border."""
    y, x = (
        (np.arange(n) + step >= spare) & (np.arange(n) + step <= n - 1 - spare)
        for n, step in zip(shape, shift, strict=True)
    )
    return y[:, None] & x


def _smooth(image: NDArray) -> NDArray:
    """A 3 x 3 mean: gradients of a noisy image pull a fitted shift towards 0."""
    rows = image + np.roll(image, 1, 0) + np.roll(image, -1, 0)
    return rows + np.roll(rows, 1, 1) + np.roll(rows, -1, 1)


def _first_ramp(image: NDArray, reference: NDArray, trusted: NDArray) -> NDArray[np.complex128]:
    """exp(-i ramp) (Y, X) from the highest peak of the spectrum of image * conj(reference), to half a bin."""
    product = trusted * image * np.conj(reference)
    padded = [2 * n for n in product.shape]
    peak = np.unravel_index(int(np.abs(np.fft.fft2(product, padded)).argmax()), padded)
    slope = [np.fft.fftfreq(n)[k] for n, k in zip(padded, peak, strict=True)]
    y, x = (np.arange(n)[:, None] for n in product.shape)
    return np.exp(-2j * np.pi * (slope[0] * y + slope[1] * x.T))


def _moved(image: NDArray, shift: NDArray) -> NDArray:
    """The image at r + shift, by Lanczos interpolation; its border values stand in for what is outside."""
    for axis, step in enumerate(shift):
        whole = math.floor(step)
        offset = np.arange(1 - _TAPS, _TAPS + 1) - (step - whole)
        kernel = np.sinc(offset) * np.sinc(offset / _TAPS)
        kernel /= kernel.sum()
        n = image.shape[axis]
        index = np.arange(n) + whole + 1 - _TAPS
        if step == 0:
            continue
        parts = (k * np.take(image, np.clip(index + j, 0, n - 1), axis) for j, k in enumerate(kernel) if abs(k) > 1e-9)
        image = sum(parts, start=np.zeros_like(image))
    return image
