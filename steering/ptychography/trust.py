"""How far to trust a prediction without knowing the truth: two checks that need only the measured frames."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from steering.ptychography.forward import far_field_amplitude
from steering.ptychography.stitch import Stitcher

_LEAST_OVERLAP = 0.3
"""Least overlap, as a share of the patch's own weight: with less, the rims of neighbours dominate the phase offset."""


def far_field_residual(
    patches: NDArray,
    counts: NDArray,
    probe: NDArray[np.complex64],
    mask: NDArray[np.bool_] | None = None,
    *,
    device: torch.device | None = None,
) -> NDArray[np.float32]:
    """The part of each frame that its predicted patch does not explain, whatever the flux: 0 none of it, 1 all of it.

    patches: complex (n, h, w), sampled around the exact positions, filled up to the window by its edge values.
    counts: (n, N, N) of any real dtype. probe: complex64 (mode, N, N). mask: bool (N, N), True = do not use.
    device: to compute on; None: the CPU.
    Returns (n,): 1 - (sum |F| sqrt I)^2 / (sum |F|^2 sum I) over the good pixels, 1 for a frame without counts.
    It is blind to a constant phase offset of the patch; `neighbour_offset` is not.
    """
    window = probe.shape[-1]
    if patches.ndim != 3 or counts.shape != (len(patches), window, window) or max(patches.shape[1:]) > window:
        raise ValueError(
            f"found patches {patches.shape} and counts {counts.shape}, expected (n, h, w) and (n, {window}, {window})"
        )
    there = torch.device("cpu") if device is None else device
    whole = torch.from_numpy(fill_up(np.asarray(patches, np.complex64), window)).to(there)
    model = far_field_amplitude(whole, torch.from_numpy(np.ascontiguousarray(probe, np.complex64)).to(there))
    measured, good = measured_amplitude(counts, mask).to(there), good_pixels(mask, window).to(there)
    return unexplained(model, measured, good).cpu().numpy()


def neighbour_offset(patches: NDArray, positions_px: ArrayLike, stitcher: Stitcher) -> NDArray[np.float32]:
    """Phase offset of each patch to the stitched image of the others, where they overlap.

    patches: complex (n, size, size), all of them already added to the stitcher at positions_px (n, 2). Returns (n,)
    radians in [-pi, pi]; NaN where other patches overlap too little of it.
    """
    return offset_of_shares(*stitcher.share(patches, positions_px), stitcher)


def offset_of_shares(
    own: NDArray, own_weight: NDArray, corner: NDArray[np.int64], stitcher: Stitcher
) -> NDArray[np.float32]:
    """The same from what `Stitcher.share` says of the patches."""
    light, weight = stitcher.under(corner)
    light -= own  # `under` has made copies
    weight -= own_weight
    overlap, product = (weight * own_weight).sum((1, 2)), (own * light.conj()).sum((1, 2))
    # In single precision a patch without neighbours leaves rounding, not 0: the overlap says that it is alone.
    alone = (overlap < _LEAST_OVERLAP * (own_weight**2).sum((1, 2))) | (product == 0)
    return np.where(alone, np.nan, np.angle(product)).astype(np.float32)


def unexplained(model: Tensor, measured: Tensor, good: Tensor) -> Tensor:
    """The residual of `far_field_residual` from amplitudes: model and measured (n, N, N), good (N, N) of 0 and 1.

    `measured` is 0 on bad pixels. Returns (n,) float32.
    """
    cross = (model * measured).sum((-2, -1)).square()
    power = (model.square() * good).sum((-2, -1)) * measured.square().sum((-2, -1))
    return torch.where(power > 0, 1 - cross / power.clamp_min(1e-30), 1.0).clamp(0, 1).to(torch.float32)


def measured_amplitude(counts: NDArray, mask: NDArray[np.bool_] | None) -> Tensor:
    """Square root of the counts (n, N, N) as float32, 0 on masked pixels, whatever these hold."""
    with np.errstate(invalid="ignore"):
        if mask is None:
            root = np.sqrt(np.asarray(counts, np.float32))
        else:
            root = np.zeros(counts.shape, np.float32)
            np.sqrt(counts, out=root, where=~mask, casting="unsafe", dtype=np.float32)
    if not np.isfinite(root).all():
        raise ValueError("found counts that are negative or not finite, expected them only under the mask")
    return torch.from_numpy(root)


def good_pixels(mask: NDArray[np.bool_] | None, window: int) -> Tensor:
    """(N, N) float32, 1 where a detector pixel counts."""
    if mask is None:
        return torch.ones(window, window)
    if mask.shape != (window, window) or mask.dtype != np.bool_:
        raise ValueError(f"found a mask {mask.dtype} {mask.shape}, expected bool ({window}, {window})")
    return torch.from_numpy((~mask).astype(np.float32))


def fill_up(patches: NDArray[np.complex64], window: int) -> NDArray[np.complex64]:
    """(n, window, window): patches (n, h, w) in the middle, their edge values around them."""
    y, x = (np.clip(np.arange(window) - (window // 2 - side // 2), 0, side - 1) for side in patches.shape[1:])
    return patches[:, y[:, None], x]
