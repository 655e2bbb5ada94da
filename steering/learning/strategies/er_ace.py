"""Experience replay with asymmetric cross entropy: ER-ACE.

Source: Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", ICLR 2022
(arXiv 2104.05025), section 4.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from steering.learning.minibatch import Minibatch
from steering.learning.objectives import ClassObjective
from steering.learning.strategies.contract import Loss, Strategy


class ERACE(Strategy):
    """Mean error of the new samples among their own classes + mean error of the representatives among all classes.

    New classes are learnt without pushing the outputs of the old ones down, which is how plain ER forgets: only the
    representatives compare old classes with new ones. The classes that compete are those of the new samples of a
    rank's own minibatch, so no task boundary needs to be known. The two terms count alike, whatever the number of
    representatives, as in the paper. For classification only.
    """

    rehearses = True
    needs_classes = True

    def loss(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """Both terms, from the outputs of one pass over the augmented minibatch."""
        objective = cast(ClassObjective, self.objective)
        outputs = objective.outputs(network, minibatch.fields)
        new = tuple(value[: minibatch.new] for value in outputs)
        old = tuple(value[minibatch.new :] for value in outputs)
        loss = objective.error_among_own(new, minibatch.batch).mean()
        if len(old[0]):
            loss = loss + objective.error(old, minibatch.representatives).mean()
        return Loss(loss, outputs)
