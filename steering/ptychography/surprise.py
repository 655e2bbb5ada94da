"""What an image says of frames that it has not seen: an error on data that nothing was fitted to."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steering.ptychography.filling import filled
from steering.ptychography.stitch import Stitcher, extract_patches
from steering.ptychography.trust import far_field_residual


def surprise(
    stitcher: Stitcher,
    positions_px: ArrayLike,
    counts: NDArray,
    probe: NDArray[np.complex64],
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Far-field residual of frames as the stitched image foretells them; call it before they are added.

    positions_px: (n, 2) of (y, x), object pixels. counts: (n, N, N). probe: complex64 (mode, N, N). mask: bool (N, N),
    True = do not use. Where little is seen yet the image is taken to go on like its surroundings (`filled`).
    Returns (n,): 0 where the frame is just what the image says, as in `far_field_residual`.
    """
    foretold = filled(stitcher.image(), stitcher.weight)
    patches = extract_patches(foretold, stitcher.canvas, positions_px, len(stitcher.patch_weight))
    return far_field_residual(patches, counts, probe, mask)
