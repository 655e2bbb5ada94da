"""Which offered samples a rehearsal buffer keeps, and which slots they take.

- `reservoir`: every sample ever offered is equally likely to be stored (Vitter, ACM TOMS 11, 1985, algorithm R).
- `replacement`: the policy of Bouvier et al. (FGCS 2024): once a stratum has its share of a full buffer, each candidate
  overwrites a random slot of it, so the old decay exponentially; where it has less, a slot of the fullest stratum goes.
  Their probability c/b is the caller's choice of c candidates among b.
- `balanced`: class-balancing reservoir sampling (Chrysakis and Moens, ICML 2020): the fullest stratum makes room for
  the others, and within a stratum every sample offered is equally likely to be stored.

A buffer restored with room to spare holds a share of its past. While the room lasts the same share of the new is kept,
so that samples of either time remain equally likely to be stored; for a fresh buffer the share is 1.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from steering.learning.strata import Strata

Policy = Literal["reservoir", "replacement", "balanced"]


class Insertion:
    """Decides for one buffer, and keeps `strata` up to date.

    Attributes:
        capacity: number of slots.
        seen: samples offered so far.
        rate: share of the offered that is kept while there is room.
        rng: of all decisions.
    """

    def __init__(self, policy: Policy, strata: Strata, *, seed: int) -> None:
        self.policy = policy
        self.capacity = 0
        self.seen = 0
        self.rate = 1.0
        self.rng = np.random.default_rng(seed)
        self._strata = strata

    def choose(self, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Decide on samples of these strata (numbers as in Strata).

        Returns:
            (distinct slots; index of the sample that each takes), int64 (kept,) both.
        """
        if self.policy == "reservoir":
            slots = self._reservoir(len(numbers))
            self._strata.see_all(numbers)
        elif self.policy == "replacement":
            slots = self._replacing(numbers)
        else:
            slots = self._one_by_one(numbers, self._balanced)
        # A later sample of the batch may have replaced an earlier one: the last counts.
        placed = {slot: index for index, slot in enumerate(slots) if slot >= 0}
        if self.policy == "reservoir":
            self._strata.put(list(placed), [numbers[index] for index in placed.values()])
        self.seen += len(numbers)
        return np.array(list(placed), dtype=np.int64), np.array(list(placed.values()), dtype=np.int64)

    def _reservoir(self, count: int) -> list[int]:
        """Slot of each sample, -1 where it is not kept."""
        fill = self._strata.slots
        room = self.capacity - fill
        if count <= room and self.rate >= 1.0:
            return list(range(fill, fill + count))
        share = self.rng.random(count)
        slots = np.full(count, -1)
        free = 0  # samples that come while there is room
        if room:
            kept = share < self.rate
            place = np.cumsum(kept)
            free = count if place[-1] < room else int(np.searchsorted(place, room)) + 1
            head = np.flatnonzero(kept[:free])
            slots[head] = fill + place[head] - 1
        drawn = (share[free:] * np.arange(self.seen + free + 1, self.seen + count + 1)).astype(np.int64)
        slots[free:] = np.where(drawn < self.capacity, drawn, -1)
        return slots.tolist()

    def _replacing(self, numbers: list[int]) -> list[int]:
        """Slot of each sample. Where every stratum has its share, none of them changes its members."""
        strata = self._strata
        share = max(1, self.capacity // max(1, len(strata)))
        if strata.slots < self.capacity or any(strata.stored[number] < share for number in numbers):
            return self._one_by_one(numbers, self._replacement)
        strata.see_all(numbers)
        return strata.any_members(numbers, self.rng.random(len(numbers)).tolist())

    def _one_by_one(self, numbers: list[int], place: Callable[[int, float, float], int]) -> list[int]:
        """Slot of each sample, -1 where it is not kept, where a decision rests on the one before."""
        strata, slots = self._strata, []
        shares = self.rng.random((len(numbers), 2)).tolist()
        for number, (accept, where) in zip(numbers, shares, strict=True):
            strata.see(number)
            slot = place(number, accept, where)
            if slot >= 0:
                strata.put_one(slot, number)
            slots.append(slot)
        return slots

    def _replacement(self, number: int, accept: float, where: float) -> int:
        strata = self._strata
        if strata.slots < self.capacity:
            return strata.slots if accept < self.rate else -1
        if strata.stored[number] >= max(1, self.capacity // len(strata)):
            return strata.member(number, where)
        return strata.member(strata.fullest(), where)

    def _balanced(self, number: int, accept: float, where: float) -> int:
        strata = self._strata
        stored, before = strata.stored[number], strata.offered[number] - 1
        if strata.slots < self.capacity:
            return strata.slots if accept * before < stored or stored == 0 else -1
        fullest = strata.fullest()
        if stored == before and stored < strata.stored[fullest]:  # nothing of it was ever turned away
            return strata.member(fullest, where)
        return strata.member(number, where) if accept * (before + 1) < stored else -1
