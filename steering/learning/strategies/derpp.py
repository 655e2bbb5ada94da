"""Dark experience replay with labels: DER++.

Source: Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020 (arXiv
2004.07211), equation 8. The two terms use the same representatives here, as in Bouvier et al., FGCS 2024, DOI
10.1016/j.future.2024.07.016, so that one exchange serves both.
"""

from __future__ import annotations

from torch import Tensor

from steering.learning.minibatch import Fields
from steering.learning.objectives import Objective, Outputs
from steering.learning.strategies.der import DER


class DERpp(DER):
    """DER + beta * mean error of the representatives against their labels.

    alpha: weight of the distance to the stored outputs; beta: of the labels.
    """

    def __init__(self, objective: Objective, *, alpha: float = 0.8, beta: float = 1.0) -> None:
        super().__init__(objective, alpha=alpha)
        if beta < 0:
            raise ValueError(f"found beta={beta}, expected 0 or more")
        self.beta = beta

    def _rehearsed(self, outputs: Outputs, fields: Fields) -> Tensor:
        return super()._rehearsed(outputs, fields) + self.beta * self.objective.error(outputs, fields).mean()
