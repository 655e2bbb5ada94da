"""When enough is measured: when the image already says what the next frames will be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.records import Prediction


class StopRule:
    """Due once the image foretells frames that it has not seen about as well as the model explains them once seen.

    Of the last `window` frames, the residual of what the live image said of each before it was added
    (`Prediction.surprise`), as a share of the residual of the model's own prediction of it: an error on data that
    nothing was fitted to, in units of the best that this model can do. The share falls as the field fills, and comes
    close to 1 when further frames would only say the same again; the scan may end once it is below `ratio` by twice its
    standard error. The rule knows nothing of places that no frame came near.
    """

    def __init__(self, *, ratio: float = 1.1, window: int = 36) -> None:
        if not (np.isfinite(ratio) and ratio > 0) or window < 2:
            raise ValueError(f"found ratio={ratio}, window={window}, expected a positive share and 2 frames or more")
        self.ratio = ratio
        self.window = window
        self.clear()

    def clear(self) -> None:
        """A new scan begins."""
        self._newest: NDArray[np.float64] = np.zeros((0, 2))

    def note(self, prediction: Prediction) -> None:
        """Take in what was predicted of the newest frames."""
        if prediction.surprise is not None:
            pairs = np.stack([prediction.surprise, prediction.residual], 1).astype(np.float64)
            self._newest = np.concatenate([self._newest, pairs])[-self.window :]

    def reason(self) -> str | None:
        """Why the scan may end now; None: it may not yet."""
        if len(self._newest) < self.window:
            return None
        foretold, explained = self._newest.T
        mean = max(float(explained.mean()), 1e-12)
        share = float(foretold.mean()) / mean
        # The standard error of a ratio of means, to first order.
        error = float((foretold - share * explained).std()) / mean / np.sqrt(self.window)
        if share + 2 * error > self.ratio:
            return None
        return f"the image foretells {self.window} unseen frames to {share:.2f} of the model's own residual: enough"
