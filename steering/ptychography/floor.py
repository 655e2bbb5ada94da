"""What counting noise alone leaves of the far-field residual: nothing that could be reconstructed is below it.

Derivation, ours. A frame of expected counts lambda_i, summing to L, is drawn as I_i ~ Poisson(lambda_i). The residual
of the perfect model is 1 - (sum sqrt(lambda_i I_i))^2 / (L sum I_i): the squared sine of the angle between the
vectors sqrt(lambda) and sqrt(I). With g(lambda) = E sqrt(I), E I = lambda and independent pixels,

    E (sum sqrt(lambda_i I_i))^2 = (sum sqrt(lambda_i) g_i)^2 + sum lambda_i (lambda_i - g_i^2),

and to first order in 1 / L the mean of the ratio is the ratio of the means:

    floor = 1 - [(sum sqrt(lambda_i) g_i)^2 + sum lambda_i (lambda_i - g_i^2)] / L^2.

For m pixels that are all bright it is (m - 1) / (4 L): the variance of sqrt(I) is 1/4 (Anscombe, Biometrika 35, 246
(1948)). In pixels of few counts the noise is larger and is not 1/4, so g is summed exactly there.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from steering.ptychography.forward import diffract, intensity
from steering.ptychography.trust import fill_up, good_pixels

_BRIGHT = 40.0
"""Counts above which the asymptotic series of g is exact to 1e-6."""


def expected_floor(
    patches: NDArray, probe: NDArray[np.complex64], mask: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """The mean far-field residual that counting noise leaves where the patches are the truth.

    patches: complex (n, h, w), filled up to the window by their edge values. probe: complex64 (mode, N, N), its power
    the counts of a frame on a transparent object: for another dwell, scale it by the root of the ratio. mask: bool
    (N, N), True = do not use. Returns (n,), 1 for a frame that no light reaches.
    """
    window = probe.shape[-1]
    good = good_pixels(mask, window).numpy() > 0
    whole = torch.from_numpy(fill_up(np.asarray(patches, np.complex64), window))
    expected = intensity(diffract(whole, torch.from_numpy(np.ascontiguousarray(probe, np.complex64))))
    counts = expected.numpy()[:, good].astype(np.float64)
    root = mean_root(counts)
    total = np.maximum(counts.sum(1), 1e-30)
    along = (np.sqrt(counts) * root).sum(1) ** 2 + (counts * (counts - root**2)).sum(1)
    return np.clip(1 - along / total**2, 0, 1).astype(np.float32)


def mean_root(expected: NDArray[np.float64]) -> NDArray[np.float64]:
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
