"""How well an image predicts frames that were not used for it: an error on data that nothing was fitted to."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steering.ptychography.filling import filled
from steering.ptychography.stitch import Stitcher
from steering.ptychography.trust import far_field_residual


def prior_residual(
    stitcher: Stitcher,
    positions_px: ArrayLike,
    counts: NDArray,
    probe: NDArray[np.complex64],
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Far-field residual of frames as predicted by the stitched image before they are added to it.

    positions_px: (n, 2) of (y, x), object pixels. counts: (n, N, N). probe: complex64 (mode, N, N). mask: bool (N, N),
    True = do not use. Where the image does not cover a patch yet, the patch is continued smoothly, and is transparent
    where the image covers nothing of it (`filled`). Returns (n,) as `far_field_residual`: 0 for a frame that the image
    predicts exactly.
    """
    corner, fraction = stitcher.canvas.cells(positions_px, len(stitcher.patch_weight))
    light, weight = stitcher.under(corner)
    cells = filled(light / np.maximum(weight, 1e-12), weight)
    fy, fx = fraction[:, 0, None, None], fraction[:, 1, None, None]
    rows = cells[:, :-1] * (1 - fy) + cells[:, 1:] * fy
    return far_field_residual(rows[:, :, :-1] * (1 - fx) + rows[:, :, 1:] * fx, counts, probe, mask)
