"""When enough is measured: when the image already says what the next frames will be."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from steering.records import Prediction

_AHEAD = 0.75
"""How much of the lag is made up for: all of it (1) follows a straight fall, but the share falls ever more slowly."""
_STANDARD_ERRORS = 2.0
_LEAST_HALF_LIVES = 2.4
_KEPT_HALF_LIVES = 20
"""What is older weighs nothing."""


class StopRule:
    """Due once the image foretells frames that it has not seen about as well as the model explains them once seen.

    The residual of what the live image said of each frame before it was added (`Prediction.prior_residual`), as a share
    of the residual of the model's own prediction of it: an error on data that nothing was fitted to, in units of the
    best that this model can do. The share falls as the field fills, and comes close to 1 when further frames would only
    say the same again; the scan may end once it is below `ratio` by twice its standard error. The rule knows nothing of
    places that no frame came near.

    The share is a ratio of means over the frames so far, in which the weight of a frame halves with every `half_life`
    frames after it. Such a mean lags behind; one with twice the half-life lags twice as far, and the difference of the
    two makes up for it (double exponential smoothing: Brown, Smoothing, Forecasting and Prediction, 1963).
    """

    def __init__(self, *, ratio: float = 1.1, half_life: float = 15.0) -> None:
        if not (math.isfinite(ratio) and ratio > 0 and 1 <= half_life <= 1e6):
            raise ValueError(
                f"found ratio={ratio}, half_life={half_life}, expected a positive share, and 1 to 1e6 frames"
            )
        self.ratio = ratio
        self.half_life = half_life
        self.least = math.ceil(_LEAST_HALF_LIVES * half_life)
        """Frames before which nothing is said."""
        self.clear()

    def clear(self) -> None:
        """A new scan begins."""
        self._newest: NDArray[np.float64] = np.zeros((0, 2))

    def note(self, prediction: Prediction) -> None:
        """Take in what was predicted of the newest frames."""
        if prediction.prior_residual is not None:
            pairs = np.stack([prediction.prior_residual, prediction.residual], 1).astype(np.float64)
            self._newest = np.concatenate([self._newest, pairs])[-math.ceil(_KEPT_HALF_LIVES * self.half_life) :]

    def reason(self) -> str | None:
        """Why the scan may end now; None: it may not yet."""
        n = len(self._newest)
        if n < self.least:
            return None
        prior, explained = self._newest.T
        age = np.arange(n)[::-1]
        fast, slow = (
            _shares(0.5 ** (age / half_life), explained) for half_life in (self.half_life, 2 * self.half_life)
        )
        weight = (1 + _AHEAD) * fast - _AHEAD * slow
        share = float(weight @ prior)
        # The standard error of a ratio of weighted means, to first order.
        error = math.sqrt(float(weight**2 @ (prior - share * explained) ** 2))
        if not share + _STANDARD_ERRORS * error <= self.ratio:
            return None
        return f"the image foretells unseen frames to {share:.2f} of the model's own residual: enough"


def _shares(weight: NDArray[np.float64], explained: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (n,) that take the weighted mean of values (n,) as a share of that of `explained`."""
    return weight / max(float(weight @ explained), 1e-12)
