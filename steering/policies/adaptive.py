"""Space-filling order until the content proves sparse, then guided by the image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.policies.candidates import pixel_of
from steering.policies.dwell import DwellRule
from steering.policies.gradient_residual import GradientResidual
from steering.policies.space_filling import SPACE_FILLING, farthest_first
from steering.policies.stop import StopRule
from steering.records import Prediction, Travel

_LEAST_FRAMES = 30
"""Frames before which the content is not judged."""
_MOST_FRAMES = 4096
"""Places that are looked at for it, the first ones: in space-filling order they are a fair sample, and what a
suggestion costs does not grow with the scan."""


class Adaptive(GradientResidual):
    """In space-filling order until the content is proven sparse, from then on like GradientResidual.

    The statistic is the share of the field that holds the structure, `content_share` of the frames measured so far; the
    space-filling order makes them a fair sample of the field. Sparse is proven once the share and twice its standard
    error lie below `sparse`. On dense content that never happens, and the order stays space-filling to the end of the
    scan; with `travel`, the positions of one suggestion are sorted into a short path.
    """

    _STATE = (*GradientResidual._STATE, "_measured_at", "_proof")

    def __init__(
        self,
        candidates: NDArray[np.float64],
        *,
        beam: float,
        travel: Travel | None = None,
        frame_s: float = 0.02,
        sparse: float = 0.3,
        stop: StopRule | None = None,
        dwell: DwellRule | None = None,
    ) -> None:
        """As for GradientResidual. sparse: share of the field below which content counts as sparse."""
        if not 0 <= sparse <= 1:
            raise ValueError(f"found sparse={sparse}, expected a share of the field, 0 to 1")
        super().__init__(candidates, beam=beam, travel=travel, frame_s=frame_s, stop=stop, dwell=dwell)
        self.sparse = sparse
        self._order = farthest_first(self._candidates)

    def _forget(self) -> None:
        super()._forget()
        self._measured_at = np.zeros((0, 2))
        self._proof: str | None = None

    def _learn(self, prediction: Prediction, live: Any) -> None:
        super()._learn(prediction, live)
        if room := _MOST_FRAMES - len(self._measured_at):
            here = prediction.position[:room] * pixel_of(live)
            self._measured_at = np.concatenate([self._measured_at, here])

    def _choose(self, n: int) -> tuple[NDArray[np.int64], list[str]]:
        if self._proof is None:
            self._proof = self._prove()
        if self._proof is not None:
            chosen, reasons = super()._choose(n)
            return chosen, [f"{self._proof}; {reason}" for reason in reasons]
        done = len(self._order) - self._todo  # all of them in this order
        chosen = self._order[done : done + n]
        chosen = chosen[self._sorted_by_path(chosen)]
        self._expose(self._candidates[chosen])
        return chosen, [SPACE_FILLING] * len(chosen)

    def _prove(self) -> str | None:
        """The reason that the content counts as sparse; None: it does not."""
        if len(self._measured_at) < _LEAST_FRAMES:
            return None
        structure, _ = self._structure.at(self._measured_at, self._live)
        share, error = content_share(structure)
        return f"sparse ({100 * share:.0f} % of the field)" if share + 2 * error < self.sparse else None


def content_share(structure: NDArray[np.float64]) -> tuple[float, float]:
    """The share of places that hold the structure, and its standard error: (sum s)^2 / (n sum s^2) of n places.

    structure: (n,) of a fair sample of places, 0 or more. The participation ratio: a share p of equal places and
    nothing elsewhere gives p, content that is equal everywhere gives 1; so does a field without any. The standard error
    is that of a ratio of means, to first order (delta method).
    """
    mean, square = float(structure.mean()), float((structure**2).mean())
    if not square > 0:
        return 1.0, 0.0
    share = mean**2 / square
    slope = 2 * mean / square * structure - (mean / square) ** 2 * structure**2
    return share, float(slope.std()) / math.sqrt(len(structure))
