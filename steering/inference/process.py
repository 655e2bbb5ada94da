"""What is set for a whole process that a run depends on, and what the last predictor in it takes back."""

from __future__ import annotations

import gc
import sys

_SWITCH_S = 2e-4
_before: list[float] = []
"""Of each predictor that is alive, the interval that it found."""


def quicken() -> None:
    """Have threads hand the interpreter back at once, not after the usual 5 ms: each operator gives it up and asks for
    it again, and Python in another thread (a version being made ready, messages) must not hold it meanwhile."""
    _before.append(sys.getswitchinterval())
    sys.setswitchinterval(_SWITCH_S)


def settle() -> None:
    """What is there now is there to stay: a full collection looks through all that was imported, 400,000 objects, and
    holds the interpreter lock for 0.3 s. On a busy machine that became 2 s, and a process that is silent so long is
    taken for frozen."""
    gc.collect()
    gc.freeze()


def slacken() -> None:
    """Another predictor of this process ends; with the last one all is as it was before the first."""
    before = _before.pop()
    if not _before:
        gc.unfreeze()
        sys.setswitchinterval(before)
