"""How new samples are learnt without losing the old ones. One file each.

A strategy has two verbs. `loss(network, minibatch)` is what a step minimises, over the new samples and the
representatives behind them; `remember(batch, outputs)` is what the rehearsal buffer is offered of the new samples, or
None. Two constants tell the trainer the rest: `rehearses` (representatives are drawn), `restarts` (at a task boundary
the weights are reset, and every sample so far is trained on again).
"""

from steering.learning.strategies.contract import Loss, Minibatch, Strategy
from steering.learning.strategies.er import ER
from steering.learning.strategies.from_scratch import FromScratch
from steering.learning.strategies.incremental import Incremental

__all__ = ["ER", "FromScratch", "Incremental", "Loss", "Minibatch", "Strategy"]
