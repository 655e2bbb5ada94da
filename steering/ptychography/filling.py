"""Smooth continuation of an image where it has not been measured: for comparisons, never shown as measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LITTLE = 0.02
"""Weight of the continuation relative to a frame's strongest illumination."""


def filled(image: NDArray, weight: NDArray) -> NDArray[np.complex64]:
    """The image (..., Y, X), complex, continued by ever coarser means of it where it was hardly measured.

    weight: (..., Y, X) as of a Stitcher, 0 where nothing was measured; more than 1 counts as 1. An image without any
    weight is transparent: 1 everywhere. Source: pull-push, Gortler et al., The Lumigraph, SIGGRAPH 1996.
    """
    seen = np.minimum(weight, 1.0).astype(np.float32)
    nothing = ~seen.any((-2, -1), keepdims=True)
    return np.where(nothing, np.complex64(1), _pushed((image * seen).astype(np.complex64), seen))


def _pushed(light: NDArray, seen: NDArray) -> NDArray[np.complex64]:
    height, width = light.shape[-2:]
    if min(height, width) < 2:
        total = np.maximum(seen.sum((-2, -1), keepdims=True), 1e-12)
        return np.broadcast_to(light.sum((-2, -1), keepdims=True) / total, light.shape).astype(np.complex64)
    spare = [(0, 0)] * (light.ndim - 2) + [(0, height % 2), (0, width % 2)]
    whole = [np.pad(part, spare) for part in (light, seen)]
    halves = [part[..., ::2, :] + part[..., 1::2, :] for part in whole]
    light_4, seen_4 = ((part[..., ::2] + part[..., 1::2]) / 4 for part in halves)
    coarse = _pushed(light_4, seen_4).repeat(2, -2).repeat(2, -1)[..., :height, :width]
    return np.asarray((light + _LITTLE * coarse) / (seen + _LITTLE), np.complex64)
