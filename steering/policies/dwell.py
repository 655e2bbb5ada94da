"""How long to stay: where more light tells more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.records import Prediction


class DwellRule:
    """placeholder until measured"""

    def clear(self) -> None: ...
    def note(self, prediction: Prediction) -> None: ...
    def seconds(self, where: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(len(where), 0.02)
