"""The order in which ranks pass over a set of samples that all of them can reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Epochs:
    """Endless passes over samples, shared by the ranks: each sample once in a pass, whatever the number of ranks.

    Passes are joined end to end, so that no last minibatch is short or lost: it runs on into the next pass. The order
    follows from the seed alone; every rank computes all of it and takes its part, so nothing is sent.

    Args:
        count: samples to pass over, 0 .. count - 1.
        seed: the same on every rank.
    """

    def __init__(self, count: int, *, seed: int, rank: int = 0, ranks: int = 1) -> None:
        if count < 1 or not 0 <= rank < ranks:
            raise ValueError(
                f"found count={count}, rank={rank}, ranks={ranks}; expected samples, and a rank among them"
            )
        self.count, self.seed, self.rank, self.ranks = count, seed, rank, ranks
        self._taken = 0
        self._pass = -1
        self._order = np.zeros(0, np.int64)

    def take(self, n: int) -> NDArray[np.int64]:
        """The next n samples of this rank, int64 (n,). Every rank asks for as many."""
        positions = self._taken + self.rank * n + np.arange(n)
        self._taken += n * self.ranks
        which, inside = np.divmod(positions, self.count)
        return np.array([self._at(*one) for one in zip(which.tolist(), inside.tolist(), strict=True)], np.int64)

    def _at(self, which: int, inside: int) -> int:
        if which != self._pass:
            self._pass, self._order = which, np.random.default_rng([self.seed, which]).permutation(self.count)
        return int(self._order[inside])
