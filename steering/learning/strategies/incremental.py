"""Learn from the new samples alone: fastest, and forgets. The lower bound."""

from steering.learning.strategies.contract import Strategy


class Incremental(Strategy):
    """The mean error of the new samples; nothing is remembered."""
