"""Experience replay: new samples and stored ones, together in each minibatch.

Source: Rolnick et al., "Experience Replay for Continual Learning", NeurIPS 2019 (arXiv 1811.11682); over many ranks:
Bouvier et al., FGCS 2024, DOI 10.1016/j.future.2024.07.016.
"""

from steering.learning.strategies.contract import Strategy


class ER(Strategy):
    """The mean error over new samples and representatives together; the samples themselves are remembered."""

    rehearses = True
