"""The far-field residual due to photon noise alone, so that a change of flux does not look like a bad model.

There are two floors, the residuals that a perfect patch leaves. `expected_floor` is for frames that are still to be
measured: it computes the expected counts from patch and probe. `poisson_floor` is for a measured frame: its expected
counts are not known, and each pixel's own count stands for them. Over frames of one patch the mean of the second equals
the first within 2 %, from 300 to 1e6 counts a frame.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from steering.ptychography.forward import diffract, intensity
from steering.ptychography.trust import fill_up, good_pixels

_BRIGHT = 40.0
"""Counts above which the asymptotic series of g is exact to 1e-6."""
LOSS_OF_FEW = (0.0, 0.794, -0.733, 1.069, -0.243)
"""Of `poisson_floor`: the loss that a pixel of 0, 1, ... 4 counts stands for; more counts follow the series."""
LEAST_ROOM = 0.5
"""Of 1 less the Poisson floor, below which a frame is no evidence: for a beam on 1500 pixels, 600 counts."""


def expected_floor(
    patches: NDArray, probe: NDArray[np.complex64], mask: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """The mean far-field residual that counting noise leaves where the patches are the truth.

    patches: complex (n, h, w), filled up to the window by their edge values. probe: complex64 (mode, N, N), its power
    the counts of a frame on a transparent object: for another dwell, scale it by the root of the ratio. mask: bool
    (N, N), True = do not use. Returns (n,), 1 for a frame that no light reaches.

    Derivation, ours. A frame of expected counts lambda_i, summing to L, is drawn as I_i ~ Poisson(lambda_i). The
    residual of the perfect model is 1 - (sum sqrt(lambda_i I_i))^2 / (L sum I_i): the squared sine of the angle between
    the vectors sqrt(lambda) and sqrt(I). With g(lambda) = E sqrt(I), E I = lambda and independent pixels,

        E (sum sqrt(lambda_i I_i))^2 = (sum sqrt(lambda_i) g_i)^2 + sum lambda_i (lambda_i - g_i^2),

    and to first order in 1 / L the mean of the ratio is the ratio of the means:

        floor = 1 - [(sum sqrt(lambda_i) g_i)^2 + sum lambda_i (lambda_i - g_i^2)] / L^2.

    For m pixels that are all bright it is (m - 1) / (4 L): the variance of sqrt(I) is 1/4 (Anscombe, Biometrika 35, 246
    (1948)). In pixels of few counts the noise is larger and is not 1/4, so g is summed exactly there.
    """
    window = probe.shape[-1]
    good = good_pixels(mask, window).numpy() > 0
    whole = torch.from_numpy(fill_up(np.asarray(patches, np.complex64), window))
    expected = intensity(diffract(whole, torch.from_numpy(np.ascontiguousarray(probe, np.complex64))))
    counts = expected.numpy()[:, good].astype(np.float64)
    root = _mean_root(counts)
    total = np.maximum(counts.sum(1), 1e-30)
    along = (np.sqrt(counts) * root).sum(1) ** 2 + (counts * (counts - root**2)).sum(1)
    return np.clip(1 - along / total**2, 0, 1).astype(np.float32)


def _mean_root(expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """E sqrt(I) of I ~ Poisson(expected), elementwise."""
    nodes, values = _table()
    bright = np.maximum(expected, _BRIGHT)
    series = np.sqrt(bright) * (1 - 1 / (8 * bright) - 7 / (128 * bright**2))
    return np.where(expected > _BRIGHT, series, np.interp(np.sqrt(expected), nodes, values))


@cache
def _table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """sqrt(expected) from 0 to that of _BRIGHT, and E sqrt(I) there, summed over all counts that matter."""
    nodes = np.linspace(0, np.sqrt(_BRIGHT), 600)
    counts = np.arange(1, 130)
    log_factorial = np.cumsum(np.log(counts))
    with np.errstate(divide="ignore"):
        log_share = counts * np.log(nodes[:, None] ** 2) - nodes[:, None] ** 2 - log_factorial
    return nodes, (np.exp(log_share) * np.sqrt(counts)).sum(1)


def poisson_floor(counts: NDArray, mask: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The far-field residual that photon noise alone gives a frame, were its predicted patch perfect.

    counts: (n, N, N) of any real dtype. mask: bool (N, N), True = do not use. Returns (n,): near 0 for many counts,
    towards 1 for few, 1 for none.

    A perfect patch explains sum sqrt(L) E[sqrt(I)] of the light sum L, where L are the pixels' expected counts and I
    the Poisson numbers that are measured. What a pixel loses, h(L) = L - sqrt(L) E[sqrt(I)], is 1/8 + 7/(128 L) for
    large L (Anscombe, Biometrika 35, 246 (1948)) and L for small. L is not known: each measured number stands for the
    loss whose mean over the Poisson law is h(L); the first four are a least-squares fit, within 0.015 and 16 %.
    """
    seen = _good_counts(counts, mask)
    lost = _losses().take(np.clip(seen, 0, 255).astype(np.uint8)).sum((-2, -1))
    light = seen.sum((-2, -1), dtype=np.float64)
    kept = 1 - lost / np.maximum(light, 1e-30)
    return np.where(light > 0, 1 - np.clip(kept, 0, 1) ** 2, 1.0)


