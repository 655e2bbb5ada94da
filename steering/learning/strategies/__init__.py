"""How new samples are learnt without losing the old ones. One file each.

A strategy has three methods. `loss(network, minibatch)` is what a step minimises, over the new samples and the
representatives behind them; `gradient(network, minibatch)` is what the optimiser follows, for most that of the loss;
`remember(batch, outputs)` is what the rehearsal buffer is offered of the new samples, or None. Two constants
complete the contract: `rehearses` and `restarts`.
"""

from steering.learning.minibatch import Minibatch
from steering.learning.strategies.agem import AGEM
from steering.learning.strategies.contract import Loss, Strategy
from steering.learning.strategies.der import DER
from steering.learning.strategies.derpp import DERpp
from steering.learning.strategies.er import ER
from steering.learning.strategies.er_ace import ERACE
from steering.learning.strategies.from_scratch import FromScratch
from steering.learning.strategies.incremental import Incremental

STRATEGIES: dict[str, type[Strategy]] = {
    kind.__name__.lower(): kind for kind in (Incremental, ER, DER, DERpp, AGEM)
} | {"er_ace": ERACE, "from_scratch": FromScratch}
"""By the names that workflows and summaries use."""

__all__ = [
    "AGEM",
    "DER",
    "ER",
    "ERACE",
    "STRATEGIES",
    "DERpp",
    "FromScratch",
    "Incremental",
    "Loss",
    "Minibatch",
    "Strategy",
]
