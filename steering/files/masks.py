"""Masks as files keep them: which of their values say that a pixel is bad."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CXI_BAD = 0x07DF
"""Invalid, saturated, hot, dead, shadowed, to be ignored, bad, out of the limits, missing, noisy: the others inform."""


def bad_pixels(mask: NDArray, rule: str, *, inverted: bool = False) -> NDArray[np.bool_]:
    """(y, x), True where a pixel is bad in (nearly) every one of several masks.

    rule: see `Layout.mask_rule`. inverted: what it calls bad is good, but for values that are no numbers, which are bad
    either way. Raises ValueError for a mask of fewer than two axes.
    """
    if rule == "cxi" and mask.dtype.kind in "ui":
        said = (mask.astype(np.int64) & _CXI_BAD) != 0
    else:
        said = (mask == 0) if rule == "good" else (mask != 0)
    bad = said != inverted
    if mask.dtype.kind in "fc":
        bad |= np.isnan(mask)
    if bad.ndim < 2:
        raise ValueError(f"found a mask of shape {mask.shape}, expected (y, x)")
    return bad.reshape(-1, *bad.shape[-2:]).mean(0) > 0.9
