"""Which slot of a rehearsal buffer holds which stratum, kept as it changes.

A stratum is any integer (class, scan, region); new ones may appear at any time. Every change of one slot costs a few
integer operations, whatever the size of the buffer, so that balanced insertion and balanced sampling need no scan.
"""

from array import array
from collections.abc import Sequence

import numpy as np

BYTES_PER_SLOT = 24  # a slot's stratum, its position among the members, and its entry there


class Strata:
    """Members of every stratum, and how many samples of it were offered.

    Strata are numbered 0, 1, ... in the order of their first appearance; `keys[number]` is the stratum itself.
    """

    def __init__(self) -> None:
        self.keys: list[int] = []
        self._number: dict[int, int] = {}
        self.stored = array("q")
        """Stored samples of each number, up to date; not to be changed, nor viewed as an array for long."""
        self.offered = array("q")
        """Offered samples of each number."""
        self._members: list[array] = []
        self._number_of = array("q")  # by slot
        self._place_of = array("q")  # by slot: its index among the members of its stratum
        self._touched: dict[int, None] = {}

    def __len__(self) -> int:
        """Return the number of strata ever seen."""
        return len(self.keys)

    @property
    def slots(self) -> int:
        """Return the number of filled slots."""
        return len(self._number_of)

    @property
    def counts(self) -> np.ndarray:
        """Stored samples, int64 (strata,)."""
        return np.array(self.stored)

    @property
    def seen(self) -> np.ndarray:
        """Offered samples, int64 (strata,)."""
        return np.array(self.offered)

    def numbers(self, keys: list[int]) -> list[int]:
        """Return the number of each stratum, new ones made known."""
        known = self._number
        try:
            return [known[key] for key in keys]
        except KeyError:
            for key in keys:
                if key not in known:
                    self._add(key)
            return [known[key] for key in keys]

    def see(self, number: int, times: int = 1) -> None:
        """Count samples of a stratum as offered."""
        self.offered[number] += times
        self._touched[number] = None

    def see_all(self, numbers: list[int]) -> None:
        """Count a sample of each of these strata as offered."""
        offered = self.offered
        for number in numbers:
            offered[number] += 1
        self._touched.update(dict.fromkeys(numbers))

    def put(self, slots: Sequence[int], numbers: Sequence[int]) -> None:
        """Say that each slot now holds that stratum; slots beyond the last one are appended in order."""
        for slot, number in zip(slots, numbers, strict=True):
            self.put_one(slot, number)

    def put_one(self, slot: int, number: int) -> None:
        """Say that a slot now holds that stratum; the one after the last slot is appended."""
        if slot == len(self._number_of):
            self._number_of.append(number)
            self._place_of.append(0)
        else:
            old = self._number_of[slot]
            if old == number:
                return
            place, last = self._place_of[slot], self._members[old].pop()
            if last != slot:
                self._members[old][place] = last
                self._place_of[last] = place
            self.stored[old] -= 1
            self._touched[old] = None
            self._number_of[slot] = number
        members = self._members[number]
        self._place_of[slot] = len(members)
        members.append(slot)
        self.stored[number] += 1
        self._touched[number] = None

    def number_at(self, slot: int) -> int:
        """Return the number of the stratum that a filled slot holds."""
        return self._number_of[slot]

    def member(self, number: int, share: float) -> int:
        """Return the slot that stands at `share` (0 <= share < 1) of a stratum's members."""
        members = self._members[number]
        return members[int(share * len(members))]

    def any_members(self, numbers: list[int], shares: list[float]) -> list[int]:
        """Do the same for many at once."""
        members = self._members
        return [members[n][int(share * len(members[n]))] for n, share in zip(numbers, shares, strict=True)]

    def fullest(self) -> int:
        """Return the number of a stratum of which most is stored."""
        return int(np.asarray(self.stored).argmax())

    def all_fullest(self) -> list[int]:
        """Return the numbers of all strata of which most is stored."""
        stored = np.array(self.stored)
        return np.flatnonzero(stored == stored.max()).tolist()

    def members(self, key: int) -> array:
        """Return the slots that hold a stratum; empty where there are none. Not to be changed."""
        number = self._number.get(key)
        return array("q") if number is None else self._members[number]

    @property
    def of_slots(self) -> np.ndarray:
        """Return the number of the stratum that each filled slot holds, int64 (slots,)."""
        return np.array(self._number_of)

    @property
    def touched(self) -> int:
        """How many strata have changed and were not announced yet."""
        return len(self._touched)

    def touch_all(self) -> None:
        """Have every stratum announced again: a new group knows none of them."""
        self._touched = dict.fromkeys(range(len(self.keys)))

    def announce(self) -> np.ndarray:
        """Return the changed strata, int64 (n, 3): stratum, stored, seen; they then count as announced."""
        numbers = list(self._touched)
        self._touched.clear()
        table = np.empty((len(numbers), 3), dtype=np.int64)
        table[:, 0] = [self.keys[number] for number in numbers]
        table[:, 1] = [self.stored[number] for number in numbers]
        table[:, 2] = [self.offered[number] for number in numbers]
        return table

    def _add(self, key: int) -> None:
        number = len(self.keys)
        self.stored.append(0)
        self.offered.append(0)
        self._number[key] = number
        self.keys.append(key)
        self._members.append(array("q"))
