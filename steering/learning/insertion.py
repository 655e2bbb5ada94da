"""Which offered samples a rehearsal buffer keeps, and which slots they take.

- `reservoir`: every different sample ever offered is equally likely to be stored. Those with the smallest keys are (see
  identity), so a sample that is offered again, in a later epoch or run, is not counted again: where it is stored it is
  brought up to date in its slot.
- `balanced`: class-balancing reservoir sampling (Chrysakis and Moens, ICML 2020): the fullest stratum makes room for
  the others, and within a stratum every different sample offered is equally likely to be stored, by the same rule.
- `replacement`: the policy of Bouvier et al. (FGCS 2024): once a stratum has its share of a full buffer, each candidate
  overwrites a random slot of it, so the old decay exponentially; where it has less, a slot of the fullest stratum goes.
  Their probability c/b is the caller's choice of c candidates among b. A sample offered again is stored again.

For the first two a bound says what is known of the past: every sample below it is stored, and none above. A buffer
restored with room to spare admits what is new below the same bound, so that samples of either time remain equally
likely to be stored. `replacement` keeps a share of the new instead; for a fresh buffer the share is 1.
"""

from array import array
from bisect import insort
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from steering.learning.identity import WHOLE, KeyMaker, estimated
from steering.learning.key_index import KeyIndex
from steering.learning.strata import Strata

Policy = Literal["reservoir", "replacement", "balanced"]
_LARGEST = 1024
"""So many of the largest keys are looked up at once."""


