"""The plan of a step: which stored sample goes to which rank, computed by every rank in the same way.

Every rank knows how many samples of each stratum every rank holds. From that, the shared seed and the step, each
computes all ranks' draws, so nobody has to ask for a sample. Pure numpy.

Draws are without replacement within a rank's minibatch, and independent of what the slots hold:

- `uniform`: every set of r stored samples is equally likely, whatever the fills of ranks and strata.
- `balanced`: every stratum is drawn equally often (as far as it holds enough), every sample within it too.
- `seen`: a sample counts as many times as its rank and stratum have seen samples per stored one, so that draws are
  uniform over the past although ranks see unequal streams. Samples with an identity were seen once each, in however
  many epochs they came.

In the last two the share of a group (a stratum; a rank's part of it) is met exactly on average and within one sample in
every minibatch: systematic sampling (Madow, Ann. Math. Statist. 20, 1949) over groups in random order. Sets of distinct
samples are drawn as in Floyd's algorithm (Bentley and Floyd, Commun. ACM 30, 1987).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Mode = Literal["uniform", "balanced", "seen"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Plan:
    """All ranks' draws of one step, int64 (ranks, count).

    Attributes:
        owner: the rank that holds the sample.
        column: its stratum, as a column of the fills; -1 where the mode is uniform.
        ordinal: which of the owner's samples of that stratum; the slot itself where the mode is uniform.
    """

    owner: np.ndarray
    column: np.ndarray
    ordinal: np.ndarray


class Fills:
    """How many samples every rank holds and has seen, by stratum, as far as announced.

    Every rank must feed the announcements in the same order: the order gives strata their columns.
    """

    def __init__(self, ranks: int) -> None:
        self.keys: list[int] = []
        self._column: dict[int, int] = {}
        self._counts = np.zeros((ranks, 16), dtype=np.int64)
        self._seen = np.zeros((ranks, 16), dtype=np.int64)

    @property
    def counts(self) -> np.ndarray:
        """Stored samples, int64 (ranks, strata)."""
        return self._counts[:, : len(self.keys)]

    @property
    def seen(self) -> np.ndarray:
        """Offered samples, int64 (ranks, strata)."""
        return self._seen[:, : len(self.keys)]

    def update(self, rank: int, table: np.ndarray) -> None:
        """Take a rank's announcement: int64 (n, 3) of stratum, stored, seen."""
        columns = [self._column_of(key) for key in table[:, 0].tolist()]
        self._counts[rank, columns] = table[:, 1]
        self._seen[rank, columns] = table[:, 2]

    def _column_of(self, key: int) -> int:
        column = self._column.get(key)
        if column is None:
            column = self._column[key] = len(self.keys)
            self.keys.append(key)
            if column == self._counts.shape[1]:
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)], axis=1)
                self._seen = np.concatenate([self._seen, np.zeros_like(self._seen)], axis=1)
        return column


