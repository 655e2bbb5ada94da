"""Who a sample is: the same in every run, on every rank and in every memory, so that none is ever counted twice.

A sample's identity is an int64. Its key, an int64 in [0, WHOLE), follows from the identity alone and is as good as
random: a buffer that keeps the samples with the smallest keys holds a uniform sample of its past (bottom-k sampling;
Cohen and Kaplan, PODC 2007), and two such buffers can be united, split or thinned without losing that.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from steering.records import hashes

WHOLE = 2**63 - 1
"""Above every key: the bound of a buffer that has turned nothing away."""
ELSEWHERE = -(2**63)
"""In place of an identity: the sample is not to be offered here, for another rank's buffer has been offered it."""


def identities(run: str, scan: str, frames: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) the identity of each frame of a scan of a run."""
    prefix = hashlib.blake2b(_scan(run, scan), digest_size=8)
    found = np.empty(len(frames), np.uint64)
    for row, frame in enumerate(np.asarray(frames, np.int64).tolist()):
        one = prefix.copy()
        one.update(frame.to_bytes(8, "little", signed=True))
        found[row] = int.from_bytes(one.digest(), "little")
    return found.view(np.int64)


def stratum_of(run: str, scan: str) -> int:
    """The stratum of a scan of a run, int64, 0 or more. Names of scans may repeat from run to run."""
    return int.from_bytes(hashlib.blake2b(_scan(run, scan), digest_size=8, person=b"stratum").digest(), "little") >> 1


def keys_of(identity: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) the key of each identity: its hash, less a bit."""
    return np.minimum((hashes(identity) >> np.uint64(1)).view(np.int64), WHOLE - 1)


def estimated(stored: int, bound: int) -> int:
    """How many different samples were offered, of which those below the bound are stored (Cohen and Kaplan, 2007)."""
    return stored if bound == WHOLE else max(stored, round(stored / ((bound + 1) / 2**63)))


class KeyMaker:
    """Keys for samples that come without an identity, all different: from a seed and their number."""

    _BLOCK = 4096

    def __init__(self, seed: int) -> None:
        self.salt = int(keys_of(np.array([seed], np.int64))[0])
        self._first = 0
        self._block = np.zeros(0, np.int64)

    def keys(self, first: int, count: int) -> NDArray[np.int64]:
        """(count,) the keys of the samples first, first + 1, ..."""
        begin = first - self._first
        if begin < 0 or begin + count > len(self._block):
            self._first, begin = first, 0
            numbers = np.arange(first, first + max(count, self._BLOCK), dtype=np.uint64)
            self._block = keys_of(keys_of((numbers ^ np.uint64(self.salt)).view(np.int64)))
        return self._block[begin : begin + count]

    def go_on(self, salt: int) -> None:
        """Make the keys of another maker from now on."""
        self.salt, self._block = salt, np.zeros(0, np.int64)


def _scan(run: str, scan: str) -> bytes:
    return b"".join(len(name.encode()).to_bytes(4, "little") + name.encode() for name in (run, scan))