class Insertion:
    """Decides for one buffer, and keeps `strata` up to date.

    Attributes:
        keys: int64 (slots,), of what each slot holds.
        identified: whether samples come with an identity; None before the first.
        seen: samples offered so far, the same one as often as it came.
        bound: smallest key turned away by `reservoir`; WHOLE where none was.
        rate: share of the offered that `replacement` keeps while there is room.
        rng: of the decisions of `replacement`.
    """

    def __init__(self, policy: Policy, strata: Strata, *, seed: int) -> None:
        self.policy = policy
        self.keys = np.zeros(0, np.int64)
        self.identified: bool | None = None
        self.seen = 0
        self.bound = WHOLE
        self.rate = 1.0
        self.rng = np.random.default_rng(seed)
        self.maker = KeyMaker(seed)
        self._strata = strata
        self._bounds = array("q")
        """Of each stratum, for `balanced`."""
        self._index: KeyIndex | None = None
        self._largest: dict[int, list[tuple[int, int]]] = {}
        """Of a group (a stratum's number; -1: all), every (key, slot) from some key on, ascending."""

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return len(self.keys)

    def allocate(self, capacity: int) -> None:
        """Have so many slots."""
        self.keys = np.zeros(capacity, np.int64)

    def bound_of(self, number: int) -> int:
        """Smallest key of a stratum that was turned away; WHOLE where none was."""
        if self.policy != "balanced":
            return self.bound
        return self._bounds[number] if number < len(self._bounds) else self.bound

    def past(self, number: int) -> int:
        """From how many samples those of a stratum were chosen. One with an identity counts once however often it came,
        as it does for what is stored; `replacement` stores it as often as it comes."""
        if not self.identified or self.policy == "replacement":
            return self._strata.offered[number]
        return estimated(self._strata.stored[number], self.bound_of(number))

    def restore(self, bounds: dict[int, int], bound: int) -> None:
        """Go on from slots that were filled from outside: bounds of strata by their numbers, and of all others."""
        self.bound = bound
        self._bounds = array("q", [bounds.get(number, bound) for number in range(len(self._strata))])
        # Now, and not in the midst of a step.
        known = self.identified and self.policy != "replacement"
        self._index = KeyIndex(self.keys, self._strata.slots) if known else None
        self._largest.clear()

    def choose(
        self, numbers: list[int], keys: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Decide on samples of these strata (numbers as in Strata).

        Args:
            keys: int64 (n,), of the identity of each; None: all are different from each other and from those before.

        Returns:
            (distinct slots; index of the sample that each takes), int64 (kept,) both.
        """
        count = len(numbers)
        self.identified = keys is not None
        if keys is None:
            keys = self.maker.keys(self.seen, count)
        if self.policy == "replacement":
            slots = self._replacing(numbers)
            # A later sample of the batch may have replaced an earlier one: the last counts.
            placed = {slot: index for index, slot in enumerate(slots) if slot >= 0}
            chosen = np.array(list(placed.values()), dtype=np.int64)
            self.keys[list(placed)] = keys[chosen]
        else:
            self._strata.see_all(numbers)
            placed = self._smallest(numbers, keys)
            chosen = np.array(list(placed.values()), dtype=np.int64)
        self.seen += count
        return np.array(list(placed), dtype=np.int64), chosen

    def _smallest(self, numbers: list[int], keys: NDArray[np.int64]) -> dict[int, int]:
        """{slot: index of the sample that takes it}: those whose keys are below the bound."""
        strata, fill, count = self._strata, self._strata.slots, len(numbers)
        if self.policy == "reservoir":
            if not self.identified and self.bound == WHOLE and fill + count <= self.capacity:
                self.keys[fill : fill + count] = keys
                strata.put(range(fill, fill + count), numbers)
                return dict(zip(range(fill, fill + count), range(count), strict=True))
            below = keys < self.bound
        else:
            below = keys < np.array([self.bound_of(number) for number in numbers])
        placed: dict[int, int] = {}
        for index in np.flatnonzero(below).tolist():
            number, key = numbers[index], int(keys[index])
            slot = self._found.find(key) if self.identified else -1
            if slot < 0:
                slot = strata.slots if strata.slots < self.capacity else self._make_room(number, key)
                if slot < 0:
                    continue
                self._put(slot, number, key)
            else:
                self._renew(slot, number)
            placed[slot] = index
        return placed

    @property
    def _found(self) -> KeyIndex:
        """Made when the first identity comes: without one there is nothing to be found again."""
        if self._index is None:
            self._index = KeyIndex(self.keys, self._strata.slots)
        return self._index

    def _make_room(self, number: int, key: int) -> int:
        """The slot of the largest key that has to go; -1 where that is the new one itself, or one as large."""
        if key >= self.bound_of(number):
            return -1
        group = -1 if self.policy != "balanced" else self._giving_way(number, key)
        largest = self._largest_of(group) if group < 0 or self._strata.stored[group] else []
        if group in (-1, number) and (not largest or key > largest[-1][0]):
            self._turn_away(group, key)
            return -1
        gone, slot = largest.pop()
        self._turn_away(group, gone)
        if self._index is not None:
            self._index.remove(slot)
        return slot

    def _giving_way(self, number: int, key: int) -> int:
        """The stratum that gives way to a sample of stratum `number`: the fullest, and of equally full ones that with
        the largest key. None is preferred for its age, also where there is less room than there are strata."""
        strata = self._strata
        fullest = strata.all_fullest()
        lacking = strata.stored[fullest[0]] - strata.stored[number]
        if lacking == 0:
            return number
        tops = {one: self._largest_of(one)[-1][0] for one in fullest}
        if lacking == 1:  # with the new one it would be as full as they are
            tops[number] = max(key, self._largest_of(number)[-1][0] if strata.stored[number] else 0)
        return max(tops, key=tops.__getitem__)

    def _turn_away(self, group: int, key: int) -> None:
        """From now on nothing from this key on is kept of a group."""
        if group < 0:
            self.bound = min(self.bound, key)
            return
        while len(self._bounds) <= group:
            self._bounds.append(self.bound)
        self._bounds[group] = min(self._bounds[group], key)

    def lower(self, bounds: dict[int, int], bound: int) -> None:
        """Admit nothing more from these bounds on, of strata by their numbers, and of all others."""
        for number, key in bounds.items() if self.policy == "balanced" else ():
            self._turn_away(number, key)
        if self.policy != "balanced":  # each new stratum is stored whole at first
            self._turn_away(-1, bound)

    def _largest_of(self, group: int) -> list[tuple[int, int]]:
        found = self._largest.get(group)
        if not found:
            strata = self._strata
            slots = np.arange(strata.slots) if group < 0 else np.array(strata.members(strata.keys[group]))
            keys = self.keys[slots]
            rest = max(0, len(keys) - _LARGEST)
            top = np.argpartition(keys, rest)[rest:] if rest else np.arange(len(keys))
            top = top[np.argsort(keys[top])]
            found = self._largest[group] = list(zip(keys[top].tolist(), slots[top].tolist(), strict=True))
        return found

    def _put(self, slot: int, number: int, key: int) -> None:
        self.keys[slot] = key
        self._strata.put_one(slot, number)
        if self._index is not None:
            self._index.add(slot)
        largest = self._largest.get(number if self.policy == "balanced" else -1)
        if largest and key > largest[0][0]:
            insort(largest, (key, slot))

    def _renew(self, slot: int, number: int) -> None:
        """The sample of a slot has come again."""
        if self._strata.number_at(slot) != number:
            self._strata.put_one(slot, number)
            self._largest.clear()

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
