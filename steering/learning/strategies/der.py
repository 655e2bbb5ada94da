"""Dark experience replay: outputs for a stored sample are kept close to those of the time when it was new.

Source: Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020 (arXiv
2004.07211), equation 6 for DER.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steering.learning.minibatch import Fields, Minibatch
from steering.learning.objectives import Objective, Outputs
from steering.learning.rows import finite
from steering.learning.strategies.contract import Loss, Strategy


class DER(Strategy):
    """Mean error of the new samples + alpha * mean squared distance of the representatives' outputs to those stored.

    alpha: weight of the distance; 0.8 in Bouvier et al., FGCS 2024, DOI 10.1016/j.future.2024.07.016.
    """

    rehearses = True

    def __init__(self, objective: Objective | None = None, *, alpha: float = 0.8) -> None:
        super().__init__(objective)
        if alpha < 0:
            raise ValueError(f"found alpha={alpha}, expected 0 or more")
        self.alpha = alpha

    def remember(self, batch: Fields, outputs: Outputs) -> Fields:
        """The samples with the network's outputs for them."""
        new = len(next(iter(batch.values())))
        stored = zip(self.objective.names, outputs, strict=True)
        return {**batch, **{f"stored_{name}": value[:new].detach().float() for name, value in stored}}

    def loss(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """Both terms, from the outputs of one pass over the augmented minibatch."""
        outputs = self.objective.outputs(network, minibatch.fields)
        new = tuple(value[: minibatch.new] for value in outputs)
        old = tuple(value[minibatch.new :] for value in outputs)
        loss = self.objective.error(new, minibatch.batch).mean()
        if len(old[0]):
            loss = loss + self._rehearsed(old, minibatch.representatives)
        return Loss(loss, outputs)

    def _rehearsed(self, outputs: Outputs, fields: Fields) -> Tensor:
        """What the representatives add, of which there is at least one."""
        stored = tuple(fields[f"stored_{name}"] for name in self.objective.names)
        # What a network that diverged has left says nothing. Where a choice would wait for a GPU, all go by the mask.
        said = torch.stack([finite(value) for value in stored]).all(0)
        if said.is_cpu and bool(said.all()):
            return self.alpha * self.objective.distance(outputs, stored).mean()
        stored = tuple(value.where(said.view(-1, *[1] * (value.ndim - 1)), 0.0) for value in stored)
        return self.alpha * self.objective.distance(outputs, stored).where(said, 0.0).mean()
