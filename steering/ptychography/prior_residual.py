"""The prior residual: how well an image predicts frames that it has not seen. Nothing was fitted to these data."""

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
    """Far-field residual of frames as the stitched image predicts them; call it before they are added.

    positions_px: (n, 2) of (y, x), object pixels. counts: (n, N, N). probe: complex64 (mode, N, N). mask: bool (N, N),
    True = do not use. Where a patch is not seen yet it is taken to go on like the rest of it, and to be transparent
    where nothing of it is seen (`filled`). Returns (n,): 0 where the frame is just what the image says, as in
    `far_field_residual`.
    """
    corner, fraction = stitcher.canvas.cells(positions_px, len(stitcher.patch_weight))
    light, weight = stitcher.under(corner)
    cells = filled(light / np.maximum(weight, 1e-12), weight)
    fy, fx = fraction[:, 0, None, None], fraction[:, 1, None, None]
    rows = cells[:, :-1] * (1 - fy) + cells[:, 1:] * fy
    return far_field_residual(rows[:, :, :-1] * (1 - fx) + rows[:, :, 1:] * fx, counts, probe, mask)
