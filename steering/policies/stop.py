"""When a scan may end: when the live image predicts the next frames before they are added to it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from steering.records import Prediction

_AHEAD = 0.75
"""Share of the lag that is corrected: 1 follows a straight fall, but the ratio falls ever more slowly."""
_STANDARD_ERRORS = 2.0
_LEAST_HALF_LIVES = 2.4
"""These, the half-life and what is corrected were chosen together on 58 scans that bench_steering does not use."""
_KEPT_HALF_LIVES = 20
"""Older frames are left out."""


class StopRule:
    """Due once the live image explains new frames, before they are added, about as well as the model explains them.

    The rule compares the residual of the live image for each frame before that frame was added
    (`Prediction.prior_residual`) with the residual of the model's own prediction: an error on data that the image was
    not made from, in units of the best that this model can do. The ratio falls as the field fills, and comes close to 1
    when further frames would add nothing; the scan may end once it is below `ratio` by twice its standard error. The
    rule cannot judge regions that no frame came near.

    The ratio is one of means over the frames so far, in which the weight of a frame halves with every `half_life`
    frames after it. Such a mean lags behind; one with twice the half-life lags twice as far, and their difference
    corrects it (double exponential smoothing: Brown, Smoothing, Forecasting and Prediction, 1963).
    """

    def __init__(self, *, ratio: float = 1.1, half_life: float = 15.0) -> None:
        if not (math.isfinite(ratio) and ratio > 0 and 1 <= half_life <= 1e6):
            raise ValueError(
                f"found ratio={ratio}, half_life={half_life}, expected a positive ratio, and 1 to 1e6 frames"
            )
        self.ratio = ratio
        self.half_life = half_life
        self.least = math.ceil(_LEAST_HALF_LIVES * half_life)
        """Frames before which the scan may not end."""
        self.clear()

    def clear(self) -> None:
        """A new scan begins."""
        self._newest: NDArray[np.float64] = np.zeros((0, 2))

    def note(self, prediction: Prediction) -> None:
        """Take in predictions of the newest frames; those whose residuals are not both known are left out, such as
        frames from before a recovery."""
        if prediction.prior_residual is not None:
            pairs = np.stack([prediction.prior_residual, prediction.residual], 1).astype(np.float64)
            pairs = pairs[np.isfinite(pairs).all(1)]
            self._newest = np.concatenate([self._newest, pairs])[-math.ceil(_KEPT_HALF_LIVES * self.half_life) :]

    def reason(self) -> str | None:
        """Why the scan may end now; None: it may not end yet."""
        n = len(self._newest)
        if n < self.least:
            return None
        prior, explained = self._newest.T
        age = np.arange(n)[::-1]
        fast, slow = (
            _ratio_weights(0.5 ** (age / half_life), explained) for half_life in (self.half_life, 2 * self.half_life)
        )
        weight = (1 + _AHEAD) * fast - _AHEAD * slow
        ratio = float(weight @ prior)
        # The standard error of a ratio of weighted means, to first order.
        error = math.sqrt(float(weight**2 @ (prior - ratio * explained) ** 2))
        if not ratio + _STANDARD_ERRORS * error <= self.ratio:
            return None
        return f"the live image explains new frames to {ratio:.2f} of the model's own residual, limit {self.ratio:g}"


def _ratio_weights(weight: NDArray[np.float64], explained: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (n,) whose product with values (n,) is their weighted mean over that of `explained`."""
    return weight / max(float(weight @ explained), 1e-12)
