"""Forget on purpose at each task boundary, then learn everything again: the upper bound, in accuracy and in cost."""

from steering.learning.strategies.contract import Strategy


class FromScratch(Strategy):
    """The mean error of minibatches drawn from all samples so far, with weights that are reset at each boundary."""

    restarts = True
