"""What predictors set for the whole process that they live in, and what the last of them takes back."""

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
    """What is there now is there to stay: a full collection that looked through all of it would stop the frames for
    0.2 s."""
    gc.collect()
    gc.freeze()


def slacken() -> None:
    """Another predictor of this process ends; with the last one all is as it was before the first."""
    before = _before.pop()
    if not _before:
        gc.unfreeze()
        sys.setswitchinterval(before)
