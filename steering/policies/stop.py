"""When enough is measured: when the image already says what the next frames will be."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from steering.records import Prediction

_STANDARD_ERRORS = 1.5
"""By which the share must be below the ratio."""
_LEAST_HALF_LIVES = 3
_KEPT_HALF_LIVES = 12
"""What is older weighs nothing."""


class StopRule:
    """Due once the image foretells frames that it has not seen about as well as the model explains them once seen.

    The residual of what the live image said of each frame before it was added (`Prediction.surprise`), as a share of
    the residual of the model's own prediction of it: an error on data that nothing was fitted to, in units of the best
    that this model can do. The share falls as the field fills, and comes close to 1 when further frames would only say
    the same again; the scan may end once it is below `ratio` by one and a half times its standard error. It is a ratio
    of means over the frames so far, the newest counting most: the weight of a frame halves with every `half_life`
    frames after it, so that the share lags less behind than a mean over as many frames would. The rule knows nothing of
    places that no frame came near.
    """

    def __init__(self, *, ratio: float = 1.1, half_life: float = 12.0) -> None:
        if not (math.isfinite(ratio) and ratio > 0 and math.isfinite(half_life) and half_life >= 1):
            raise ValueError(
                f"found ratio={ratio}, half_life={half_life}, expected a positive share and 1 frame or more"
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
        if prediction.surprise is not None:
            pairs = np.stack([prediction.surprise, prediction.residual], 1).astype(np.float64)
            self._newest = np.concatenate([self._newest, pairs])[-math.ceil(_KEPT_HALF_LIVES * self.half_life) :]

    def reason(self) -> str | None:
        """Why the scan may end now; None: it may not yet."""
        n = len(self._newest)
        if n < self.least:
            return None
        foretold, explained = self._newest.T
        weight = 0.5 ** (np.arange(n)[::-1] / self.half_life)
        mean = max(float(weight @ explained), 1e-12)
        share = float(weight @ foretold) / mean
        # The standard error of a ratio of weighted means, to first order.
        error = math.sqrt(float(weight**2 @ (foretold - share * explained) ** 2)) / mean
        if share + _STANDARD_ERRORS * error > self.ratio:
            return None
        return f"the image foretells unseen frames to {share:.2f} of the model's own residual: enough"
