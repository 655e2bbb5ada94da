"""What a live source and its receiving process hand to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from steering.sources.beam import BeamSettings
from steering.sources.motion import Motion
from steering.sources.streams import Began, Companion, Joined, JoinSettings, Stream
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
    """What the frames' stream said when the scan began that is joined in the middle, where that is known; first: the
    number of the frame from which on it is to be received."""
    begun: int = 0
    """Scans that had begun when the run was lost which goes on now; `going_on` is the newest of them."""
    chunk_frames: int = 10
    give_up_s: float = 10.0
    """Seconds without a frame after which positions that were asked for count as lost."""
    end_s: float | None = 300.0
    """Seconds without a frame after which the run ends with an error; None: it never does."""

    def __post_init__(self) -> None:
        if self.beam.least_monitor is not None and len(self.companions) < 2:
            raise ValueError(
                f"found least_monitor={self.beam.least_monitor:g} and no monitor, expected its stream as well"
            )

    def first_scan(self, record: Began) -> tuple[Began, int]:
        """How the first scan that is received begins, with what is known of it where it is joined in its middle, and
        how many scans of the run are before it."""
        known, before = self.going_on, 0
        if known is None:
            return record, before
        same = record.name in (None, known.name)
        if self.begun:
            # A detector that is armed says so; whatever else has the same name is followed on.
            before = self.begun - (same and "series" not in record.header)
        if record.first is None:
            first, header = known.first if same else None, {**known.header, **record.header}
            record = Began(record.name or known.name, first, header)
        return record, before


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Joined frames of one scan."""

    scan: int
    """Its place among the scans of the run."""
    name: str
    number: NDArray[np.int64]
    counts: NDArray
    """(frame, size, size)"""
    values: dict[str, NDArray[np.float64]]
    """(frame, width) of each companion."""
    acquired: NDArray[np.float64]
    """(frame,) seconds since the epoch."""

    @classmethod
    def of(cls, joined: Sequence[Joined], scan: int, name: str) -> Batch:
        """Of joined frames, one or more, each of which is its counts and its time."""
        return cls(
            scan=scan,
            name=name,
            number=np.array([one.number for one in joined], np.int64),
            counts=np.stack([np.asarray(one.frame[0]) for one in joined]),
            values={each: np.stack([one.values[each] for one in joined]) for each in joined[0].values},
            acquired=np.array([one.frame[1] for one in joined]),
        )
