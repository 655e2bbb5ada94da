"""Where in a buffer each key is: a hash table of slots, 8 bytes for each slot of the buffer."""

from array import array

import numpy as np
from numpy.typing import NDArray


class KeyIndex:
    """Finds the slot that holds a key (open addressing, linear probing; keys are hashes already).

    Args:
        keys: int64 (slots,) of the buffer, which the buffer changes; an entry is taken out before and put in after.
        filled: slots 0 to filled - 1 are in at once.
    """

    BYTES_PER_SLOT = 8

    def __init__(self, keys: NDArray[np.int64], filled: int) -> None:
        self._keys = keys
        self._size = 2 * len(keys) + 1
        self._slots = array("i", [-1]) * self._size
        for slot in range(filled):
            self.add(slot)

    def find(self, key: int) -> int:
        """The slot of a key, -1 where it is nowhere."""
        slots, keys = self._slots, self._keys
        place = key % self._size
        while (slot := slots[place]) >= 0:
            if keys[slot] == key:
                return slot
            place = place + 1 if place + 1 < self._size else 0
        return -1

    def add(self, slot: int) -> None:
        """Put a slot in, whose key is in no other."""
        slots = self._slots
        place = int(self._keys[slot]) % self._size
        while slots[place] >= 0:
            place = place + 1 if place + 1 < self._size else 0
        slots[place] = slot

    def remove(self, slot: int) -> None:
        """Take a slot out; those behind it move up, so that nothing is left that marks a deletion."""
        slots, size = self._slots, self._size
        place = int(self._keys[slot]) % size
        while slots[place] != slot:
            place = (place + 1) % size
        gap = place
        while True:
            place = (place + 1) % size
            other = slots[place]
            if other < 0:
                break
            home = int(self._keys[other]) % size
            if (place - home) % size >= (place - gap) % size:  # its way from home leads over the gap
                slots[gap] = other
                gap = place
        slots[gap] = -1
