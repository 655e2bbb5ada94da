"""What a live source and its receiving process hand to one another."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from steering.sources.beam import BeamSettings
from steering.sources.motion import Motion
from steering.sources.streams import Began, Companion, JoinSettings, Stream
from steering.sources.window import Window


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the receiving process does."""

    frames: Stream
    companions: tuple[tuple[Companion, Stream], ...]
    motion: Motion | None
    window: Window
    settings: JoinSettings = field(default_factory=JoinSettings)
    beam: BeamSettings = field(default_factory=BeamSettings)
    scans: int | None = 1
    """Scans after whose end it is all over; None: until it is closed."""
    going_on: Began | None = None
    """What the frames' stream said when the scan began that is joined in the middle, where that is known."""
    chunk_frames: int = 10
    give_up_s: float = 10.0
    """Seconds without a frame after which positions that were asked for count as lost."""
    end_s: float | None = 300.0
    """Seconds without a frame after which the run ends with an error; None: it never does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Joined frames of one scan."""

    scan: int
    name: str
    number: NDArray[np.int64]
    counts: NDArray
    """(frame, size, size)"""
    values: dict[str, NDArray[np.float64]]
    """(frame, width) of each companion."""
    acquired: NDArray[np.float64]
    """(frame,) seconds since the epoch."""
