"""When a scan may end: when the live image predicts the next frames before they are added to it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from steering.ptychography import above_floor
from steering.records import Prediction

_AHEAD = 0.75
"""Share of the lag that is corrected: 1 follows a straight fall, but the ratio falls ever more slowly."""
_STANDARD_ERRORS = 2.0
_LEAST_HALF_LIVES = 2.4
"""These, the half-life and what is corrected were chosen together on 58 scans that bench_steering does not use."""
_KEPT_HALF_LIVES = 20
"""Older frames are left out."""
_BETTER = 1.25
"""So many times the model's residual is what the image must have left at first: by less it was hardly worse."""
_TOLERANCE = 0.1
"""Share of the Poisson floor that is added to the model's residual, and no more than this share of what the image left
at first: a model without error would ask for an image without error, and the floor itself is known to some percent.
This and `_BETTER` were chosen on samples of bench_steering."""


class StopRule:
    """Due once the live image explains new frames, before they are added, about as well as the model explains them.

    The rule compares the residual of the live image for each frame before that frame was added
    (`Prediction.prior_residual`) with the residual of the model's own prediction, both above the frame's Poisson floor:
    an error on data that the image was not made from, in units of the best that this model can do. The ratio falls as
    the field fills, and comes close to 1 when further frames would add nothing; the scan may end once it is below
    `ratio` by twice its standard error. The rule cannot judge regions that no frame came near.

    An untrained model explains no more than its image does, so the ratio is 1 from the beginning; where noise hides the
    object it is so too. So no scan ends that has not begun with an image clearly worse than the model.

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
        self._at_first = 0.0
        """Residual above the floor that the image left at first; 0: it was never clearly worse than the model."""
        self.look_again()

    def look_again(self) -> None:
        """The scan goes on though it might have ended: judge by new frames alone."""
        self._newest: NDArray[np.float64] = np.zeros((0, 3))

    def note(self, prediction: Prediction) -> None:
        """Take in predictions of the newest frames. Those whose residuals above the floor are not both known are left
        out: frames from before a recovery, and those that noise dominates."""
        if prediction.prior_residual is None or prediction.poisson_floor is None:
            return
        both = prediction.prior_residual, prediction.residual
        floor = prediction.poisson_floor
        rows = np.stack([*(above_floor(residual, floor) for residual in both), floor], 1)
        rows = rows[np.isfinite(rows).all(1)]
        self._newest = np.concatenate([self._newest, rows])[-math.ceil(_KEPT_HALF_LIVES * self.half_life) :]
        if len(self._newest) >= self.least:
            prior, explained, _ = self._newest.T
            weight = self._weights(2 * self.half_life)
            better = prior - _BETTER * explained
            mean = float(weight @ better)
            if mean > _STANDARD_ERRORS * math.sqrt(float(weight**2 @ (better - mean) ** 2)):
                self._at_first = max(self._at_first, float(weight @ prior))

    def reason(self) -> str | None:
        """Why the scan may end now; None: it may not end yet."""
        n = len(self._newest)
        if n < self.least or not self._at_first:
            return None
        prior, explained, floor = self._newest.T
        fast, slow = self._weights(self.half_life), self._weights(2 * self.half_life)
        least = _TOLERANCE * min(self._at_first, float(slow @ floor))
        explained = explained + least
        fast, slow = (weight / max(float(weight @ explained), least, 1e-12) for weight in (fast, slow))
        weight = (1 + _AHEAD) * fast - _AHEAD * slow
        ratio = max(0.0, float(weight @ prior))  # below 0 it is by chance
        # The standard error of a ratio of weighted means, to first order.
        error = math.sqrt(float(weight**2 @ (prior - ratio * explained) ** 2))
        if not ratio + _STANDARD_ERRORS * error <= self.ratio:
            return None
        return f"the live image explains new frames to {ratio:.2f} of the model's own residual, limit {self.ratio:g}"

    def _weights(self, half_life: float) -> NDArray[np.float64]:
        """(n,) of the newest frames, the sum 1."""
        weight = 0.5 ** (np.arange(len(self._newest))[::-1] / half_life)
        return weight / weight.sum()
