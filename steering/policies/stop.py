"""When enough is measured: when the image already says what the next frames will be."""

from __future__ import annotations

import numpy as np

from steering.records import Prediction


class StopRule:
    """Due once the image so far explains the newest frames, which it had not seen, down to a stated residual.

    residual: mean of `Prediction.surprise` over the last `window` frames at or below which the scan may end. It is the
    far-field residual of what the live image said of each frame before that was added: an error on data that nothing
    was fitted to, in the unit in which trust is measured.
    """

    def __init__(self, *, residual: float, window: int = 24) -> None:
        if not 0 < residual < 1 or window < 1:
            raise ValueError(f"found residual={residual}, window={window}, expected 0 < residual < 1, 1 frame or more")
        self.residual = residual
        self.window = window
        self.clear()

    def clear(self) -> None:
        """A new scan begins."""
        self._newest: list[float] = []

    def note(self, prediction: Prediction) -> None:
        """Take in what was predicted of the newest frames."""
        if prediction.surprise is not None:
            self._newest = [*self._newest, *prediction.surprise.tolist()][-self.window :]

    def reason(self) -> str | None:
        """Why the scan may end now; None: it may not yet."""
        if len(self._newest) < self.window:
            return None
        mean = float(np.mean(self._newest))
        if mean > self.residual:
            return None
        return f"the image explains the last {self.window} frames, unseen, to a residual of {mean:.3g}: enough"