class StepRNG:
    """Random numbers of a step: the same on every rank, whatever was drawn before.

    A counter-based generator (Philox; Salmon et al., SC 2011), set to a counter of its own for each step, at the cost
    of one microsecond where a new generator costs twenty.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
        self._state = self._bits.state
        self._rng = np.random.Generator(self._bits)

    def of_step(self, step: int) -> np.random.Generator:
        """Return the generator at the start of a step, >= 0. The next call takes it back."""
        self._state["state"]["counter"][2] = step
        self._bits.state = self._state
        return self._rng


def draw(counts: np.ndarray, seen: np.ndarray, r: int, rng: np.random.Generator, *, mode: Mode = "uniform") -> Plan:
    """Draw r representatives for every rank, or all there are where fewer are stored.

    Args:
        counts: stored samples, int64 (ranks, strata).
        seen: offered samples, int64 (ranks, strata); used by mode `seen` only.
        r: representatives per rank.
        rng: in the same state on every rank, see StepRNG.
        mode: see the module's docstring.

    Returns:
        Plan with count = min(r, counts.sum()) draws per rank.
    """
    ranks = len(counts)
    cells = counts.sum(axis=1) if mode == "uniform" else counts.T.ravel()
    cell_ends = cells.cumsum()
    total = int(cell_ends[-1]) if len(cell_ends) else 0
    count = min(r, total)
    if count <= 0:
        nothing = np.zeros((ranks, 0), dtype=np.int64)
        return Plan(nothing, nothing, nothing)
    if mode == "uniform":
        codes = draw_slots(rng, total, (ranks, count))
    elif mode == "balanced":
        codes = _draw_groups(rng, counts.sum(axis=0), np.ones(counts.shape[1]), (ranks, count))
    else:
        weights = np.maximum(seen, counts).T.ravel().astype(np.float64)
        codes = _draw_groups(rng, cells, weights, (ranks, count))
    cell = cell_ends.searchsorted(codes, side="right")
    ordinal = codes - (cell_ends - cells)[cell]
    if mode == "uniform":
        return Plan(cell, np.full_like(cell, -1), ordinal)
    return Plan(cell % ranks, cell // ranks, ordinal)


def draw_slots(rng: np.random.Generator, total: int, shape: tuple[int, int]) -> np.ndarray:
    """Draw distinct numbers below `total` for every rank, int64 (ranks, count); all sets are equally likely."""
    if shape[1] == total:
        return np.broadcast_to(np.arange(total), shape)
    codes = (rng.random(shape) * total).astype(np.int64)  # twice as fast as integers, and as even below 2**40
    again = _with_duplicates(codes)
    if again:
        one = np.zeros((len(again), shape[1]), dtype=np.int64)
        codes[again] = _floyd(rng, one, np.array([total]), np.array([0]))
    return codes


def _draw_groups(
    rng: np.random.Generator, sizes: np.ndarray, weights: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Draw distinct codes for every rank, int64 (ranks, count); group g owns the codes after those of groups before."""
    ranks, count = shape
    starts = np.cumsum(sizes) - sizes
    whole, share = _shares(sizes, weights, count)
    taken = [np.arange(starts[group], starts[group] + sizes[group]) for group in np.flatnonzero(whole)]
    fixed = np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)
    left = count - len(fixed)
    if left == 0:
        return np.broadcast_to(fixed, shape)
    groups = _allot(rng, share, (ranks, left))
    codes = _distinct(rng, groups, sizes, starts)
    return np.concatenate([np.broadcast_to(fixed, (ranks, len(fixed))), codes], axis=1) if len(fixed) else codes


def _shares(sizes: np.ndarray, weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `count` in proportion to the weights, no group above its size.

    Returns (groups taken whole, bool; expected draws of the others, float64).
    """
    whole = np.zeros(len(sizes), dtype=bool)
    still = sizes > 0
    left = count
    share = np.zeros(len(sizes))
    while left > 0:
        share = np.where(still, weights * (left / weights[still].sum()), 0.0)
        full = still & (share >= sizes - 1e-9)
        if not full.any():
            break
        whole |= full
        still &= ~full
        left -= int(sizes[full].sum())
    return whole, share


def _allot(rng: np.random.Generator, share: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Give every draw of every rank its group, int64 (ranks, left), sorted along a row."""
    ranks, left = shape
    groups = rng.permutation(np.flatnonzero(share > 0))
    # Ranks take evenly shifted combs: their draws together are as balanced as those of each.
    first = (rng.random() + np.arange(ranks) / ranks) % 1.0
    points = first[:, None] + np.arange(left)
    index = np.searchsorted(np.cumsum(share[groups]), points, side="right")
    return np.sort(groups[np.minimum(index, len(groups) - 1)], axis=1)


def _distinct(rng: np.random.Generator, groups: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Draw a code from each given group, distinct along a row; all such sets are equally likely.

    Independent draws that happen to be distinct are uniform over such sets; the other rows are drawn again by Floyd's
    algorithm, which is uniform too, so the mixture is.
    """
    codes = starts[groups] + (rng.random(groups.shape) * sizes[groups]).astype(np.int64)
    again = _with_duplicates(codes)
    if again:
        codes[again] = _floyd(rng, groups[again], sizes, starts)
    return codes


def _with_duplicates(codes: np.ndarray) -> list[int]:
    width = codes.shape[1]
    return [index for index, row in enumerate(codes.tolist()) if len(set(row)) < width]


def _floyd(rng: np.random.Generator, groups: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    same = groups[:, :, None] == groups[:, None, :]
    wanted = same.sum(axis=2)
    earlier = np.tril(same, -1).sum(axis=2)
    highest = sizes[groups] - wanted + earlier
    base = starts[groups]
    codes = base + (rng.random(groups.shape) * (highest + 1)).astype(np.int64)
    for index in range(1, groups.shape[1]):
        clash = (codes[:, :index] == codes[:, index, None]).any(axis=1)
        codes[clash, index] = base[clash, index] + highest[clash, index]
    return codes
