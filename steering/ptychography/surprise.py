"""What an image says of frames that it has not seen: an error on data that nothing was fitted to."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steering.ptychography.stitch import Stitcher, extract_patches
from steering.ptychography.trust import far_field_residual

_LITTLE = 0.05
"""Weight, of a frame's strongest light, with which the mean of the image stands in where it is hardly seen."""


def surprise(
    stitcher: Stitcher,
    positions_px: ArrayLike,
    counts: NDArray,
    probe: NDArray[np.complex64],
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Far-field residual of frames as the stitched image foretells them; call it before they are added.

    positions_px: (n, 2) of (y, x), object pixels. counts: (n, N, N). probe: complex64 (mode, N, N). mask: bool (N, N),
    True = do not use. Where nothing is seen yet, the image is taken to go on as its mean, and to be transparent as long
    as it is empty. Returns (n,): 0 where the frame is just what the image says, as in `far_field_residual`.
    """
    weight = stitcher.weight
    light = stitcher.image() * weight
    total = float(weight.sum())
    mean = light.sum() / total if total > 0 else 1.0
    foretold = (light + _LITTLE * mean) / (weight + _LITTLE)
    patches = extract_patches(foretold, stitcher.canvas, positions_px, len(stitcher.patch_weight))
    return far_field_residual(patches, counts, probe, mask)