@cache
def _losses() -> NDArray[np.float32]:
    """Of 0 to 255 counts; of more hardly less."""
    series = 1 / 8 + 7 / (128 * np.arange(len(LOSS_OF_FEW), 256))
    return np.concatenate([LOSS_OF_FEW, series]).astype(np.float32)


def _good_counts(counts: NDArray, mask: NDArray[np.bool_] | None) -> NDArray:
    """The counts, 0 on masked pixels."""
    if mask is None or not mask.any():
        return counts
    return np.where(good_pixels(mask, counts.shape[-1]).numpy() > 0, counts, 0)


def above_floor(residual: ArrayLike, floor: ArrayLike, noise_share: float = 1.0) -> NDArray[np.float64]:
    """The far-field residual (n,) that noise-free frames would show, from a measured one and its Poisson floor.

    Noise lowers the agreement 1 - residual by the factor 1 - floor whatever the patch, as unreliable measurement lowers
    any correlation (Spearman, Am. J. Psychol. 15, 72 (1904)); dividing by it leaves a residual that a change of flux
    does not move. A patch that was made from the frame's own counts has fitted part of their noise: `noise_share` is
    the part that is left, 1 for a patch that knows nothing of them (see `share_of_noise`).
    NaN where the floor is above one half: noise dominates such a frame.
    """
    room = 1 - np.asarray(floor, np.float64)
    usable = room >= LEAST_ROOM
    agreement = (1 - np.asarray(residual, np.float64)) / np.where(usable, room, 1.0) ** noise_share
    return np.where(usable, 1 - agreement, np.nan)


def thinned(counts: NDArray, mask: NDArray[np.bool_] | None = None, *, kept: float = 0.75) -> NDArray[np.float32]:
    """The frames (n, N, N) had only the share `kept` of their photons come: each photon stays by chance, always the
    same ones. 0 on masked pixels.

    Keep most: what many fewer photons do to a network's errors is no longer what noise does to its residual.
    """
    light = np.rint(_good_counts(counts, mask)).astype(np.int64)
    return np.random.default_rng(0).binomial(light, kept).astype(np.float32)


def share_of_noise(residual: NDArray, floor: NDArray, thinned_residual: NDArray, thinned_floor: NDArray) -> float:
    """How much of the Poisson floor a network's residuals show, 0..1; the rest of the noise its patches have fitted.

    residual, floor: (n,) of frames as measured. The thinned ones: of the same frames `thinned`, predicted anew.
    Returns the median ratio of what both have changed; 1 where no frame has counts enough to be thinned.
    """
    usable = thinned_floor <= 1 - LEAST_ROOM
    if not usable.any():
        return 1.0
    lost = np.log((1 - residual[usable]) / np.maximum(1 - thinned_residual[usable], 1e-6))
    by_noise = np.log((1 - floor[usable]) / (1 - thinned_floor[usable]))
    return float(np.clip(np.median(lost / np.maximum(by_noise, 1e-9)), 0.0, 1.0))


def no_evidence(counts: NDArray, floor: NDArray, mask: NDArray[np.bool_] | None = None) -> tuple[str, ...]:
    """For each of the frames (n, N, N) why nothing can be concluded from it: "no counts", "too few counts",
    "saturated"; empty where it is fit to judge by.

    floor: (n,) their Poisson floor. A pixel is saturated where it reads the highest integer that there is.
    """
    full = np.zeros(len(counts), bool)
    if np.issubdtype(counts.dtype, np.integer):
        full = _good_counts(counts, mask).max((-2, -1), initial=0) == np.iinfo(counts.dtype).max
    found = np.select([floor >= 1, full, floor > 1 - LEAST_ROOM], ["no counts", "saturated", "too few counts"], "")
    return tuple(found.tolist())
