"""Output that nobody takes any more, as of `steering run ... | head` or a terminal that was closed: work goes on."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def give_up(stream: TextIO) -> None:
    """Send nowhere what a stream still holds and all that is written to it later, so that it fails nobody, the end of
    the interpreter included; standard error too, where it goes the same way."""
    with contextlib.suppress(OSError, ValueError):  # what has no number is nobody's output
        mine = stream.fileno()
        numbers = [mine]
        if sys.stderr is not None and os.path.sameopenfile(mine, sys.stderr.fileno()):
            numbers.append(sys.stderr.fileno())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in numbers:
            os.dup2(nowhere, number)
        os.close(nowhere)
