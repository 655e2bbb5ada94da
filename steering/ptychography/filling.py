"""What an image probably is where it has not been seen: a guess for comparisons, never shown as measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LITTLE = 0.02
"""Weight, of a frame's strongest light, of the guess beside what was seen."""


def filled(image: NDArray, weight: NDArray) -> NDArray[np.complex64]:
    """The image (Y, X), complex, with coarser and coarser means of it where it is hardly seen.

    weight: (Y, X) as of a Stitcher, 0 where nothing was seen; more than 1 counts as 1. An image that is not seen at all
    is transparent: 1 everywhere. Source: the pull-push algorithm of Gortler et al., The Lumigraph, SIGGRAPH 1996.
    """
    seen = np.minimum(weight, 1.0).astype(np.float32)
    if not seen.any():
        return np.ones(image.shape, np.complex64)
    return _pushed((image * seen).astype(np.complex64), seen)


def _pushed(light: NDArray[np.complex64], seen: NDArray[np.float32]) -> NDArray[np.complex64]:
    if min(light.shape) < 2:
        return np.full(light.shape, light.sum() / max(float(seen.sum()), 1e-12), np.complex64)
    height, width = light.shape
    whole = [np.pad(part, ((0, height % 2), (0, width % 2))) for part in (light, seen)]
    halves = [part.reshape(part.shape[0] // 2, 2, part.shape[1] // 2, 2).mean((1, 3)) for part in whole]
    coarse = _pushed(halves[0], halves[1]).repeat(2, 0).repeat(2, 1)[:height, :width]
    return np.asarray((light + _LITTLE * coarse) / (seen + _LITTLE), np.complex64)
