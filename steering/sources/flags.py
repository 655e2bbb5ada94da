"""What a detector writes where a pixel has no count: one rule for live and for recorded frames.

Flags are the two highest values of an unsigned dtype as it comes from the detector, of every width (all ones: dead, all
ones but one: saturated), -1 and -2 in signed ones and in floats, and in floats what is not finite. A value below 0 that
is no flag is no count either, but a reading around a dark may be: a recorded scan with one is refused, in a live frame,
which is never refused, the pixel has no count. One frame cannot tell that all ones in a few frames of a bright pixel
say saturated (`say_saturated` in `steering.sources.frames`), nor what the flags of detectors with fewer bits than their
dtype are, which are known by standing in nearly every frame (`never_counting` there).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

_OF_FEWER_BITS = (2**16 - 1, 2**16 - 2, 2**20 - 1, 2**31 - 1, 2**32 - 1, 2**32 - 2)


def flagged(values: NDArray) -> NDArray[np.bool_]:
    """Which values, unsigned, signed or floats of any shape, are flags."""
    if values.dtype.kind == "u":
        return np.asarray(values >= np.iinfo(values.dtype).max - 1)
    flags = (values == -1) | (values == -2)
    return flags | ~np.isfinite(values) if values.dtype.kind == "f" else flags


def saturated(values: NDArray) -> NDArray[np.bool_]:
    """Which of the flags say that a pixel is saturated: all ones but one, or infinite; signed dtypes have none."""
    kind = values.dtype.kind
    if kind == "i":
        return np.zeros(values.shape, bool)
    return np.asarray(values == (np.inf if kind == "f" else np.iinfo(values.dtype).max - 1))


def without_count(values: NDArray) -> NDArray[np.bool_]:
    """Which values are flags, or below 0."""
    return flagged(values) if values.dtype.kind == "u" else flagged(values) | (values < 0)


def flags_of_fewer_bits(dtype: DTypeLike) -> NDArray:
    """Flags of detectors with fewer bits, as this dtype holds them: a float32 rounds 2^32 - 1 to 2^32."""
    dtype = np.dtype(dtype)
    most = np.iinfo(dtype).max if dtype.kind in "iu" else np.finfo(dtype).max
    return np.unique(np.array([value for value in _OF_FEWER_BITS if value <= most]).astype(dtype))
